"""What every tokenizer answers: media in, tokens out, and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..modalities.errors import InputError


class Tokenizer(ABC):
    """Media <-> tokens.

    A generator reads these properties to know what it must write:

    Attributes:
        num_tokens: tokens of one item (the longest, where the length is flexible).
        vocab_size: number of ids of a discrete tokenizer; None for a continuous one.
        latent_dim: width of a continuous token; None for a discrete tokenizer.
        ordered: whether every prefix of the tokens decodes, coarse to fine.
        adaptive: whether ``encode`` itself chooses how many tokens an item gets; such a tokenizer
            has ``lengths(tokens)``, and ``encode`` takes a budget ``num_tokens``.
        image_size: side of the square picture in pixels.
        token_grid: side of the square on which a picture's tokens lie in raster order (of several
            scales, the last one); None where they have no place in it.
        num_frames: frames of a clip (the longest that was trained on, where the length is flexible);
            1 for pictures.
        temporal_patch_size: frames behind one step of the token grid.
        causal: no frame changes the tokens of earlier ones, and the first frame is a step of its own:
            clips have ``1 + k temporal_patch_size`` frames, and a picture is a clip of one.
    """

    num_tokens: int
    vocab_size: int | None
    latent_dim: int | None = None
    ordered: bool
    adaptive: bool = False
    image_size: int
    token_grid: int | None = None
    num_frames: int = 1
    temporal_patch_size: int = 1
    causal: bool = False

    @property
    def tokens_per_step(self) -> int:
        """Of a causal tokenizer: tokens of one step in time."""
        return self.num_tokens // (1 + (self.num_frames - 1) // self.temporal_patch_size)

    @abstractmethod
    def encode(self, media: Tensor) -> Tensor:
        """Media ``[B, C, H, W]`` or ``[B, C, T, H, W]`` in [-1, 1] -> tokens: int64
        ``[B, num_tokens]``, or float ``[B, num_tokens, latent_dim]`` of a continuous tokenizer."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, k]`` (or ``[B, k, latent_dim]``) -> media as `encode` reads it, about [-1, 1],
        not clamped."""

    def check_images(self, images: Tensor) -> None:
        """Raise InputError unless images are ``[B, 3, image_size, image_size]``."""
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"This tokenizer reads pictures of shape [batch, 3, {self.image_size}, "
                f"{self.image_size}], got {list(images.shape)}: resize them first."
            )

    def check_video(self, video: Tensor) -> None:
        """Raise InputError unless clips are ``[B, 3, T, image_size, image_size]`` with a fitting T."""
        side, frames = self.image_size, video.shape[2] if video.ndim == 5 else 0
        wanted = f"{self.num_frames}"
        fits = frames == self.num_frames
        if self.causal:
            wanted = f"1 + {self.temporal_patch_size} k"
            fits = frames > 0 and (frames - 1) % self.temporal_patch_size == 0
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3:] != (side, side) or not fits:
            raise InputError(
                f"This tokenizer reads clips of shape [batch, 3, {wanted} frames, {side}, {side}], "
                f"got {list(video.shape)}: resize them, or repeat the last frame."
            )

    def check_latents(self, latents: Tensor) -> None:
        """Raise InputError unless latents are float ``[B, num_tokens, latent_dim]``."""
        expected = (self.num_tokens, self.latent_dim)
        if not latents.dtype.is_floating_point or tuple(latents.shape[1:]) != expected:
            raise InputError(
                f"This tokenizer decodes latents of shape [batch, {self.num_tokens}, "
                f"{self.latent_dim}], got {str(latents.dtype).removeprefix('torch.')} "
                f"{list(latents.shape)}."
            )

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise InputError unless tokens are integer ids ``[B, k]`` that this tokenizer knows."""
        if tokens.dtype.is_floating_point or tokens.dtype == torch.bool or tokens.ndim != 2:
            raise InputError(
                f"Tokens must be whole numbers of shape [batch, count], got "
                f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}."
            )
        count, fewest = tokens.shape[1], 1 if self.ordered else self.num_tokens
        fits = fewest <= count <= self.num_tokens
        counts = f"1 to {self.num_tokens}" if self.ordered else f"exactly {self.num_tokens}"
        if self.causal:
            fits = count > 0 and count % self.tokens_per_step == 0
            counts = f"a multiple of {self.tokens_per_step}"
        if not fits:
            raise InputError(f"This tokenizer decodes {counts} tokens, got {count}.")
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < self.vocab_size):
            raise InputError(
                f"Token ids must lie in 0 to {self.vocab_size - 1}, got "
                f"{int(tokens.min())} to {int(tokens.max())}."
            )


