"""Sound -> tokens -> sound: what a codec keeps of a recording, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..modalities.audio import load_audio, resample, to_channels
from ..modalities.errors import InputError
from ..tokenizers.audio.streaming import Stream, stream_decoder, stream_encoder
from ..tokenizers.base import AudioTokenizer

MAX_WHOLE_SECONDS = 30.0
PIECE_SECONDS = 10.0


@dataclass
class AudioReconstructionOutput(BaseOutput):
    """Lists with an entry a recording.

    Attributes:
        audios: reconstructions float32 ``[1, T]`` in [-1, 1], as long as what came in.
        originals: what came in, mixed down and resampled alike.
        sampling_rate: of both, in Hz.
        tokens: ``[Q, frames]``, or ``[frames, latent_dim]`` of a continuous tokenizer.
        si_snr: in dB.
        real_time_factor: seconds of work a second of sound, ``{"encode": ..., "decode": ...}``.
        approximate: longer than 30 s, and in windows since the codec does not stream.
    """

    audios: list[Tensor]
    originals: list[Tensor]
    sampling_rate: int
    tokens: list[Tensor]
    si_snr: list[float]
    real_time_factor: list[dict[str, float]]
    approximate: list[bool]


@torch.no_grad()
def reconstruct_audio(
    tokenizer: AudioTokenizer,
    media: Any,
    callback: Callable[[int, int], None] | None = None,
) -> AudioReconstructionOutput:
    """Encode and decode each recording alone.

    One of more than 30 s goes through in pieces: exactly where the codec streams, else by windows.

    Args:
        media: a recording (path, bytes, open file, or ``(samples [C, T], rate)``), or a list of them.
        callback: called with (recordings done, recordings).

    Raises:
        InputError: no readable recording.
    """
    from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio

    sources = media if isinstance(media, list) else [media]
    rate = tokenizer.sample_rate
    originals = [read_recording(source, rate) for source in sources]
    out = AudioReconstructionOutput(
        audios=[],
        originals=originals,
        sampling_rate=rate,
        tokens=[],
        si_snr=[],
        real_time_factor=[],
        approximate=[],
    )
    for done, original in enumerate(originals, start=1):
        audio = original[None].to(tokenizer.device)
        start = time.perf_counter()
        tokens = encode_audio(tokenizer, audio)
        middle = time.perf_counter()
        decoded = decode_audio(tokenizer, tokens)
        end = time.perf_counter()
        seconds = audio.shape[-1] / rate
        decoded = decoded[0, :, : audio.shape[-1]].float().clamp(-1, 1).cpu()
        out.audios.append(decoded)
        out.tokens.append(tokens[0].cpu())
        out.si_snr.append(float(scale_invariant_signal_noise_ratio(decoded, original)))
        out.real_time_factor.append(
            {"encode": (middle - start) / seconds, "decode": (end - middle) / seconds}
        )
        out.approximate.append(seconds > MAX_WHOLE_SECONDS and not tokenizer.streaming)
        if callback is not None:
            callback(done, len(originals))
    return out


@torch.no_grad()
def encode_audio(tokenizer: AudioTokenizer, audio: Tensor) -> Tensor:
    """Sound ``[B, 1, T]`` of any length -> tokens; above 30 s in pieces."""
    if audio.shape[-1] <= MAX_WHOLE_SECONDS * tokenizer.sample_rate:
        return tokenizer.encode(audio)
    pieces = audio.split(round(PIECE_SECONDS * tokenizer.sample_rate), -1)
    return _through(stream_encoder(tokenizer, PIECE_SECONDS), pieces, _frame_axis(tokenizer))


@torch.no_grad()
def decode_audio(tokenizer: AudioTokenizer, tokens: Tensor) -> Tensor:
    """Tokens of any length -> sound ``[B, 1, T]``; above 30 s in pieces."""
    axis = _frame_axis(tokenizer)
    if tokens.shape[axis] <= MAX_WHOLE_SECONDS * tokenizer.frame_rate:
        return tokenizer.decode(tokens)
    pieces = tokens.split(max(1, round(PIECE_SECONDS * tokenizer.frame_rate)), axis)
    return _through(stream_decoder(tokenizer, PIECE_SECONDS), pieces, -1)


def _through(stream: Stream, pieces: tuple[Tensor, ...], axis: int) -> Tensor:
    return torch.cat([*[stream.push(piece) for piece in pieces], stream.flush()], axis)


def _frame_axis(tokenizer: AudioTokenizer) -> int:
    return 1 if tokenizer.vocab_size is None else 2


def read_recording(source: str | Path | bytes | BinaryIO | tuple[Tensor, int], rate: int) -> Tensor:
    """A path, bytes, an open file, or ``(samples [C, T], rate)`` -> mono ``[1, T]`` at ``rate``.

    Raises:
        InputError: no readable recording.
    """
    if not isinstance(source, tuple):
        return load_audio(source, rate, mono=True)[0]
    samples, own_rate = source
    if samples.ndim != 2 or not samples.shape[1]:
        raise InputError(
            f"A recording is samples of shape [channels, samples], got {list(samples.shape)}."
        )
    if not samples.isfinite().all():
        raise InputError("Some samples of the recording are not finite numbers: clean it first.")
    return resample(to_channels(samples.float(), 1), own_rate, rate)
