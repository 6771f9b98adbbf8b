"""Preallocated keys and values of a decoder."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class StaticCache:
    """Keys and values of every layer, ``[layers, B, heads, length, head_dim]``, filled in place."""

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (layers, batch, heads, length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, layer: int, position: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, heads, n, head_dim]`` at ``position`` and return all up to its end."""
        end = position + k.shape[2]
        self.keys[layer, :, :, position:end] = k
        self.values[layer, :, :, position:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor | slice) -> StaticCache:
        """A cache of copies of the rows int64 ``[B']``, or of the rows of a slice themselves."""
        other = copy.copy(self)
        other.keys, other.values = self.keys[:, rows], self.values[:, rows]
        return other
