"""The block of a vision transformer (Dosovitskiy et al., arXiv 2010.11929)."""

from __future__ import annotations

from torch import Tensor, nn

from .attention import SelfAttention
from .mlp import MLP


class ViTBlock(nn.Module):
    """Pre-norm self-attention and MLP with exact GELU; names of weights as in timm."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_hidden: int,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, heads, qkv_bias, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, mlp_hidden, dropout=dropout)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``, or of the positions ``rows`` alone: ``[B, n, D]``.

        Args:
            rows: int64 ``[B, n]``; in a last block, the positions that are read.
        """
        x = x + self.attn(self.norm1(x))
        if rows is not None:
            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        return x + self.mlp(self.norm2(x))
