"""What xAR (arXiv 2502.20388) and FlowAR (arXiv 2412.15205) share: their block, and the transformer of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ..cache import StaticCache
from .adaln import modulate
from .mlp import GatedMLP
from .rope import Rope, RopeAttention


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last axis, without scale (arXiv 1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class RopeAdaLNBlock(nn.Module):
    """Attention with rotary positions and a gated MLP, both modulated; norms without weights."""

    def __init__(
        self, dim: int, heads: int, mlp_hidden: int, qkv_bias: bool = True, dropout: float = 0.0
    ):
        super().__init__()
        self.attn = RopeAttention(dim, heads, qkv_bias, dropout)
        self.mlp = GatedMLP(dim, mlp_hidden)
        self.adaln = Linear(dim, 6 * dim)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        """``[B, ..., D]`` -> the same shape; the axes in the middle are one sequence.

        Args:
            modulation: `adaln` of the SiLU of a condition; broadcasts against x with 6 D in place of D.
            rope, mask, cache, layer, position: as in `RopeAttention`.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        h = modulate(rms_norm(x), shift1, scale1).flatten(1, -2)
        h = self.attn(h, rope, mask, cache, layer, position).view(x.shape)
        x = torch.addcmul(x, gate1, h)
        return torch.addcmul(x, gate2, self.mlp(modulate(rms_norm(x), shift2, scale2)))


class RopeAdaLNTransformer(nn.Module):
    """Two stacks of blocks, each with a table of positions: "encoder" and "decoder" (as in MAR, arXiv
    2406.11838), although both see the same tokens.

    Args:
        rope: of all positions, ``[length, head_dim / 2]``.
        dropout: in attention, in training.
    """

    def __init__(
        self,
        dim: int,
        encoder_depth: int,
        decoder_depth: int,
        heads: int,
        mlp_hidden: int,
        rope: Rope,
        dropout: float = 0.0,
    ):
        super().__init__()
        length = len(rope[0])
        self.register_buffer("cos", rope[0], persistent=False)
        self.register_buffer("sin", rope[1], persistent=False)
        self.encoder_positions = nn.Parameter(torch.zeros(length, dim))
        self.input_norm = nn.RMSNorm(dim, eps=1e-6)
        self.encoder_blocks = nn.ModuleList(
            RopeAdaLNBlock(dim, heads, mlp_hidden, dropout=dropout) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.RMSNorm(dim, eps=1e-6)
        self.decoder_embed = Linear(dim, dim)
        self.decoder_positions = nn.Parameter(torch.zeros(length, dim))
        self.decoder_blocks = nn.ModuleList(
            RopeAdaLNBlock(dim, heads, mlp_hidden, dropout=dropout) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.RMSNorm(dim, eps=1e-6)

    @property
    def blocks(self) -> list[RopeAdaLNBlock]:
        return [*self.encoder_blocks, *self.decoder_blocks]

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """Conditions ``[..., D]`` -> of each block ``[..., 6 D]``."""
        condition = F.silu(condition)
        return [block.adaln(condition) for block in self.blocks]

    def new_cache(self, batch: int) -> StaticCache:
        """For all positions of so many sequences."""
        length, dim = self.encoder_positions.shape
        heads = self.blocks[0].attn.heads
        weight = self.decoder_embed.weight
        return StaticCache(
            len(self.blocks), batch, heads, length, dim // heads, weight.dtype, weight.device
        )

    def forward(
        self,
        x: Tensor,
        modulations: list[Tensor],
        mask: Tensor | None = None,
        cache: StaticCache | None = None,
        position: int = 0,
    ) -> Tensor:
        """Inputs ``[B, ..., D]`` of the positions from ``position`` on -> the same shape.

        Args:
            modulations: of each block; broadcast as in `RopeAdaLNBlock`.
            mask, cache: as in `RopeAttention`.
        """
        here = slice(position, position + x[0, ..., 0].numel())
        shape, rope = x.shape[1:], (self.cos[here], self.sin[here])
        x = self.input_norm(x + self.encoder_positions[here].view(shape))
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            if layer == len(self.encoder_blocks):
                x = self.decoder_embed(self.encoder_norm(x))
                x = x + self.decoder_positions[here].view(shape)
            x = block(x, modulation, rope, mask, cache, layer, position)
        return self.decoder_norm(x)


def init_weights(model: nn.Module) -> None:
    """Of xAR and FlowAR: Xavier for matrices, normal 0.02 for tables and time, zero for biases."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("positions", "embedding.weight")) or ".time." in f".{name}":
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
