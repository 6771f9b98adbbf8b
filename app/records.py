"""From a call to the record in its file, and back."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modalities.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.editing import Edit
    from ..pipelines.image_generation import ImageGenerationPipeline

# What a record holds of the settings of a pipeline's `stream`.
STREAM_SETTINGS = (
    "num_tokens",
    "num_steps",
    "num_inference_steps",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "style",
)


def picture_record(
    pipeline: ImageGenerationPipeline,
    condition: Any,
    seed: int,
    index: int,
    settings: dict[str, Any],
    count: int,
    tokens: Tensor,
    edit: Edit | None = None,
    sha256: str | None = None,
) -> dict[str, Any]:
    """The record of one picture of a batch.

    Args:
        condition: the prompt or class as it was asked for, or a `Blend` of two.
        settings: of the pipeline's ``stream``, each with its value.
        count: pictures in the batch; their number decides how matrix products are rounded.
    """
    from ..modalities.metadata import make_record
    from ..pipelines.editing import Blend, ends

    first, second = ends(condition)
    own: dict[str, Any] = {}
    if pipeline.condition == "class":
        own["class_label"], second = pipeline.class_label(first), pipeline.class_label(second)
        first = pipeline.class_name(own["class_label"])
    if isinstance(condition, Blend):
        own |= {"edit": "blend"}
        own |= {"second_label": second} if isinstance(second, int) else {"second": second}
    if edit is not None:
        own["edit"] = edit.kind
        if edit.cells is None:
            own["keep"] = edit.tokens.shape[1]
        else:
            own["kept"] = encode_cells(edit.cells)
        if edit.side is not None:
            own["side"] = edit.side
    settings = {
        **{key: value for key, value in settings.items() if value is not None},
        **own,
        "width": pipeline.image_size,
        "height": pipeline.image_size,
        "num_images_per_prompt": count,
    }
    return make_record(
        type(pipeline).__name__,
        pipeline.name,
        first,
        seed,
        index,
        settings,
        tokens,
        pipeline.name,
        sha256=sha256,
        device=pipeline.device,
        dtype=pipeline.dtype,
    )


def encode_cells(cells: Tensor) -> str:
    """A map over the grid of tokens, bool ``[1, p, p]``, -> base64url text, one bit a cell."""
    import numpy as np

    bits = np.packbits(cells.flatten().cpu().numpy()).tobytes()
    return base64.urlsafe_b64encode(bits).rstrip(b"=").decode("ascii")


def recorded_edit(
    pipeline: ImageGenerationPipeline, settings: dict[str, Any], tokens: Tensor, file: Path
) -> Edit | None:
    """What a picture was made from, out of its record and its own pixels.

    Raises:
        InputError: the record is not complete.
    """
    import torch

    from ..modalities.image import load_image, to_tensor
    from ..pipelines.editing import SIDES, Edit, keep_cells, window

    kind = settings.get("edit")
    if kind == "vary" and settings.get("keep"):
        return pipeline.variation(tokens, settings["keep"])
    if kind not in ("inpaint", "outpaint"):
        return None
    grid, side = pipeline.tokenizer.token_grid, settings.get("side")
    try:
        text = settings["kept"]
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        bits = torch.tensor([byte >> shift & 1 for byte in data for shift in range(7, -1, -1)])
        cells = bits[: grid * grid].view(1, grid, grid).bool()
        if kind == "outpaint" and side not in SIDES:
            raise ValueError
    except (KeyError, TypeError, ValueError, RuntimeError, binascii.Error) as error:
        raise InputError(
            f'"{file}" does not say what was kept: it cannot be made again.'
        ) from error
    canvas = to_tensor(load_image(file)).to(pipeline.device)
    size = pipeline.image_size
    picture = canvas if side is None else window(canvas, side, size).contiguous()
    if tuple(picture.shape[-2:]) != (size, size):
        raise InputError(f'"{file}" has not the size of pictures by "{pipeline.name}".')
    generator, tokenizer = pipeline.generator, pipeline.tokenizer
    edit = keep_cells(generator, tokenizer, picture, cells.to(pipeline.device), tokens[None], kind)
    if side is None:
        return edit
    return Edit(**{**vars(edit), "side": side, "canvas": canvas})