class AudioTokenizer(ABC):
    """Sound <-> tokens ``[B, Q, T]``: Q codebooks, one column a frame.

    Attributes:
        sample_rate: in Hz, of mono sound ``[B, 1, L]``.
        hop: samples of a frame; L samples give ``ceil(L / hop)`` frames, which decode to
            ``T * hop`` samples: cut the result to L.
        num_codebooks: Q.
        vocab_size: ids of each codebook; None for a continuous tokenizer.
        latent_dim: width of a continuous frame ``[B, T, latent_dim]``; None for a discrete one.
        streaming: whether pieces, encoded and decoded with their state, give what the whole gives:
            such a tokenizer has ``stream_encoder()`` and ``stream_decoder()``; see
            `tokenizers.audio.streaming`, which also serves the others, in windows.
    """

    sample_rate: int
    hop: int
    num_codebooks: int = 1
    vocab_size: int | None
    latent_dim: int | None = None
    streaming: bool = False

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop

    @property
    def bitrate(self) -> float | None:
        """Bits a second, where the tokens are discrete."""
        if self.vocab_size is None:
            return None
        return self.frame_rate * self.num_codebooks * math.log2(self.vocab_size)

    def num_frames(self, samples: int) -> int:
        """Frames of a sound of so many samples."""
        return -(-samples // self.hop)

    @abstractmethod
    def encode(self, audio: Tensor) -> Tensor:
        """Sound ``[B, 1, L]`` in [-1, 1] -> tokens int64 ``[B, Q, T]`` (or ``[B, T, latent_dim]``)."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> sound ``[B, 1, T * hop]``, about [-1, 1], not clamped."""

    def check_audio(self, audio: Tensor) -> None:
        """Raise InputError unless audio is ``[B, 1, L]`` with L > 0 and finite values."""
        if audio.ndim != 3 or audio.shape[1] != 1 or not audio.dtype.is_floating_point:
            raise InputError(
                f"This tokenizer reads float sound of shape [batch, 1, samples] at "
                f"{self.sample_rate} Hz, got {str(audio.dtype).removeprefix('torch.')} "
                f"{list(audio.shape)}: mix it down to one channel and resample it first."
            )
        if not audio.shape[-1]:
            raise InputError("The sound has no samples: give at least one.")
        if not bool(torch.isfinite(audio).all()):
            raise InputError("The sound holds NaN or infinite samples: repair it first.")

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise InputError unless tokens are integer ids ``[B, Q, T]`` that this tokenizer knows."""
        whole = not tokens.dtype.is_floating_point and tokens.dtype != torch.bool
        if not whole or tokens.ndim != 3 or tokens.shape[1] != self.num_codebooks:
            raise InputError(
                f"Tokens must be whole numbers of shape [batch, {self.num_codebooks}, frames], got "
                f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}."
            )
        if not tokens.shape[-1]:
            raise InputError("There are no tokens to decode: give at least one frame.")
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < self.vocab_size):
            raise InputError(
                f"Token ids must lie in 0 to {self.vocab_size - 1}, got "
                f"{int(tokens.min())} to {int(tokens.max())}."
            )
