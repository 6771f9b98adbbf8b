"""The feed-forward part of a transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear


class MLP(nn.Module):
    """Linear, GELU, Linear.

    Args:
        approximate: "none" for the exact GELU, "tanh" for its approximation.
        dropout: after both layers, in training.
    """

    def __init__(self, dim: int, hidden: int, approximate: str = "none", dropout: float = 0.0):
        super().__init__()
        self.approximate = approximate
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.gelu(self.fc1(x), approximate=self.approximate))
        return self.dropout(self.fc2(x))
