"""From logits to a token: guidance, temperature, top-k, top-p, and one random stream an item."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..modalities.errors import InputError


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise InputError for settings that mean nothing."""
    if temperature < 0:
        raise InputError(f"Temperature must be 0 (greedy) or more, got {temperature}.")
    if top_k < 0:
        raise InputError(f"top_k must be 0 (off) or more, got {top_k}.")
    if not 0 <= top_p <= 1:
        raise InputError(f"top_p must lie in 0 (off) to 1, got {top_p}.")


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: ``u + scale (c - u)``."""
    return unconditional + scale * (conditional - unconditional)


def probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """``[B, V]`` logits -> ``[B, V]`` probabilities after temperature, then top-k, then top-p.

    ``top_k`` 0 and ``top_p`` 0 are off. Top-p drops, in ascending order, what sums to at most
    1 - top_p, and always keeps the likeliest token (Holtzman et al., arXiv 1904.09751).
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return logits.softmax(-1)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draw one id an item: int64 ``[B]``.

    ``argmax(p / e)`` with e ~ Exp(1) is a draw from p; each item's e comes from its own generator,
    so what an item draws does not depend on the batch around it. Temperature 0 is greedy.
    """
    noise = torch.stack(
        [
            torch.empty(logits.shape[-1], device=g.device).exponential_(generator=g)
            for g in generators
        ]
    ).to(logits.device)
    if temperature == 0:
        return logits.argmax(-1)
    return (probabilities(logits, temperature, top_k, top_p) / noise).argmax(-1)
