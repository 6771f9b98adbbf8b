"""Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023).

Paper: arXiv 2210.09461. Published code: facebookresearch/ToMe (CC-BY-NC 4.0; written here from the
paper). No weights of its own.

Tokens alternate between set A (even) and set B (odd). Every A token finds its most similar B token,
and the r most similar of them merge into it. In a ViT this stands between attention and MLP, with
the keys averaged over the heads as the metric, and attention weighs keys by their size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...modalities.errors import InputError
from .assignment import Assignment
from .matching import best_match, check_metric, stable_order


def bipartite_indices(
    metric: Tensor, r: int, *, cls: bool = False, distill: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Who merges with whom, as positions in A and B (section 3 of the paper).

    Args:
        metric: ``[B, N, C]``, N >= 2 beyond the protected tokens.
        r: tokens to remove, at most ``(N - protected) // 2``.
        cls, distill: token 0 / token 1 neither merges nor is merged into.

    Returns:
        int64 ``[B, NA - r]`` of A that stay (by descending score; ascending with ``cls``),
        ``[B, r]`` of A that merge (by descending score), ``[B, r]`` of B that they merge into.
    """
    position = torch.arange(metric.shape[1], device=metric.device)
    first = 1 if distill else 0
    targets = position[1::2][first:]
    best, target = best_match(metric, position[::2], targets)
    if cls:
        best[:, 0] = -torch.inf
    order = stable_order(best)
    stay, sources = order[:, r:], order[:, :r]
    if cls:
        stay = stay.sort(dim=1).values
    return stay, sources, target.gather(1, sources) + first


def match_bipartite(
    metric: Tensor, r: int, *, cls: bool = False, distill: bool = False
) -> Assignment:
    """ToMe's bipartite soft matching.

    Rows: the A tokens that stay, then all of B; with ``distill`` the class and the distillation
    token come first. A larger ``r`` than half of the unprotected tokens counts as that half.

    Args:
        metric: ``[B, N, C]``.
        r: tokens to remove, >= 0.
        cls, distill: the first token / the second token is protected.

    Returns:
        N - r rows.
    """
    check_metric(metric)
    if r < 0:
        raise InputError(f"The number of tokens to merge must be 0 or more, got {r}.")
    batch, tokens, _ = metric.shape
    r = min(r, max(tokens - cls - distill, 0) // 2)
    if r == 0:
        return Assignment.identity(batch, tokens, metric.device)
    stay, sources, targets = bipartite_indices(metric, r, cls=cls, distill=distill)
    unmerged = 2 * stay
    rep_b = torch.arange(1, tokens, 2, device=metric.device).expand(batch, -1)
    if distill:
        parts = [unmerged[:, :1], rep_b[:, :1], unmerged[:, 1:], rep_b[:, 1:]]
    else:
        parts = [unmerged, rep_b]
    return Assignment.from_merges(tokens, torch.cat(parts, 1), 2 * sources, 2 * targets + 1)


def match_kth(metric: Tensor, k: int) -> Assignment:
    """Of every k tokens in a row the last stays, and the others merge into their best match of all.

    Tokens beyond the last multiple of k are dropped. Returns N // k rows.
    """
    check_metric(metric)
    batch, tokens, _ = metric.shape
    if not 2 <= k <= tokens:
        raise InputError(f"k must be 2 to {tokens} (the number of tokens), got {k}.")
    whole = tokens - tokens % k
    groups = torch.arange(whole, device=metric.device).view(-1, k)
    sources, targets = groups[:, :-1].flatten(), groups[:, -1]
    _, target = best_match(metric, sources, targets)
    return Assignment.from_merges(
        tokens,
        targets.expand(batch, -1),
        sources.expand(batch, -1),
        targets[target],
        drops=whole < tokens,
    )


def match_random(
    metric: Tensor,
    r: int,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Assignment:
    """r random tokens merge into their best match among the others, which are the rows.

    Args:
        noise: ``[B, N]`` in place of the draw; the r lowest are the sources.
    """
    check_metric(metric)
    batch, tokens, _ = metric.shape
    if not 0 <= r < max(tokens, 1):
        raise InputError(f"The number of tokens to merge must be 0 to {tokens - 1}, got {r}.")
    if noise is None:
        device = metric.device if generator is None else generator.device
        noise = torch.rand(batch, tokens, generator=generator, device=device).to(metric.device)
    order = noise.argsort(dim=1, stable=True)
    sources, rest = order[:, :r], order[:, r:]
    _, target = best_match(metric, sources, rest)
    return Assignment.from_merges(tokens, rest, sources, rest.gather(1, target))


def merge_schedule(r: int | tuple[int, float] | Sequence[int], layers: int) -> list[int]:
    """Tokens to remove in each layer (section 3 and appendix D).

    Args:
        r: a constant; (r, f) with f in [-1, 1], a line from ``r (1 - f)`` whose mean is r; or a
            list, filled up with zeros.
    """
    if isinstance(r, int):
        return [r] * layers
    if isinstance(r, tuple):
        middle, inflection = r
        if not -1 <= inflection <= 1:
            raise InputError(f"The inflection must be in [-1, 1], got {inflection}.")
        low = int(middle * (1 - inflection))
        step = (2 * middle - 2 * low) / max(layers - 1, 1)
        return [int(low + step * layer) for layer in range(layers)]
    if len(r) > layers:
        raise InputError(f"The schedule has {len(r)} entries for {layers} layers.")
    return [*r, *[0] * (layers - len(r))]
