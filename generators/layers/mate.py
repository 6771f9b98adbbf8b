"""MATE, the block of LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear
Computational Complexity (Wang et al., CVPR 2025, arXiv 2412.09856).

No code and no weights are published; what the paper leaves open is decided here. A bidirectional
Mamba-2 (Hydra) scans the grid in an order that rotates from layer to layer (rotary major scan), after
a few pooled tokens of the whole (review tokens); attention inside shifted windows (temporal Swin
attention) repairs what a scan tears apart. Their sum takes the place of self-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modalities.errors import InputError
from .attention_mixer import WindowAttention
from .hydra import Hydra
from .mixer import ORDERS, TokenMixer


class MATE(TokenMixer):
    """Hydra plus window attention, both linear in the number of tokens.

    Args:
        dim: width D.
        layer: index in the stack: the scan's order is ``ORDERS[layer % 4]``, and windows of odd
            layers are shifted.
        head_dim: of the attention's heads.
        window: of the attention, tokens along (t, h, w).
        review_window: tokens along (t, h, w) that one review token averages.
        review_tokens_from: shortest sequence that gets review tokens; grids of fewer than 8 frames
            never do.
        d_state, d_conv, expand, headdim: of `Hydra`.
    """

    def __init__(
        self,
        dim: int,
        layer: int = 0,
        head_dim: int = 64,
        window: tuple[int, int, int] = (16, 4, 4),
        review_window: tuple[int, int, int] = (4, 4, 4),
        review_tokens_from: int = 4096,
        d_state: int = 128,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int = 64,
    ):
        super().__init__()
        self.scan = Hydra(dim, d_state, d_conv, expand, headdim)
        self.attention = WindowAttention(dim, head_dim, window, shifted=layer % 2 == 1)
        self.order = ORDERS[layer % len(ORDERS)]
        self.review_window, self.review_tokens_from = tuple(review_window), review_tokens_from
        self.review_embed = nn.Parameter(torch.zeros(dim))

    def review(self, x: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor | None, tuple | None]:
        """Pooled tokens ``[B, R, D]`` and their grid; windows that the border cuts average the rest.

        They come before the others in both directions: a scan starts with a view of the whole.
        """
        if x.shape[1] < self.review_tokens_from or grid[0] < 8:
            return None, None
        pooled = F.avg_pool3d(
            x.transpose(1, 2).unflatten(2, grid),
            tuple(map(min, self.review_window, grid)),
            ceil_mode=True,
            count_include_pad=False,
        )
        tokens = pooled.flatten(2).transpose(1, 2) + self.review_embed
        return tokens, tuple(pooled.shape[2:])

    def forward(
        self, x, *, grid=None, order=None, seq_idx=None, state=None, return_state=False
    ) -> Tensor:
        """As `TokenMixer.forward`; ``order`` in place of the layer's own.

        Raises:
            InputError: no grid, a state, or packed documents.
        """
        if grid is None:
            raise InputError("MATE needs grid=(t, h, w).")
        if state is not None or return_state or seq_idx is not None:
            raise InputError("MATE sees one whole grid: it takes no state and no packed documents.")
        prefix, prefix_grid = self.review(x, grid)
        scanned = self.scan(
            x, grid=grid, order=order or self.order, prefix=prefix, prefix_grid=prefix_grid
        )
        return scanned + self.attention(x, grid=grid)

    def flops(self, tokens: int) -> int:
        t, h, w = self.review_window
        review = tokens // (t * h * w) if tokens >= self.review_tokens_from else 0
        return self.scan.flops(tokens + review) + self.attention.flops(tokens)
