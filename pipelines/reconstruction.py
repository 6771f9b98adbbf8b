"""Media -> tokens -> media, at a list of prefix lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..modalities.errors import InputError
from ..modalities.image import fit_image, load_image, to_pil, to_tensor
from ..tokenizers.auto import AutoTokenizer
from ..tokenizers.base import AudioTokenizer, Tokenizer
from .audio_reconstruction import AudioReconstructionOutput, reconstruct_audio
from .seeds import noise_stream
from .video_reconstruction import VideoReconstructionOutput, reconstruct_video


@dataclass
class ReconstructionOutput(BaseOutput):
    """Pictures by number of tokens, all tokens int64 ``[B, N]``, and of each picture the PSNR in dB
    and how many tokens it took: fewer than asked where the tokenizer is adaptive."""

    reconstructions: dict[int, list[Image.Image]]
    tokens: Tensor
    psnr: dict[int, list[float]]
    used: dict[int, list[int]]


@torch.no_grad()
def decode_tokens(
    tokenizer: Tokenizer,
    tokens: Tensor,
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
) -> Tensor:
    """Tokens of any picture tokenizer -> media ``[B, C, H, W]``, about [-1, 1].

    Args:
        seeds: of each item's noise; a decoder that draws none uses neither seeds nor steps.

    Raises:
        InputError: the decoder wants more than tokens, such as the text of the picture.
    """
    _, *others = inspect.signature(tokenizer.decode).parameters.values()
    for parameter in others:
        if parameter.default is parameter.empty:
            raise InputError(
                f"{type(tokenizer).__name__} decodes tokens together with {parameter.name}: call "
                "its decode method with both."
            )
    options = {
        "generator": [noise_stream(seed) for seed in seeds],
        "num_inference_steps": num_inference_steps,
    }
    known = {parameter.name for parameter in others}
    return tokenizer.decode(tokens, **{k: v for k, v in options.items() if k in known})


class ReconstructionPipeline(DiffusionPipeline):
    """What a tokenizer keeps of a picture or a clip, or a codec of a recording.

    Args:
        tokenizer: any tokenizer of pictures, video or sound.
    """

    def __init__(self, tokenizer: Tokenizer | AudioTokenizer):
        super().__init__()
        self.register_modules(tokenizer=tokenizer)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> ReconstructionPipeline:
        """Over the tokenizer of that name, folder, or shipped model (see `AutoTokenizer`)."""
        return cls(AutoTokenizer.from_pretrained(name, **options))

    @torch.no_grad()
    def __call__(
        self,
        media: Any,
        num_tokens: Sequence[int] | None = None,
        seed: int = 0,
        num_inference_steps: int | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> ReconstructionOutput | AudioReconstructionOutput | VideoReconstructionOutput:
        """Encode once and decode each prefix; an adaptive tokenizer encodes within each budget.

        Of a tokenizer of sound or video ``media`` and ``callback`` are those of `reconstruct_audio`
        or `reconstruct_video`, which answers, and the other arguments have no meaning.

        Args:
            media: a picture (path, bytes, PIL), a list of them, or a tensor ``[B, 3, S, S]`` in
                [-1, 1].
            num_tokens: prefix lengths, or budgets of an adaptive tokenizer; default the powers of
                two and all tokens, or all tokens where the tokenizer is neither.
            seed: of the decoder noise; the same for every picture and length.
            callback: called with (lengths done, lengths).

        Raises:
            InputError: a length that the tokenizer does not have, or no readable picture.
        """
        tokenizer = self.tokenizer
        sound = isinstance(tokenizer, AudioTokenizer)
        if sound or tokenizer.num_frames > 1:
            if num_tokens is not None or num_inference_steps is not None:
                what = "A codec" if sound else "A tokenizer of video"
                raise InputError(
                    f"{what} has neither num_tokens nor num_inference_steps: leave them out."
                )
            return (reconstruct_audio if sound else reconstruct_video)(tokenizer, media, callback)
        flexible = tokenizer.ordered or tokenizer.adaptive
        if num_tokens is None:
            powers = [2**i for i in range(tokenizer.num_tokens.bit_length())]
            prefixes = [n for n in powers if n < tokenizer.num_tokens and flexible]
            num_tokens = [*prefixes, tokenizer.num_tokens]
        lengths = list(dict.fromkeys(num_tokens))
        for length in lengths:
            if not 1 <= length <= tokenizer.num_tokens:
                raise InputError(
                    f"This tokenizer decodes 1 to {tokenizer.num_tokens} tokens, got {length}."
                )
            if length < tokenizer.num_tokens and not flexible:
                raise InputError(
                    f"This tokenizer decodes only all of its {tokenizer.num_tokens} tokens, got "
                    f"{length}."
                )
        if isinstance(media, Tensor):
            images = media
        else:
            sources = media if isinstance(media, (list, tuple)) else [media]
            images = to_tensor(
                [
                    fit_image(load_image(source), tokenizer.image_size, mode="contain")
                    for source in sources
                ]
            )
        images = images.to(self.device)
        tokens = tokenizer.encode(images)
        reconstructions, psnr, used = {}, {}, {}
        for done, length in enumerate(lengths, start=1):
            part = tokens[:, :length]
            used[length] = [length] * len(tokens)
            if tokenizer.adaptive:
                part = tokenizer.encode(images, num_tokens=length)
                used[length] = tokenizer.lengths(part).tolist()
            decoded = decode_tokens(
                tokenizer, part, [seed] * len(tokens), num_inference_steps
            ).clamp(-1, 1)
            error = (decoded - images.to(decoded)).square().mean((1, 2, 3))
            psnr[length] = (10 * torch.log10(4 / error.clamp(min=1e-10))).tolist()
            reconstructions[length] = to_pil(decoded)
            if callback is not None:
                callback(done, len(lengths))
        return ReconstructionOutput(
            reconstructions=reconstructions, tokens=tokens, psnr=psnr, used=used
        )
