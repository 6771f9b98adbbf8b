"""A picture through one or several tokenizers, at several prefix lengths."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..modalities.image import fit_image, image_grid
from .faults import explain
from .jobs import StudioJob
from .studio import Studio


class _Cancelled(Exception):
    pass


@dataclass
class Row:
    """What one tokenizer makes of the picture.

    Attributes:
        tokens: ids, empty where they are continuous.
        lengths, psnr, bits: prefix lengths, and of each the PSNR in dB and the bits per pixel.
        sheet: file with the pictures of ``lengths`` below each other.
        original: file with the picture as the tokenizer saw it.
        seconds: encoding and all decodings.
    """

    tokenizer: str
    state: str = "queued"
    error: str = ""
    tokens: list[int] = field(default_factory=list)
    num_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    bits: list[float | None] = field(default_factory=list)
    sheet: str = ""
    original: str = ""
    size: int = 0
    ordered: bool = False
    seconds: float = 0.0
    done: int = 0


class ReconstructJob(StudioJob):
    """
    Args:
        picture: what to encode.
        name: what people call it.
        tokenizers: names of `Studio.tokenizer_names`.
    """

    kind = "reconstruction"

    def __init__(
        self,
        studio: Studio,
        owner: str,
        picture: Image.Image,
        name: str,
        tokenizers: Sequence[str],
    ):
        super().__init__(studio, owner)
        self.picture, self.name = picture, name
        self.rows = [Row(tokenizer) for tokenizer in tokenizers]

    def run(self) -> None:
        for row in self.rows:
            if self.cancel.is_set():
                return
            row.state = "running"
            self.touch()
            try:
                self._reconstruct(row)
                row.state = "done"
            except _Cancelled:
                row.state = "stopped"
            except Exception as error:  # One tokenizer that fails leaves the others.
                row.error, row.state = explain(error), "failed"
            self.touch()

    def _reconstruct(self, row: Row) -> None:
        from ..pipelines.reconstruction import ReconstructionPipeline

        tokenizer = self.studio.tokenizer(row.tokenizer)
        row.num_tokens, row.size = tokenizer.num_tokens, tokenizer.image_size
        row.ordered = tokenizer.ordered or tokenizer.adaptive
        fitted = fit_image(self.picture, tokenizer.image_size, mode="contain")
        row.original = self.show(fitted)
        self.touch()

        def progress(done: int, total: int) -> None:
            row.done = done
            self.touch()
            if self.cancel.is_set() and done < total:
                raise _Cancelled

        start = time.perf_counter()
        output = ReconstructionPipeline(tokenizer)(
            fitted,
            num_tokens=None if row.ordered else [tokenizer.num_tokens],
            callback=progress,
        )
        row.seconds = round(time.perf_counter() - start, 2)
        pictures = output.reconstructions
        row.sheet = self.show(
            image_grid([images[0] for images in pictures.values()], columns=1, padding=0)
        )
        row.psnr = [round(values[0], 1) for values in output.psnr.values()]
        if tokenizer.vocab_size is not None:
            # An adaptive tokenizer leaves places empty (-1).
            row.tokens = [token for token in output.tokens[0].tolist() if token >= 0]
            bits = math.log2(tokenizer.vocab_size) / tokenizer.image_size**2
            row.bits = [round(used[0] * bits, 4) for used in output.used.values()]
        row.lengths = [used[0] for used in output.used.values()]

    def view(self) -> dict[str, Any]:
        return {
            **super().view(),
            "name": self.name,
            "rows": [vars(row).copy() for row in self.rows],
        }
