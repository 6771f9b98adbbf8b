"""Accelerating Transformers with Spectrum-Preserving Token Merging (Tran et al., NeurIPS 2024).

Paper: arXiv 2405.16148. Published code: hchautran/PiToMe (CC-BY-NC 4.0; written here from the
paper). No weights of its own.

A token's energy says how large its cluster is. The tokens of most energy merge; isolated ones are
protected. The published ViTs use the "bsm" variant in the first half of their layers and "split" in
the rest, with a margin that falls linearly over the layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...modalities.errors import InputError
from .assignment import Assignment
from .matching import best_match, check_metric, similarity_energy, stable_order

VARIANTS = ("split", "bsm", "text")


def energy_sets(order: Tensor, r: int, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sets A and B and the protected tokens out of ``order [B, T]``, by descending energy."""
    if variant == "bsm":
        return order[:, ::2], order[:, 1::2], order[:, :0]
    if variant == "text":
        return order[:, :r], order[:, r : 2 * r], order[:, 2 * r :]
    return order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]


def energy_indices(
    metric: Tensor, r: int, margin: float, alpha: float = 1.0, variant: str = "split"
) -> dict[str, Tensor]:
    """Energies and matching of the tokens ``[B, T, C]`` without a class token.

    Returns:
        "energy" ``[B, T]``, "order" ``[B, T]`` by descending energy, "a" and "b" (tokens of both
        sets), "protected" (tokens), "stay" and "merged" (positions in a, by descending score for
        "bsm") and "target" (positions in b).
    """
    kernel = "gauss" if variant == "text" else "elu"
    energy = similarity_energy(metric, kernel, margin, alpha)
    order = stable_order(energy)
    a, b, protected = energy_sets(order, r, variant)
    best, target = best_match(metric, a, b)
    if variant == "bsm":
        by_score = stable_order(best)
        stay, merged = by_score[:, r:], by_score[:, :r]
    else:
        merged = torch.arange(r, device=metric.device).expand(len(metric), r)
        stay = merged[:, :0]
    return {
        "energy": energy,
        "order": order,
        "a": a,
        "b": b,
        "protected": protected,
        "stay": stay,
        "merged": merged,
        "target": target.gather(1, merged),
    }


def match_energy(
    metric: Tensor,
    keep: float,
    margin: float,
    *,
    alpha: float = 1.0,
    variant: str = "split",
    cls: bool = False,
) -> tuple[Assignment, Tensor]:
    """Energy-based matching.

    Rows: the class token, the protected tokens by descending energy ("bsm": those of A that stay by
    descending score), then B by descending energy. At most half of the tokens merge.

    Args:
        metric: ``[B, N, C]``.
        keep: share of the tokens without the class token that stays, in (0, 1]; 1 = the identity.
        margin: of the energy; for "text" 1 - its deviation, below 1.
        variant: "split" merges even ranks of the 2r tokens of most energy into odd ones, "bsm" the r
            most similar pairs of all even and odd ranks, "text" the first r into the next r.
        cls: the first token is passed on untouched.

    Returns:
        The assignment, and the energies ``[B, N - cls]``.
    """
    check_metric(metric)
    if not 0 < keep <= 1:
        raise InputError(f"The share of tokens to keep must be above 0 and at most 1, got {keep}.")
    if variant not in VARIANTS:
        raise InputError(f'The variant "{variant}" is none of {", ".join(VARIANTS)}.')
    if variant == "text" and margin >= 1:
        raise InputError(f'The margin of the "text" variant must be below 1, got {margin}.')
    batch, tokens, _ = metric.shape
    inner = metric[:, 1:] if cls else metric
    count = inner.shape[1]
    r = min(math.floor(count - count * keep), count // 2)
    if r == 0:
        kernel = "gauss" if variant == "text" else "elu"
        energy = similarity_energy(inner, kernel, margin, alpha)
        return Assignment.identity(batch, tokens, metric.device), energy
    m = energy_indices(inner, r, margin, alpha, variant)
    kept = [m["protected"], m["a"].gather(1, m["stay"]), m["b"]]
    rep = torch.cat(kept, dim=1) + cls
    if cls:
        rep = torch.cat([torch.zeros_like(rep[:, :1]), rep], dim=1)
    sources, targets = m["a"].gather(1, m["merged"]) + cls, m["b"].gather(1, m["target"]) + cls
    return Assignment.from_merges(tokens, rep, sources, targets), m["energy"]
