"""The feed-forward part of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

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


class GatedMLP(nn.Module):
    """``Linear(activation(gate) * value)`` (arXiv 2002.05202): GEGLU by default, SwiGLU with `F.silu`.

    The rows of the first layer are ordered (gate, value).
    """

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(dim, 2 * hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.activation(gate) * value)
