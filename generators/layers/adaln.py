"""Adaptive layer normalisation (Peebles & Xie, arXiv 2212.09748)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ..cache import StaticCache
from .attention import SelfAttention
from .mlp import MLP


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis, without scale and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift``; the three broadcast against each other."""
    return torch.addcmul(shift, x, 1 + scale)


class CausalAdaLNBlock(nn.Module):
    """Causal block whose every position is modulated by a vector of its own.

    Norms with scale and bias, normalised queries and keys, an MLP with exact GELU. Shared by RAR and
    the dimension-wise head of TokenBridge.
    """

    def __init__(self, dim: int, heads: int, mlp_hidden: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, qk_norm=True, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_hidden, dropout=dropout)
        self.adaln = Linear(dim, 6 * dim)

    def modulation(self, condition: Tensor) -> Tensor:
        """SiLU of the conditions ``[B, T, D]`` -> ``[B, T, 6 D]`` for `forward`."""
        return self.adaln(condition)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        """``[B, T, D]`` -> the same shape; a cache is used as in `SelfAttention`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = torch.addcmul(x, gate1, self.attn(h, True, cache, layer, position))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))
