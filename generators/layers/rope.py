"""Rotary positions along one or more axes (RoFormer, arXiv 2104.09864), and attention with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ..cache import StaticCache

Rope = tuple[Tensor, Tensor]


def rope_tables(positions: Tensor, head_dim: int) -> Rope:
    """Cosines and sines ``[n, head_dim / 2]`` of the angles of the pairs of channels of a head.

    Every axis has the same share d of the channels, which turn by ``position * 10000 ** (-2 k / d)``.

    Args:
        positions: ``[n, axes]``, e.g. row and column.
        head_dim: a multiple of twice the axes.
    """
    share = head_dim // positions.shape[1]
    exponents = torch.arange(0, share, 2, dtype=torch.float32, device=positions.device) / share
    angles = (positions[..., None].float() * 10000.0**-exponents).flatten(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs of neighbouring channels of ``[B, n, ..., head_dim]``.

    Args:
        rope: tables ``[n, head_dim / 2]``, or ``[B, n, head_dim / 2]`` where each item has its own.
    """
    shape = (*rope[0].shape[:-1], *[1] * (x.ndim - 3), -1)
    cos, sin = (table.view(shape).to(x.dtype) for table in rope)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class RopeAttention(nn.Module):
    """Self-attention with rotary positions.

    Args:
        qkv_bias: of the joint projection, whose rows are ordered (q, k, v), heads, head_dim.
        dropout: on the attention weights and on the output, in training.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        """``[B, T, D]`` -> the same shape; with a cache, T positions from ``position`` on, which see
        each other and all before them.

        Args:
            mask: bool, broadcasts against ``[B, heads, T, keys]``, True = sees.
        """
        qk, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).split([2, 1], dim=2)
        q, k = rotate(qk, rope).permute(2, 0, 3, 1, 4)
        v = v[:, :, 0].transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, position, k, v)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), dropout)
