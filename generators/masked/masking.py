"""Masked generative image modelling (MaskGIT, arXiv 2202.04200): what its systems share.

Training hides a random share of the tokens. Sampling starts with all of them hidden; every step draws
all hidden ones at once and hides those of least confidence again. The variant here is Muse's
(arXiv 2301.00704): arccos schedule, Gumbel noise on logits and on confidences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling import check_given, draw, gumbel
from ..schedules import masked_counts


def random_mask(tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Which tokens of ``[B, N]`` training hides: bool ``[B, N]``.

    Of each item a share of arccos(t) 2/pi with t ~ U(0, 1), at least one token, anywhere.
    """
    batch, length = tokens.shape
    random = {"generator": generator, "device": tokens.device}
    ratio = torch.rand(batch, 1, **random).acos() / (math.pi / 2)
    count = (length * ratio).round().clamp(min=1)
    return torch.rand(batch, length, **random).argsort(dim=1) < count


def normal_mask_ratio(generator: torch.Generator | None, device: torch.device) -> float:
    """The share of tokens that MAR (arXiv 2406.11838) hides in training, one for a batch.

    Normal of mean 1 and deviation 0.25 cut to [0.7, 1], drawn through its distribution function.
    """
    share = torch.rand((), generator=generator, device=device) * math.erf(1.2 / math.sqrt(2))
    return 1 - 0.25 * math.sqrt(2) * float(torch.erfinv(share))


def masked_loss(
    logits: Tensor, tokens: Tensor, masked: Tensor, label_smoothing: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy ``[B, N, V]`` against ids ``[B, N]``; hidden tokens weigh 1, visible ones 0.1."""
    each = F.cross_entropy(
        logits.float().flatten(0, 1),
        tokens.flatten(),
        reduction="none",
        label_smoothing=label_smoothing,
    ).view(tokens.shape)
    weight = torch.where(masked, 1.0, 0.1)
    hit = (logits.argmax(-1) == tokens)[masked].float().mean()
    loss = (each * weight).sum() / weight.sum()
    return loss, {"masked_nll": each[masked].mean().detach(), "masked_accuracy": hit}


def start(
    batch: int,
    length: int,
    vocab_size: int,
    num_steps: int,
    device: torch.device,
    tokens: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The state before the first step.

    Args:
        tokens, token_mask: ids ``[B, n]`` kept where the mask is True (in-painting).

    Returns:
        ids ``[B, length]``, which of them are hidden, and how many stay hidden after each step, int64
        ``[num_steps, B]``.
    """
    check_given(tokens, token_mask, batch, length, vocab_size)
    ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
    masked = torch.ones(batch, length, dtype=torch.bool, device=device)
    if tokens is not None:
        count = tokens.shape[1]
        masked[:, :count] = ~token_mask
        ids[:, :count] = tokens.masked_fill(~token_mask, 0)
    hidden = masked.sum(1).tolist()
    schedules = {count: masked_counts("arccos", count, num_steps) for count in set(hidden)}
    counts = torch.tensor([schedules[count] for count in hidden], device=device)
    return ids, masked, counts.T


def sample_masked(
    logits: Tensor, ids: Tensor, masked: Tensor, temperature: float, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw the hidden ids; the visible ones stay.

    Args:
        logits: ``[B, N, V]``.
        temperature: of the Gumbel noise; 0 takes the likeliest.
        uniform: draws from U(0, 1) of the same shape.

    Returns:
        ids ``[B, N]`` and their scores ``[B, N]``: the logit of a drawn one, infinity of a visible one.
    """
    drawn = (logits + temperature * gumbel(uniform)).argmax(-1)
    score = logits.gather(-1, drawn[..., None])[..., 0]
    return torch.where(masked, drawn, ids), score.masked_fill(~masked, torch.inf)


def mask_lowest(score: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
    """Which tokens are hidden again: the ``counts`` ``[B]`` of lowest score, equal ones together."""
    threshold = score.sort(dim=1).values.gather(1, counts[:, None] - 1)
    return (score <= threshold) & masked


def draw_uniforms(
    length: int, vocab_size: int, generators: Sequence[torch.Generator], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The draws of one step: for the ids ``[B, N, V]``, for their confidence ``[B, N]``."""
    return (
        draw("uniform", (length, vocab_size), generators, device),
        draw("uniform", (length,), generators, device),
    )
