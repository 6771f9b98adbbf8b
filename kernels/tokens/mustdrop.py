"""Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model (MustDrop).

Paper: arXiv 2411.10803. Published code: liuting20/MustDrop (Apache-2.0 by its README). No weights.

Stage 1 merges windows of similar tokens in the vision encoder and marks key tokens; stage 2 drops
vision tokens in the prefill to which text pays nothing, all in all and at its most; stage 3 cuts the
caches of the earlier layers to the final set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...modalities.errors import InputError
from .assignment import Assignment
from .matching import check_metric, stable_order, unit


def window_similarity(x: Tensor, hw: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Mean cosine of the pairs in each window, ``[B, h * w, C]`` -> ``[B, windows]`` row by row.

    The sum over all pairs is the squared norm of the sum of the unit vectors, so no pair is made.
    """
    (rows, columns), (wy, wx) = hw, window
    normed = unit(x).unflatten(1, (rows // wy, wy, columns // wx, wx))
    area = wy * wx
    total = normed.sum(dim=(2, 4)).square().sum(-1) - normed.square().sum(dim=(2, 4, 5))
    return (total / (area * (area - 1))).flatten(1)


def match_windows(
    x: Tensor,
    hw: tuple[int, int],
    window: tuple[int, int] = (3, 3),
    threshold: float = 0.8,
    *,
    cls: bool = True,
) -> Assignment:
    """Stage 1: windows whose mean cosine reaches the threshold become one token.

    Rows: the class token, the merged windows by descending similarity (each represented by its
    bottom-right token), then the other tokens in raster order. Of a batch, every image merges as
    many windows as the one with the fewest.

    Args:
        x: ``[B, cls + h * w, C]``.
        hw: rows and columns of the grid, multiples of the window's.
        cls: the first token is passed on untouched.
    """
    check_metric(x, "x")
    (rows, columns), (wy, wx) = hw, window
    if wy < 1 or wx < 1 or wy * wx < 2 or rows % wy or columns % wx:
        raise InputError(f"Windows of {wy} x {wx} do not tile a grid of {rows} x {columns}.")
    batch, tokens, _ = x.shape
    if tokens != rows * columns + cls:
        raise InputError(f"A grid of {rows} x {columns} has not {tokens - cls} tokens: check hw.")
    similarity = window_similarity(x[:, int(cls) :].detach(), hw, window)
    r = int((similarity >= threshold).sum(dim=1).min())
    place = torch.arange(rows * columns, device=x.device) + int(cls)
    windows = place.view(rows // wy, wy, columns // wx, wx).transpose(1, 2).flatten(2).flatten(0, 1)
    merged = windows[stable_order(similarity)[:, :r]]
    targets = merged[..., -1:]
    rest = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
    rest.scatter_(1, merged.flatten(1), False)
    rest[:, : int(cls)] = False
    rest = rest.nonzero()[:, 1].view(batch, -1)
    head = torch.zeros(batch, int(cls), dtype=torch.int64, device=x.device)
    rep = torch.cat([head, targets.flatten(1), rest], dim=1)
    sources = merged[..., :-1]
    return Assignment.from_merges(
        tokens, rep, sources.flatten(1), targets.expand_as(sources).flatten(1)
    )


def key_tokens(attention: Tensor, fraction: float = 0.08) -> Tensor:
    """Stage 1: the patches to which the class token pays most, which stage 2 keeps.

    Args:
        attention: of the class token, averaged over the heads, ``[B, patches]``.

    Returns:
        int64 ``[B, ceil(fraction * patches)]``, ascending.
    """
    count = math.ceil(fraction * attention.shape[1])
    return stable_order(attention)[:, :count].sort(dim=1).values


def select_attention(
    attention: Tensor,
    global_threshold: float,
    individual_threshold: float,
    protect: Tensor | None = None,
) -> Tensor:
    """Stage 2: which vision tokens stay.

    A token goes if its share of all that text pays to vision is below the first threshold, and no
    text token pays it the second one.

    Args:
        attention: text rows, vision columns, averaged over the heads, ``[B, t, v]``
            (`attention_columns` makes it from queries and keys).
        protect: key tokens, int64 ``[B, n]``, kept anyway.

    Returns:
        bool ``[B, v]``.
    """
    if attention.ndim != 3:
        raise InputError(f"The attention must be [B, text, vision], got {list(attention.shape)}.")
    total = attention.sum(dim=1)
    low = total < global_threshold * total.sum(dim=1, keepdim=True)
    keep = ~(low & (attention.amax(dim=1) < individual_threshold))
    return keep if protect is None else keep.scatter(1, protect, True)


def final_kept(kept: Sequence[Tensor]) -> list[Tensor]:
    """Stage 3: what of each pruning layer's input is still there at the end.

    Args:
        kept: of each pruning layer in turn, the indices that stay, int64 ``[n_i]``.

    Returns:
        For each, the indices of its input that the last layer still has; with them the caches of
        the layers up to it are cut.
    """
    final = list(kept)
    for i in range(len(final) - 2, -1, -1):
        final[i] = final[i][final[i + 1]]
    return final
