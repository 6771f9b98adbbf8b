"""ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance.

Paper: arXiv 2505.18757; no published code (written from its algorithm 1). No weights. Its closest
published relative is DivPrune (arXiv 2503.02175), which picks by the largest distance to the nearest.

Stage 1 keeps a diverse subset of the tokens, without a query. Stage 2 drops the rest of them deep in
the decoder, where text and vision no longer look at each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...modalities.errors import InputError
from .matching import check_metric, length, tile_product

# A picked token reads the samples once more: beyond this share a product of all pairs is cheaper.
GRAM_SHARE = 1 / 8


def central_token(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The token nearest to the mean, int64 ``[B]`` of ``[B, N, C]``: the pivot without attention."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if valid is None:
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mean = (wide * valid[..., None]).sum(1, keepdim=True) / valid.sum(1)[:, None, None]
    distance = (wide - mean).square().sum(-1)
    return distance.masked_fill(~valid, torch.inf).argmin(dim=1)


def select_diverse(
    x: Tensor,
    k: int,
    pivot: Tensor | None = None,
    *,
    objective: str = "sum",
    valid: Tensor | None = None,
) -> Tensor:
    """Pick k tokens one after the other, each the least similar to those before (algorithm 1).

    Args:
        x: ``[B, N, C]``; a token of norm 0 is similar to none.
        k: 1 to the number of valid tokens.
        pivot: the first pick, int64 ``[B]``; default the token nearest to the mean.
        objective: "sum" of the cosines to the picks (version 2 of the paper) or their "max"
            (version 1: k-center, farthest point).
        valid: bool ``[B, N]``.

    Returns:
        int64 ``[B, k]`` in the order of the picks; sort it for the order of the tokens.
    """
    check_metric(x, "features")
    if objective not in ("sum", "max"):
        raise InputError(f'The objective must be "sum" or "max", got "{objective}".')
    most = x.shape[1] if valid is None else int(valid.sum(1).min())
    if not 1 <= k <= most:
        raise InputError(f"k must be 1 to {most} (the valid tokens), got {k}.")
    x = x.detach()
    if pivot is None:
        pivot = central_token(x, valid)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.is_cuda:
        from .triton import select_diverse as triton_select_diverse

        return triton_select_diverse(x, k, pivot, objective, valid)
    picks = [
        _pick(x[b], k, int(pivot[b]), objective == "sum", None if valid is None else valid[b])
        for b in range(len(x))
    ]
    return torch.tensor(picks, dtype=torch.int64, device=x.device).view(len(x), k)


def _pick(x: Tensor, k: int, pivot: int, cumulative: bool, valid: Tensor | None) -> list[int]:
    norms = length(x)[:, 0]
    gram = None
    if k > GRAM_SHARE * len(x):
        normed = x / norms[:, None]
        gram = tile_product(normed[None], normed[None])[0]
    else:
        inverse = norms.reciprocal()
    picks = [pivot]
    # Picked and invalid tokens stay at infinity under both objectives.
    score = x.new_zeros(len(x)) if cumulative else x.new_full((len(x),), -torch.inf)
    if valid is not None:
        score[~valid] = torch.inf
    while len(picks) < k:
        c = picks[-1]
        cosine = gram[c] if gram is not None else torch.mv(x, x[c] * inverse[c]).mul_(inverse)
        score = score.add_(cosine) if cumulative else torch.maximum(score, cosine, out=score)
        score[c] = torch.inf
        picks.append(int(score.argmin()))
    return picks


def attention_mass(attention: Tensor) -> Tensor:
    """Mean over the rows of what they pay to the columns: ``[..., rows, columns]`` -> ``[...]``."""
    return attention.sum(dim=-1).mean(dim=-1)


def cross_modal_attention(attention: Tensor, system: int, visual: int) -> tuple[Tensor, Tensor]:
    """Stage 2: what text pays to vision, and vision to text, of probabilities averaged over heads.

    Args:
        attention: ``[..., L, L]``, the sequence being system, visual and text tokens.
        system, visual: numbers of tokens.

    Returns:
        Two ratios in [0, 1], ``[...]``. Vision goes after a layer (7/8 of the depth) in which both
        are below a threshold (0.1). `attention_columns` makes the first without the whole matrix.
    """
    text = slice(system + visual, None)
    vision = slice(system, system + visual)
    return attention_mass(attention[..., text, vision]), attention_mass(
        attention[..., vision, text]
    )
