"""Flow samplers against a Gaussian, whose velocity and whose solution are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tessera.generators.flow.samplers import (
    SAMPLERS,
    evaluation_times,
    flow_times,
    hold,
    integrate,
    num_step_draws,
    shift_times,
)
from tessera.modalities.errors import InputError

MEAN, STD = 1.5, 0.5


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[eps - x0 | x_t] where x0 is normal."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) * (x - (1 - t) * MEAN) / variance - MEAN


def run(sampler: str, steps: int, x: torch.Tensor, field=velocity) -> torch.Tensor:
    times = flow_times(sampler, steps)
    generator = torch.Generator().manual_seed(1)
    shape = (num_step_draws(sampler, times), *x.shape)
    noise = torch.randn(shape, dtype=x.dtype, generator=generator)
    *_, last = integrate(sampler, field, x, times, noise)
    return last


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence(sampler, order):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = [(run(sampler, n, x) - (MEAN + STD * x)).abs().max() for n in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert float(coarse / fine) > 2 ** (order - 0.3)


def test_the_sde_keeps_the_distribution():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = run("euler-maruyama", 60, x)
    assert abs(float(end.mean()) - MEAN) < 0.03 and abs(float(end.std()) - STD) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([x, end]))[0, 1])) < 0.3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluation_times_are_those_asked_for(sampler):
    asked = []

    def field(x, t):
        asked.append(t)
        return velocity(x, t)

    run(sampler, 5, torch.zeros(3), field)
    assert list(dict.fromkeys(asked)) == evaluation_times(sampler, flow_times(sampler, 5))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_state_a_step_in_its_own_dtype(sampler):
    times = flow_times(sampler, 4)
    x, noise = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2)
    noise = [torch.zeros(2)] * num_step_draws(sampler, times)
    states = list(integrate(sampler, lambda x, t: x.float(), x, times, noise))
    assert len(states) == 4 == len(times) - 1 and states[-1].dtype == torch.float64
    assert times[0] == 1 and times[-1] == 0


@pytest.mark.parametrize("sampler", ["euler", "heun", "midpoint"])
def test_what_is_held_ends_at_its_target(sampler):
    x, target = torch.randn(4, dtype=torch.float64), torch.tensor([7.0, -3.0, 0.0, 0.0])
    kept = torch.tensor([True, True, False, False])
    end = run(sampler, 6, x, lambda x, t: hold(velocity(x, t), x, t, target, kept))
    assert torch.allclose(end[:2], target[:2].double())
    assert torch.allclose(end[2:], run(sampler, 6, x)[2:])


def test_time_shift():
    times = flow_times("euler", 8)
    assert shift_times(times, 1.0) == times
    shifted = shift_times(times, 3.0)
    assert shifted[0] == 1 and shifted[-1] == 0
    assert all(s > t for s, t in zip(shifted[1:-1], times[1:-1], strict=True))


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match="ddim"):
        flow_times("ddim", 4)
    with pytest.raises(InputError, match="1 steps or more, got 0"):
        flow_times("heun", 0)
    with pytest.raises(InputError, match="2 steps or more, got 1"):
        flow_times("euler-maruyama", 1)
    with pytest.raises(InputError, match="got 0"):
        shift_times([1.0, 0.0], 0.0)
