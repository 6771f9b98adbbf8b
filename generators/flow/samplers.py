"""Samplers of flow matching: ODE (Euler, Heun, midpoint) and SDE (Euler-Maruyama), and their times.

Papers: Flow Matching, arXiv 2210.02747; Rectified Flow, arXiv 2209.03003; SiT (the SDE), arXiv
2401.08740; time shift, arXiv 2403.03206.

Noise is at time 1, data at time 0: ``x_t = (1 - t) x_0 + t eps``, and a network predicts the velocity
``v = eps - x_0``. Times are Python floats that fall from 1 to 0; the state keeps its own dtype, which is
float64 where a published sampler's is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...modalities.errors import InputError

Velocity = Callable[[Tensor, float], Tensor]
SAMPLERS = ("euler", "heun", "midpoint", "euler-maruyama")


def linspace(start: float, end: float, count: int) -> list[float]:
    """``count`` evenly spaced numbers in float64, both ends among them."""
    return torch.linspace(start, end, count, dtype=torch.float64).tolist()


def flow_times(sampler: str, num_steps: int) -> list[float]:
    """The ``num_steps + 1`` times of a sampler, evenly spaced.

    The SDE goes down to 0.04 evenly and then to 0 in one step, since its score divides by t.

    Raises:
        InputError: an unknown sampler, or too few steps for it.
    """
    check_sampler(sampler)
    fewest = 2 if sampler == "euler-maruyama" else 1
    if num_steps < fewest:
        raise InputError(f'The sampler "{sampler}" takes {fewest} steps or more, got {num_steps}.')
    if sampler == "euler-maruyama":
        return [*linspace(1, 0.04, num_steps), 0.0]
    return linspace(1, 0, num_steps + 1)


def shift_times(times: Sequence[float], shift: float) -> list[float]:
    """``t -> s t / (1 + (s - 1) t)``: above 1, more steps are spent where there is much noise.

    Raises:
        InputError: a shift that is not positive.
    """
    if not 0 < shift < math.inf:
        raise InputError(f"The time shift must be positive (1 = none), got {shift}.")
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def check_sampler(sampler: str) -> None:
    """Raise InputError unless the sampler is one of `SAMPLERS`."""
    if sampler not in SAMPLERS:
        raise InputError(f'Unknown sampler "{sampler}": choose one of {", ".join(SAMPLERS)}.')


def _middle(t: float, t_next: float) -> float:
    return (t + t_next) / 2


def evaluation_times(sampler: str, times: Sequence[float]) -> list[float]:
    """The times at which a sampler asks for the velocity: what depends on them can be computed before."""
    check_sampler(sampler)
    if sampler == "midpoint":
        return [u for t, t_next in pairwise(times) for u in (t, _middle(t, t_next))]
    return list(times[:-1])


def num_step_draws(sampler: str, times: Sequence[float]) -> int:
    """How many draws of noise a sampler adds on its way."""
    check_sampler(sampler)
    return len(times) - 2 if sampler == "euler-maruyama" else 0


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Order 1, one evaluation a step."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
        yield x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Order 2: the mean of the velocities at both ends of a step. The last step, which leads to time 0,
    is Euler's (as in arXiv 2206.00364, algorithm 1)."""
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        if t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
        yield x


def midpoint(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Order 2, two evaluations a step: the velocity in its middle."""
    for t, t_next in pairwise(times):
        middle = _middle(t, t_next)
        x = x + (t_next - t) * velocity(x + (middle - t) * velocity(x, t), middle)
        yield x


def euler_maruyama(
    velocity: Velocity, x: Tensor, times: Sequence[float], noise: Sequence[Tensor]
) -> Iterator[Tensor]:
    """The reverse SDE with diffusion ``g^2 = 2 t`` (SiT, section 3); the last step adds no noise.

    With the score ``-((1 - t) v + x) / t`` its drift ``v - g^2 score / 2`` is ``(2 - t) v + x``.

    Args:
        noise: normal, one of x's shape a step but the last.
    """
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * ((2 - t) * velocity(x, t) + x)
        if step + 2 < len(times):
            x = x + math.sqrt(2 * t * (t - t_next)) * noise[step]
        yield x


def integrate(
    sampler: str, velocity: Velocity, x: Tensor, times: Sequence[float], noise: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield the state after every step; the last one is the sample.

    Args:
        sampler: one of `SAMPLERS`.
        velocity: of a state at one of `evaluation_times`.
        x: noise, the state at ``times[0]``.
        noise: `num_step_draws` draws of x's shape; only the SDE reads them.
    """
    check_sampler(sampler)
    if sampler == "euler-maruyama":
        return euler_maruyama(velocity, x, times, noise)
    return {"euler": euler, "heun": heun, "midpoint": midpoint}[sampler](velocity, x, times)


def hold(v: Tensor, x: Tensor, t: float, target: Tensor, kept: Tensor) -> Tensor:
    """Replace the velocity where the data is known: it leads from x straight to ``target``.

    Args:
        kept: bool, broadcasts against v; True = known.
    """
    return torch.where(kept, (x - target) / t, v)
