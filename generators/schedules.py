"""Schedules over the steps of a sampler: how strong the guidance is, how much stays masked."""

from __future__ import annotations

import math

from ..modalities.errors import InputError

GUIDANCE = ("constant", "linear", "half-linear", "cosine", "power-cosine", "flipped-cosine")


def check_steps(num_steps: int, most: int | None = None) -> None:
    """Raise InputError unless a sampler can take so many steps: 1 or more, ``most`` at most."""
    if num_steps != num_steps // 1 or not 1 <= num_steps <= (num_steps if most is None else most):
        wanted = "1 step or more" if most is None else f"1 to {most} steps"
        raise InputError(f"Sampling takes {wanted}, got {num_steps}.")


def check_guidance(
    scale: float, schedule: str = "constant", power: float = 1.0, least: float = -math.inf
) -> None:
    """Raise InputError for guidance that means nothing.

    Args:
        scale, schedule, power: of `guidance_weight`.
        least: the smallest scale that a sampler takes.
    """
    if not math.isfinite(scale):
        raise InputError(f"The guidance scale must be a finite number (1 is off), got {scale}.")
    if scale < least:
        raise InputError(f"The guidance scale must be {least:g} (off) or more, got {scale}.")
    if not 0 <= power < math.inf:
        raise InputError(f"The guidance power must be 0 or more, got {power}.")
    guidance_weight(schedule, scale, 0.0, power)


def guidance_weight(schedule: str, scale: float, progress: float, power: float = 1.0) -> float:
    """The weight w of classifier-free guidance ``u + w (c - u)`` at one step.

    "constant" is ``scale``; the others are ``1 + (scale - 1) f(progress)`` with

    - linear: f(r) = r
    - half-linear: f(r) = min(2 r, 1) (Token-Shuffle, arXiv 2504.17789)
    - cosine: f(r) = (1 - cos(pi r)) / 2
    - power-cosine: f(r) = (1 - cos(pi r^power)) / 2 (Gao et al., arXiv 2303.14389); power 0 is constant
    - flipped-cosine: f(r) = cos(pi r^power) / 2

    Args:
        scale: 1 is no guidance.
        progress: 0 to 1.

    Raises:
        InputError: an unknown schedule.
    """
    if schedule == "constant":
        return scale
    if schedule == "linear":
        ramp = progress
    elif schedule == "half-linear":
        ramp = min(2 * progress, 1.0)
    elif schedule in ("cosine", "power-cosine"):
        ramp = (1 - math.cos(math.pi * progress ** (1 if schedule == "cosine" else power))) / 2
    elif schedule == "flipped-cosine":
        ramp = math.cos(math.pi * progress**power) / 2
    else:
        raise InputError(
            f'Unknown guidance schedule "{schedule}": choose one of {", ".join(GUIDANCE)}.'
        )
    return 1 + (scale - 1) * ramp


def mask_ratio(schedule: str, progress: float) -> float:
    """Share of the tokens that stay masked: "cosine" (MaskGIT, arXiv 2202.04200) or "arccos" (Muse,
    arXiv 2301.00704)."""
    if schedule == "cosine":
        return math.cos(math.pi / 2 * progress)
    return math.acos(progress) / (math.pi / 2)


def masked_counts(schedule: str, length: int, num_steps: int) -> list[int]:
    """How many of ``length`` tokens stay masked after each step.

    Every step reveals at least one token while more than one is left, and all but the last step
    keep at least one; the last entry is 1, although the last step reveals everything.

    Raises:
        InputError: fewer than 1 step.
    """
    check_steps(num_steps)
    counts, left = [], length
    for step in range(num_steps):
        wanted = math.floor(length * mask_ratio(schedule, (step + 1) / num_steps))
        left = max(1, min(left - 1, wanted))
        counts.append(left)
    return counts
