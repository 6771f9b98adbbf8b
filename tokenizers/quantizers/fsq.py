"""Finite scalar quantization: each latent dimension is rounded to one of a few levels.

Paper: "Finite Scalar Quantization: VQ-VAE Made Simple" (Mentzer et al., ICLR 2024), arXiv 2309.15505.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Bounded rounding with a straight-through gradient; the codebook is implicit.

    Args:
        levels: number of levels of each dimension; the first is the least significant digit of an id.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = tuple(levels)
        self.vocab_size = prod(self.levels)
        sizes = torch.tensor(self.levels, dtype=torch.int64)
        basis = torch.cat([torch.ones(1, dtype=torch.int64), sizes.cumprod(0)[:-1]])
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    @property
    def dim(self) -> int:
        return len(self.levels)

    def bound(self, z: Tensor) -> Tensor:
        """Squash ``[..., d]`` so that rounding gives exactly ``levels`` values (section 3.1)."""
        half = (self.sizes - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.sizes % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., d]`` -> (codes in [-1, 1] ``[..., d]``, ids int64 ``[...]``), in float32."""
        bounded = self.bound(z.float())
        rounded = bounded + (bounded.round() - bounded).detach()
        codes = rounded / (self.sizes // 2)
        return codes, self.codes_to_ids(codes)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Codes ``[..., d]`` -> ids ``[...]``."""
        half = self.sizes // 2
        digits = (codes.detach() * half).round().long() + half
        return (digits * self.basis).sum(-1)

    def ids_to_digits(self, ids: Tensor) -> Tensor:
        """Ids ``[...]`` -> the level of each dimension, from 0, int64 ``[..., d]``."""
        return ids[..., None] // self.basis % self.sizes

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[...]`` -> codes ``[..., d]`` in [-1, 1], float32."""
        half = self.sizes // 2
        return (self.ids_to_digits(ids) - half) / half
