"""In which order a generator writes its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def raster_order(batch: int, length: int, device: torch.device | None = None) -> Tensor:
    """``0, 1, ..., length - 1`` for every item, int64 ``[B, length]``."""
    return torch.arange(length, device=device).expand(batch, -1)


def random_order(
    length: int, generators: Sequence[torch.Generator], device: torch.device | None = None
) -> Tensor:
    """One permutation an item from its own generator, int64 ``[B, length]``."""
    return torch.stack(
        [torch.randperm(length, generator=g, device=g.device) for g in generators]
    ).to(device)


def cell_order(side: int, cell: int, device: torch.device | None = None) -> Tensor:
    """Square cells of a square grid in raster order, and the tokens of each in raster order.

    Args:
        side, cell: tokens along the grid and along a cell, which divides it.

    Returns:
        int64 ``[side * side]``, the place in the raster of the i-th token.
    """
    count = side // cell
    places = torch.arange(side * side, device=device).view(count, cell, count, cell)
    return places.transpose(1, 2).flatten()
