"""Token Merging for Fast Stable Diffusion (Bolya & Hoffman, CVPR 2023 workshop).

Paper: arXiv 2303.17604. Published code: dbolya/tomesd (MIT). No weights of its own.

One token of every cell of the picture is a destination; of the others the r most similar ones merge
into their best destination before a sub-layer and get a copy of its output after it. The residual
stream keeps its length. `apply_token_merging` puts this into a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...modalities.errors import InputError
from .assignment import Assignment
from .matching import best_match, check_metric, stable_order


def grid_split(
    hw: tuple[int, int], stride: tuple[int, int], offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Sources and destinations of a raster grid, in ascending order, int64 ``[S]`` and ``[T]``.

    Args:
        hw: rows and columns of the grid.
        stride: rows and columns of a cell; what no whole cell covers is a source.
        offset: int64 ``[h // stride, w // stride]``, which token of its cell, row by row, is the
            destination.
    """
    (rows, columns), (sy, sx) = hw, stride
    cell_rows = torch.arange(rows // sy, device=offset.device)[:, None] * sy
    cell_columns = torch.arange(columns // sx, device=offset.device) * sx
    chosen = (cell_rows + offset // sx) * columns + cell_columns + offset % sx
    is_source = torch.ones(rows * columns, dtype=torch.bool, device=offset.device)
    is_source[chosen.flatten()] = False
    return is_source.nonzero().flatten(), chosen.flatten().sort().values


def grid_indices(
    metric: Tensor, r: int, sources: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions in ``sources`` that stay and that merge, by descending score, and in ``targets``."""
    best, target = best_match(metric, sources, targets)
    order = stable_order(best)
    return order[:, r:], order[:, :r], target.gather(1, order[:, :r])


def match_grid(
    metric: Tensor,
    hw: tuple[int, int],
    r: int,
    *,
    stride: tuple[int, int] = (2, 2),
    offset: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Assignment:
    """Matching with one destination in each cell of a grid.

    Rows: the sources that stay by descending score, then the destinations in raster order. A larger
    ``r`` than there are sources counts as all of them.

    Args:
        metric: ``[B, h * w, C]``, tokens in raster order.
        hw: rows and columns.
        r: tokens to remove, >= 0.
        stride: rows and columns of a cell.
        offset: int64 ``[h // stride, w // stride]``, the destination in each cell; default the
            first, or a draw from ``generator``; the whole batch shares it.

    Returns:
        h * w - r rows.
    """
    check_metric(metric)
    batch, tokens, _ = metric.shape
    (rows, columns), (sy, sx) = hw, stride
    if rows * columns != tokens:
        raise InputError(f"A grid of {rows} x {columns} has not {tokens} tokens: check hw.")
    if not (1 <= sy <= rows and 1 <= sx <= columns):
        raise InputError(f"Cells of {sy} x {sx} do not fit into {rows} x {columns} tokens.")
    if r < 0:
        raise InputError(f"The number of tokens to merge must be 0 or more, got {r}.")
    cells = (rows // sy, columns // sx)
    r = min(r, tokens - cells[0] * cells[1])
    if r == 0:
        return Assignment.identity(batch, tokens, metric.device)
    if offset is None and generator is not None:
        offset = torch.randint(sy * sx, cells, generator=generator, device=generator.device)
    if offset is None:
        offset = torch.zeros(cells, dtype=torch.int64)
    elif offset.shape != cells:
        raise InputError(f"The offset must be {list(cells)}, got {list(offset.shape)}.")
    sources, targets = grid_split(hw, stride, offset.to(metric.device))
    stay, merged, target = grid_indices(metric, r, sources, targets)
    rep = torch.cat([sources[stay], targets.expand(batch, -1)], dim=1)
    return Assignment.from_merges(tokens, rep, sources[merged], targets[target])
