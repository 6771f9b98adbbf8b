"""Clips -> tokens -> clips: what a video tokenizer keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..modalities.errors import InputError
from ..modalities.video import Video, composite, fit_frames, load_video
from ..tokenizers.base import Tokenizer


@dataclass
class VideoReconstructionOutput(BaseOutput):
    """Lists with an entry a clip.

    Attributes:
        videos: reconstructions ``[3, T, S, S]`` in [-1, 1], as long as what came in.
        originals: what came in, over white and at the tokenizer's size.
        frame_rates: frames a second.
        tokens: ids int64 ``[n]``, or ``[n, latent_dim]``; of a tokenizer of one length those of all
            pieces in a row.
        psnr: in dB, over all frames.
    """

    videos: list[Tensor]
    originals: list[Tensor]
    frame_rates: list[float]
    tokens: list[Tensor]
    psnr: list[float]


@torch.no_grad()
def reconstruct_video(
    tokenizer: Tokenizer, media: Any, callback: Callable[[int, int], None] | None = None
) -> VideoReconstructionOutput:
    """Encode and decode each clip alone.

    A causal tokenizer takes a clip whole; the last frame is repeated up to a whole step, and what that
    adds is cut off again. One of a fixed number of frames takes it piece by piece.

    Args:
        media: a file, a `Video` or frames ``[3 or 4, T, H, W]`` in [-1, 1], or a list of them.
        callback: called with (clips done, clips).

    Raises:
        InputError: no readable video, or one that does not fit into memory.
    """
    sources = media if isinstance(media, list) else [media]
    out = VideoReconstructionOutput(videos=[], originals=[], frame_rates=[], tokens=[], psnr=[])
    for done, source in enumerate(sources, start=1):
        video = read_clip(source)
        frames = composite(video.frames).transpose(0, 1)
        original = fit_frames(frames, tokenizer.image_size, "contain").transpose(0, 1)
        tokens = encode_clip(tokenizer, original[None].to(tokenizer.device))
        decoded = decode_clip(tokenizer, tokens, original.shape[1])[0].float().cpu()
        error = (decoded - original).square().mean()
        out.videos.append(decoded)
        out.originals.append(original)
        out.frame_rates.append(video.frame_rate)
        out.tokens.append(tokens[0].cpu())
        out.psnr.append(float(10 * torch.log10(4 / error.clamp(min=1e-10))))
        if callback is not None:
            callback(done, len(sources))
    return out


def read_clip(source: Any) -> Video:
    """A file, a `Video` or frames -> a `Video`; frames alone are given 8 a second.

    Raises:
        InputError: none of these.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, Tensor):
        if source.ndim != 4 or source.shape[0] not in (3, 4) or not source.numel():
            raise InputError(
                f"A clip has the shape [3 or 4, frames, height, width], got {list(source.shape)}."
            )
        return Video(source.float(), 8.0)
    if not isinstance(source, str | Path | bytes):
        raise InputError(f"A clip is a file, a Video or a tensor, got {type(source).__name__}.")
    return load_video(source)


def pad_frames(tokenizer: Tokenizer, frames: int) -> int:
    """The next number of frames that the tokenizer takes, in pieces where it has one length."""
    step = tokenizer.temporal_patch_size if tokenizer.causal else tokenizer.num_frames
    own = 1 if tokenizer.causal else 0
    return own + -(-max(0, frames - own) // step) * step


@torch.no_grad()
def encode_clip(tokenizer: Tokenizer, video: Tensor) -> Tensor:
    """Clips ``[B, 3, T, S, S]`` of any T -> tokens ``[B, n]`` (or ``[B, n, latent_dim]``)."""
    missing = pad_frames(tokenizer, video.shape[2]) - video.shape[2]
    video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
    if tokenizer.causal:
        return tokenizer.encode(video)
    pieces = video.split(tokenizer.num_frames, dim=2)
    return torch.cat([tokenizer.encode(piece) for piece in pieces], dim=1)


@torch.no_grad()
def decode_clip(tokenizer: Tokenizer, tokens: Tensor, frames: int) -> Tensor:
    """Undoes `encode_clip`: the first ``frames`` frames, clamped to [-1, 1]."""
    pieces = (tokens,) if tokenizer.causal else tokens.split(tokenizer.num_tokens, dim=1)
    video = torch.cat([tokenizer.decode(piece) for piece in pieces], dim=2)
    return video[:, :, :frames].clamp(-1, 1)
