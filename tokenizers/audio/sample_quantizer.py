"""Samples as tokens: each sample is rounded to one of 2^bits levels, mu-law or linear.

As in SaShiMi (arXiv 2202.09729) and its predecessors; mu-law is ITU-T G.711's curve.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...modalities.errors import InputError
from ..base import AudioTokenizer

KINDS = ("mu-law", "linear")


class SampleQuantizer(AudioTokenizer):
    """Sound ``[B, 1, L]`` <-> ids ``[B, 1, L]``, one a sample; silence is ``vocab_size // 2``.

    Args:
        sample_rate: in Hz.
        bits: of a sample.
        kind: "mu-law" spends the levels on quiet samples, "linear" evenly.
        normalize: `encode` first stretches each item so that its least and greatest samples are -1 and
            1, as published; what is decoded then is as loud.
    """

    hop = 1

    def __init__(
        self, sample_rate: int, bits: int = 8, kind: str = "mu-law", normalize: bool = True
    ):
        if kind not in KINDS:
            raise InputError(f'Unknown quantizer "{kind}": choose one of {", ".join(KINDS)}.')
        if not 2 <= bits <= 16:
            raise InputError(f"A sample has 2 to 16 bits, got {bits}.")
        self.sample_rate = sample_rate
        self.vocab_size = 2**bits
        self.kind = kind
        self.normalize = normalize

    def encode(self, audio: Tensor) -> Tensor:
        """Float ``[B, 1, L]`` in [-1, 1] -> int64 ``[B, 1, L]``.

        Raises:
            InputError: not such sound.
        """
        self.check_audio(audio)
        levels = self.vocab_size
        if self.normalize:
            low, high = audio.aminmax(dim=-1, keepdim=True)
            audio = 2 * (audio - low) / (high - low + 1e-6) - 1
        if self.kind == "mu-law":
            mu = levels - 1
            audio = audio.sign() * torch.log1p(mu * (audio + 1e-8).abs()) / math.log1p(mu)
        # The margins keep -1 and 1 inside the first and the last level.
        scaled = (audio + 1) / 2 * (levels - 0.01) + 0.005
        return scaled.floor().long().clamp(0, levels - 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Ids int64 ``[B, 1, L]`` -> float32 ``[B, 1, L]`` in [-1, 1).

        Raises:
            InputError: not such ids.
        """
        self.check_tokens(tokens)
        audio = tokens.float() / (self.vocab_size // 2) - 1
        if self.kind == "linear":
            return audio
        return audio.sign() * (self.vocab_size ** audio.abs() - 1) / (self.vocab_size - 1)
