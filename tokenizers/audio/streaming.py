"""Sound piece by piece through any audio tokenizer.

`stream_encoder` and `stream_decoder` give the tokenizer's own streams, whose pieces join to exactly
what the whole sound gives, or else windows with an overlap, which are ``approximate``. Streams hold
a bounded part of the sound, whatever its length.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...modalities.errors import InputError
from ..base import AudioTokenizer


class Stream(Protocol):
    """One way of a tokenizer: sound ``[B, 1, n]`` to tokens ``[B, Q, t]`` (``[B, t, latent_dim]`` of a
    continuous one), or back.

    Attributes:
        approximate: whether the pieces differ from what the whole gives.
    """

    approximate: bool

    def push(self, piece: Tensor) -> Tensor:
        """Take any number of samples or frames; give what is finished, which may be nothing."""

    def flush(self) -> Tensor:
        """Give the rest. The stream is over."""


def stream_encoder(tokenizer: AudioTokenizer, window: float = 3.0, overlap: float = 0.5) -> Stream:
    """Sound to tokens; ``window`` and ``overlap`` (seconds) are of approximate streams."""
    if tokenizer.streaming:
        return tokenizer.stream_encoder()
    return WindowedEncoder(tokenizer, window, overlap)


def stream_decoder(tokenizer: AudioTokenizer, window: float = 3.0, overlap: float = 0.5) -> Stream:
    """Tokens to sound; ``window`` and ``overlap`` (seconds) are of approximate streams."""
    if tokenizer.streaming:
        return tokenizer.stream_decoder()
    return WindowedDecoder(tokenizer, window, overlap)


class WindowedEncoder:
    """Encodes windows that reach ``overlap`` seconds beyond the frames that are kept of them."""

    approximate = True

    def __init__(self, tokenizer: AudioTokenizer, window: float = 3.0, overlap: float = 0.5):
        self.tokenizer = tokenizer
        self.frames, self.overlap = _window_frames(tokenizer, window, overlap)
        self.buffer: Tensor | None = None
        self.left = 0  # Frames of context in front of the buffer's new ones.

    def push(self, piece: Tensor) -> Tensor:
        self.tokenizer.check_audio(piece)
        self.buffer = piece if self.buffer is None else torch.cat([self.buffer, piece], -1)
        hop, parts = self.tokenizer.hop, []
        while self.buffer.shape[-1] >= (self.left + self.frames + self.overlap) * hop:
            whole = self.left + self.frames + self.overlap
            tokens = self.tokenizer.encode(self.buffer[..., : whole * hop])
            end = self.left + self.frames
            parts.append(_frames(tokens, self.left, end))
            keep = min(end, self.overlap)
            self.buffer, self.left = self.buffer[..., (end - keep) * hop :], keep
        return _join(parts, self._nothing())

    def flush(self) -> Tensor:
        if self.buffer is None or self.buffer.shape[-1] <= self.left * self.tokenizer.hop:
            return self._nothing()
        return _frames(self.tokenizer.encode(self.buffer), self.left, None)

    def _nothing(self) -> Tensor:
        batch = 1 if self.buffer is None else len(self.buffer)
        device = None if self.buffer is None else self.buffer.device
        if self.tokenizer.vocab_size is None:
            return torch.zeros(batch, 0, self.tokenizer.latent_dim, device=device)
        shape = (batch, self.tokenizer.num_codebooks, 0)
        return torch.zeros(shape, dtype=torch.long, device=device)


class WindowedDecoder:
    """Decodes windows that overlap and fades linearly from each to the next."""

    approximate = True

    def __init__(self, tokenizer: AudioTokenizer, window: float = 3.0, overlap: float = 0.5):
        self.tokenizer = tokenizer
        self.frames, self.overlap = _window_frames(tokenizer, window, overlap)
        self.buffer: Tensor | None = None
        self.tail: Tensor | None = None  # Sound of the buffer's first ``overlap`` frames.

    def push(self, piece: Tensor) -> Tensor:
        axis = -2 if self.tokenizer.vocab_size is None else -1
        self.buffer = piece if self.buffer is None else torch.cat([self.buffer, piece], axis)
        parts, step = [], self.frames
        while self.buffer.shape[axis] >= step + self.overlap:
            parts.append(self._decode(step + self.overlap, last=False))
            self.buffer = _frames(self.buffer, step, None)
        return _join(parts, self._nothing())

    def flush(self) -> Tensor:
        if self.buffer is None:
            return self._nothing()
        axis = -2 if self.tokenizer.vocab_size is None else -1
        count = self.buffer.shape[axis]
        if self.tail is not None and count <= self.overlap:
            return self.tail
        return self._decode(count, last=True) if count else self._nothing()

    def _decode(self, count: int, last: bool) -> Tensor:
        sound = self.tokenizer.decode(_frames(self.buffer, 0, count))
        if self.tail is not None:
            samples = self.tail.shape[-1]
            fade = torch.arange(1, samples + 1, device=sound.device) / (samples + 1)
            joint = self.tail + fade * (sound[..., :samples] - self.tail)
            sound = torch.cat([joint, sound[..., samples:]], -1)
        if last or not self.overlap:
            return sound
        cut = self.overlap * self.tokenizer.hop
        self.tail = sound[..., -cut:]
        return sound[..., :-cut]

    def _nothing(self) -> Tensor:
        batch = 1 if self.buffer is None else len(self.buffer)
        return torch.zeros(batch, 1, 0, device=None if self.buffer is None else self.buffer.device)


def _window_frames(tokenizer: AudioTokenizer, window: float, overlap: float) -> tuple[int, int]:
    """Frames that a window adds, and of its overlap."""
    if not 0 <= overlap < window:
        raise InputError(
            f"The overlap must be shorter than the window, got {overlap} of {window} s."
        )
    shared = round(overlap * tokenizer.frame_rate)
    return max(1, round(window * tokenizer.frame_rate) - shared), shared


def _frames(tokens: Tensor, start: int, end: int | None) -> Tensor:
    """Frames of tokens ``[B, Q, T]``, or of latents ``[B, T, D]``."""
    return tokens[:, start:end] if tokens.dtype.is_floating_point else tokens[..., start:end]


def _join(parts: list[Tensor], nothing: Tensor) -> Tensor:
    if not parts:
        return nothing
    # Frames of latents lie in the middle; of tokens and of sound they are last.
    latents = parts[0].dtype.is_floating_point and nothing.ndim == 3 and nothing.shape[1] == 0
    return torch.cat(parts, 1 if latents else -1)
