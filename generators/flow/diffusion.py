"""Denoising diffusion with the cosine schedule and learned variances.

Papers: DDPM, arXiv 2006.11239; Improved DDPM (cosine schedule, learned range of variances, respacing),
arXiv 2102.09672. This is what the diffusion heads of MAR and its descendants use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError


def spaced_timesteps(count: int, num_train_timesteps: int = 1000) -> list[int]:
    """``count`` of the steps 0 to ``num_train_timesteps - 1``, evenly spread, both ends among them.

    Raises:
        InputError: fewer than 2 or more than there are.
    """
    if not 2 <= count <= num_train_timesteps:
        raise InputError(f"Diffusion takes 2 to {num_train_timesteps} steps, got {count}.")
    return [round(i * (num_train_timesteps - 1) / (count - 1)) for i in range(count)]


def cosine_alphas_cumprod(num_train_timesteps: int) -> np.ndarray:
    """Share of the signal's variance left after each step, float64; no beta is above 0.999."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    count = num_train_timesteps
    kept = [
        1 - min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)
    ]
    return np.cumprod(kept)


class GaussianDiffusion:
    """The noising process over the kept timesteps, and its reversal by a network that predicts noise.

    The network's output holds the noise in its first half of channels and, in the second, where the
    log-variance lies between its bounds (-1: posterior variance, 1: beta).

    Args:
        timesteps: kept steps, ascending; the network is told these numbers.
        num_train_timesteps: of the whole process.

    Attributes:
        timesteps: int64 ``[T]``.
        alphas_cumprod, posterior_log_variance_clipped: float64 ``[T]``, of the kept steps.
    """

    def __init__(self, timesteps: Sequence[int] | None = None, num_train_timesteps: int = 1000):
        if timesteps is None:
            timesteps = range(num_train_timesteps)
        self.timesteps = torch.tensor(list(timesteps))
        kept = cosine_alphas_cumprod(num_train_timesteps)[self.timesteps.numpy()]
        before = np.append(1.0, kept[:-1])
        betas = 1 - kept / before
        posterior_variance = betas * (1 - before) / (1 - kept)
        # The first step's is 0; its place takes the second's.
        clipped = np.log(np.append(posterior_variance[1], posterior_variance[1:]))
        self.alphas_cumprod = torch.from_numpy(kept)
        self.posterior_log_variance_clipped = torch.from_numpy(clipped)
        tables = {
            "signal": np.sqrt(kept),
            "noise": np.sqrt(1 - kept),
            "recip": np.sqrt(1 / kept),
            "recip_m1": np.sqrt(1 / kept - 1),
            "mean_x0": betas * np.sqrt(before) / (1 - kept),
            "mean_x": (1 - before) * np.sqrt(1 - betas) / (1 - kept),
            "log_beta": np.log(betas),
            "log_posterior": clipped,
        }
        self.tables = {name: torch.from_numpy(table).float() for name, table in tables.items()}

    def at(self, step: int | Tensor, device: torch.device) -> dict[str, float | Tensor]:
        """Constants of one kept step as numbers, or of steps ``[M]`` as ``[M, 1]``."""
        if isinstance(step, int):
            return {name: float(table[step]) for name, table in self.tables.items()}
        return {name: t.to(device)[step][:, None] for name, t in self.tables.items()}

    def add_noise(self, x0: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """Clean ``[M, C]`` -> as they are at the kept steps ``[M]``."""
        c = self.at(step, x0.device)
        return c["signal"] * x0 + c["noise"] * noise

    def reverse(
        self, output: Tensor, x: Tensor, c: dict[str, float | Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the step before, from the network's output ``[M, 2 C]``."""
        noise, fraction = output.chunk(2, dim=-1)
        fraction = (fraction + 1) / 2
        x0 = c["recip"] * x - c["recip_m1"] * noise
        log_variance = fraction * c["log_beta"] + (1 - fraction) * c["log_posterior"]
        return c["mean_x0"] * x0 + c["mean_x"] * x, log_variance

    def step(self, output: Tensor, x: Tensor, step: int, noise: Tensor) -> Tensor:
        """Ancestral sampling: ``[M, C]`` at a kept step -> at the one before; the last adds no noise."""
        mean, log_variance = self.reverse(output, x, self.at(step, x.device))
        return mean + (0.5 * log_variance).exp() * noise if step else mean

    def losses(
        self, output: Tensor, x0: Tensor, x: Tensor, step: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared error of the noise ``[M]``, and the variational bound in bits a channel ``[M]``.

        The bound trains the variance alone: no gradient reaches the noise through it.

        Args:
            output: of the network, ``[M, 2 C]``.
            x0, x, noise: ``[M, C]`` with ``x = add_noise(x0, step, noise)``.
            step: kept steps ``[M]``.
        """
        predicted, fraction = output.chunk(2, dim=-1)
        mse = F.mse_loss(predicted, noise, reduction="none").mean(-1)
        c = self.at(step, x0.device)
        frozen = torch.cat([predicted.detach(), fraction], dim=-1)
        mean, log_variance = self.reverse(frozen, x, c)
        true_mean = c["mean_x0"] * x0 + c["mean_x"] * x
        kl = 0.5 * (
            log_variance
            - c["log_posterior"]
            - 1
            + (c["log_posterior"] - log_variance).exp()
            + (true_mean - mean) ** 2 * (-log_variance).exp()
        )
        nll = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        bound = torch.where((step == 0)[:, None], nll, kl).mean(-1) / math.log(2)
        return mse, bound


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 around x, the end bins open (arXiv 2006.11239, eq. 13)."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = cdf((x - mean + 1 / 255) * (-log_scale).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_scale).exp())
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()
