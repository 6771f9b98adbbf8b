"""The diffusion process and MAR's head."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.flow import diffusion_head
from tessera.generators.flow.diffusion import GaussianDiffusion, spaced_timesteps
from tessera.generators.flow.diffusion_head import DiffusionHead
from tessera.generators.sampling import guide
from tessera.modalities.errors import InputError

T, C, D = 7, 4, 10


@pytest.fixture(scope="module")
def head() -> DiffusionHead:
    torch.manual_seed(0)
    head = DiffusionHead(latent_dim=C, condition_dim=D, dim=16, depth=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head.eval()


@pytest.fixture
def process() -> GaussianDiffusion:
    return GaussianDiffusion(spaced_timesteps(T))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_kept_timesteps_hold_both_ends():
    assert spaced_timesteps(5, 9) == [0, 2, 4, 6, 8]
    kept = spaced_timesteps(100)
    assert (kept[0], kept[-1], len(set(kept))) == (0, 999, 100)
    for count in (1, 1001):
        with pytest.raises(InputError, match=f"2 to 1000 steps, got {count}"):
            spaced_timesteps(count)


def test_the_process_goes_from_signal_to_noise():
    kept = GaussianDiffusion().alphas_cumprod
    assert kept[0] > 0.9999 and kept[-1] < 1e-6 and (kept.diff() < 0).all()


@pytest.mark.parametrize("fraction", [-1.0, 0.3, 1.0])
def test_with_the_true_noise_predicted_sampling_ends_at_the_clean_tokens(process, fraction):
    x0, x = randn(5, C), randn(6, C)[:5]
    for step in reversed(range(T)):
        abar = process.alphas_cumprod[step].float()
        noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        output = torch.cat([noise, torch.full_like(noise, fraction)], dim=1)
        x = process.step(output, x, step, randn(5, C))
    assert torch.allclose(x, x0, atol=1e-3)


def test_the_variance_lies_between_its_bounds(process):
    """Step by step: x at t, then a step back, is spread as x at t - 1 given x at t and x0."""
    x0, noise = torch.zeros(20000, 1), torch.randn(20000, 1)
    step = 3
    spread = []
    for fraction in (-1.0, 1.0):
        output = torch.cat([torch.zeros(20000, 1), torch.full((20000, 1), fraction)], dim=1)
        spread.append(process.step(output, x0, step, noise).var())
    kept = process.alphas_cumprod
    beta = 1 - kept[step] / kept[step - 1]
    posterior = beta * (1 - kept[step - 1]) / (1 - kept[step])
    assert spread[0] == pytest.approx(float(posterior), rel=0.05)
    assert spread[1] == pytest.approx(float(beta), rel=0.05)


def test_the_bound_is_0_for_the_true_posterior_and_trains_the_variance_alone():
    process = GaussianDiffusion()
    x0, noise = randn(6, C), randn(7, C)[:6]
    step = torch.tensor([1, 2, 50, 400, 900, 0])
    x = process.add_noise(x0, step, noise)
    predicted = noise.clone().requires_grad_()
    fraction = torch.full_like(noise, -1.0).requires_grad_()
    mse, bound = process.losses(torch.cat([predicted, fraction], dim=1), x0, x, step, noise)
    assert not mse.any() and torch.allclose(bound[:5], torch.zeros(5), atol=1e-6)
    wrong = torch.cat([predicted + 0.1, fraction + 0.5], dim=1)
    mse, bound = process.losses(wrong, x0, x, step, noise)
    assert torch.allclose(mse, torch.full((6,), 0.01), atol=1e-6) and (bound[:5] > 2e-5).all()
    bound.sum().backward()
    assert (fraction.grad.any() and predicted.grad is None) or not predicted.grad.any()


@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling_is_the_head_run_step_by_step(head, process, monkeypatch, rows, scale):
    """Whatever number of modulations is computed at a time."""
    monkeypatch.setattr(diffusion_head, "MODULATION_ROWS", rows)
    features, noise = randn(6, D), randn(T + 1, 3, C)
    if scale == 1:
        features = features[:3]
    found = head.sample(features, process, noise, scale, temperature=0.9)
    x = noise[0]
    for i, step in enumerate(reversed(range(T))):
        time = process.timesteps[step].expand(3)
        output = head(x, time, features[:3])
        if scale != 1:
            predicted, variance = output.chunk(2, dim=-1)
            null = head(x, time, features[3:])[:, :C]
            output = torch.cat([guide(predicted, null, scale), variance], dim=-1)
        x = process.step(output, x, step, 0.9 * noise[1 + i])
    assert (found - x).abs().max() < 1e-5 * x.abs().max()


def test_the_loss_reaches_every_weight(head):
    mse, bound = head.loss(randn(8, C), randn(8, D), GaussianDiffusion(), torch.Generator())
    (mse + bound).mean().backward()
    missing = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    head.zero_grad()
    assert not missing
