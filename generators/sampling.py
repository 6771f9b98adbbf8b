"""From logits to a token: guidance, temperature, top-k, top-p, and one random stream an item."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..modalities.errors import InputError


def check_sampling(temperature: float, top_k: int | None = None, top_p: float = 1.0) -> None:
    """Raise InputError for settings that mean nothing."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"Temperature must be 0 (greedy) or more, got {temperature}.")
    if top_k is not None and (isinstance(top_k, bool) or top_k != top_k // 1 or top_k < 1):
        raise InputError(f"top_k must be a whole number of 1 or more, or None (off), got {top_k}.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must lie above 0 and up to 1 (off), got {top_p}.")


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: ``u + scale (c - u)``."""
    return unconditional + scale * (conditional - unconditional)


def probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """``[..., V]`` logits -> ``[..., V]`` probabilities after temperature, then top-k, then top-p.

    ``top_k`` None and ``top_p`` 1 are off. Top-p drops, in ascending order, what sums to at most
    1 - top_p, and always keeps the likeliest token (Holtzman et al., arXiv 1904.09751).
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits.softmax(-1)


def check_generators(generators: Sequence[torch.Generator], batch: int) -> None:
    """Raise InputError unless there is one generator an item."""
    if len(generators) != batch:
        raise InputError(f"Give one random generator an item: {batch}, got {len(generators)}.")


def check_given(
    tokens: Tensor | None, token_mask: Tensor | None, batch: int, length: int, vocab_size: int
) -> None:
    """Raise InputError unless given ids ``[B, n]``, n <= length, come with a mask of that shape.

    Ids beside the mask are not read.
    """
    if tokens is None and token_mask is None:
        return
    if tokens is None or token_mask is None:
        raise InputError("Give tokens together with token_mask, True where they are kept.")
    if tokens.shape != token_mask.shape or len(tokens) != batch or not tokens.shape[1] <= length:
        raise InputError(
            f"tokens and token_mask must both have the shape [{batch}, 1 to {length}], got "
            f"{list(tokens.shape)} and {list(token_mask.shape)}."
        )
    check_mask(token_mask)
    check_ids(tokens.masked_fill(~token_mask, 0), vocab_size)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise InputError unless ids are whole numbers of 0 to ``vocab_size - 1``."""
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise InputError(
            f"Token ids must be whole numbers, got {str(ids.dtype).removeprefix('torch.')}."
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise InputError(
            f"Token ids must lie in 0 to {vocab_size - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}."
        )


def check_mask(mask: Tensor) -> None:
    """Raise InputError unless a mask is bool."""
    if mask.dtype != torch.bool:
        raise InputError(
            f"token_mask must be bool (True = kept), got {str(mask.dtype).removeprefix('torch.')}."
        )


def check_given_latents(
    tokens: Tensor | None, token_mask: Tensor | None, shape: tuple[int, int, int]
) -> None:
    """Raise InputError unless given continuous tokens ``[B, N, C]`` come with a mask ``[B, N]``."""
    if tokens is None and token_mask is None:
        return
    if tokens is None or token_mask is None:
        raise InputError("Give tokens together with token_mask, True where they are kept.")
    if tuple(tokens.shape) != shape or tuple(token_mask.shape) != shape[:2]:
        raise InputError(
            f"tokens and token_mask must have the shapes {list(shape)} and {list(shape[:2])}, got "
            f"{list(tokens.shape)} and {list(token_mask.shape)}."
        )
    check_mask(token_mask)
    if not bool(tokens.isfinite().all(-1).logical_or(~token_mask).all()):
        raise InputError("Kept tokens must be finite numbers, got NaN or infinity.")


def draw(
    distribution: str,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device,
) -> Tensor:
    """Float32 draws ``[B, *shape]``, every item's from its own generator.

    What an item draws does not depend on the batch around it.

    Args:
        distribution: "normal", "uniform" (0 to 1) or "exponential" (rate 1).
    """
    rows = [
        getattr(torch.empty(*shape, device=g.device), f"{distribution}_")(generator=g)
        for g in generators
    ]
    return torch.stack(rows).to(device)


def gumbel(uniform: Tensor) -> Tensor:
    """Draws from U(0, 1) -> standard Gumbel noise ``-log(-log(u))``, finite for every u."""
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generators: Sequence[torch.Generator],
    noise: Tensor | None = None,
) -> Tensor:
    """Draw one id an item and codebook: logits ``[B, ..., V]`` -> int64 ``[B, ...]``.

    ``argmax(p / e)`` with e ~ Exp(1) is a draw from p; each item's e comes from its own generator.
    Temperature 0 is greedy.

    Args:
        noise: e ``[B, ..., V]`` itself, in place of the generators.
    """
    if noise is None:
        noise = draw("exponential", logits.shape[1:], generators, logits.device)
    if temperature == 0:
        return logits.argmax(-1)
    return (probabilities(logits, temperature, top_k, top_p) / noise).argmax(-1)
