"""Multi-head self-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ..cache import StaticCache


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Queries ``[B, heads, T, head_dim]`` of the last T of L places attend to those up to their own."""
    count, length = q.shape[2], k.shape[2]
    if count in (1, length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=count > 1, dropout_p=dropout)
    mask = torch.ones(count, length, dtype=torch.bool, device=q.device).tril(length - count)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Softmax attention with scale ``head_dim ** -0.5``.

    Args:
        qkv_bias: of the joint projection, whose rows are ordered (q, k, v), heads, head_dim.
        qk_norm: LayerNorm over the width of a head on queries and keys (Dehghani et al.,
            arXiv 2302.05442).
        dropout: on the attention weights and on the output, in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // heads, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=eps) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        """``[B, T, D]`` -> the same shape.

        With a cache, ``x`` holds the positions from ``position`` on, which attend to the cached ones
        before them.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            k, v = cache.update(layer, position, k, v)
        dropout = self.dropout if self.training else 0.0
        if causal:
            x = causal_attention(q, k, v, dropout)
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), dropout)
