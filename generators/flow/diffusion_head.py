"""The diffusion head of MAR: Autoregressive Image Generation without Vector Quantization (Li et al.,
NeurIPS 2024, arXiv 2406.11838).

A small MLP draws one continuous token from a transformer's feature by denoising. MaskGen (KL) and
Hi-MAR use it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ..layers.adaln import layer_norm, modulate
from ..sampling import guide
from .diffusion import GaussianDiffusion

# Modulations of so many (step, token) pairs are computed at a time: enough rows that reading the
# weights costs little beside the arithmetic, few enough to stay small in memory.
MODULATION_ROWS = 256
TIME_FEATURES = 256


class ResBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = Linear(dim, dim)
        self.fc2 = Linear(dim, dim)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        h = modulate(self.norm(x), shift, scale)
        return torch.addcmul(x, gate, self.fc2(F.silu(self.fc1(h))))


class DiffusionHead(nn.Module):
    """Noisy tokens, their timestep and a feature of each -> noise and variance.

    Args:
        latent_dim: width of a token.
        condition_dim: width of a feature.
        dim, depth: of the MLP.
    """

    def __init__(self, latent_dim: int, condition_dim: int, dim: int, depth: int):
        super().__init__()
        self.time_fc1 = Linear(TIME_FEATURES, dim)
        self.time_fc2 = Linear(dim, dim)
        self.condition_proj = Linear(condition_dim, dim)
        self.input_proj = Linear(latent_dim, dim)
        self.blocks = nn.ModuleList(ResBlock(dim) for _ in range(depth))
        # Of all blocks (shift, scale, gate), then of the end (shift, scale): one product.
        self.adaln = Linear(dim, (3 * depth + 2) * dim)
        self.output = Linear(dim, 2 * latent_dim)

    def init_weights(self) -> None:
        """Xavier uniform, time normal 0.02, biases zero; modulations and output zero."""
        for name, parameter in self.named_parameters():
            if name.startswith(("adaln", "output")) or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("time"):
                nn.init.normal_(parameter, std=0.02)
            elif "norm" not in name:
                nn.init.xavier_uniform_(parameter)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Timesteps ``[T]`` of 0 to 999 -> ``[T, dim]``."""
        half = TIME_FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps[:, None].float() * (-math.log(10000) * steps / half).exp()
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.time_fc2(F.silu(self.time_fc1(features.to(self.time_fc1.weight.dtype))))

    def modulations(self, time: Tensor, condition: Tensor) -> Tensor:
        """Embedded times and projected features, which broadcast -> ``[..., (3 depth + 2) dim]``."""
        return self.adaln(F.silu(time + condition))

    def run(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Noisy tokens ``[M, C]`` -> noise and variance ``[M, 2 C]``, float32."""
        parts = modulation.chunk(3 * len(self.blocks) + 2, dim=-1)
        x = self.input_proj(x.to(modulation.dtype))
        for i, block in enumerate(self.blocks):
            x = block(x, *parts[3 * i : 3 * i + 3])
        shift, scale = parts[-2:]
        return self.output(modulate(layer_norm(x), shift, scale)).float()

    def forward(self, x: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """Tokens ``[M, C]``, timesteps ``[M]``, features ``[M, D]`` -> ``[M, 2 C]``, float32."""
        condition = self.condition_proj(features)
        return self.run(x, self.modulations(self.embed_time(timesteps), condition))

    def loss(
        self,
        x0: Tensor,
        features: Tensor,
        process: GaussianDiffusion,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`GaussianDiffusion.losses` of clean tokens ``[M, C]`` at random steps, two of ``[M]``."""
        count, device = len(process.timesteps), x0.device
        step = torch.randint(count, (len(x0),), generator=generator, device=device)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        x = process.add_noise(x0, step, noise)
        output = self(x, process.timesteps.to(device)[step], features)
        return process.losses(output, x0, x, step, noise)

    @torch.no_grad()
    def sample(
        self,
        features: Tensor,
        process: GaussianDiffusion,
        noise: Tensor,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw tokens by ancestral sampling.

        Args:
            features: ``[M, D]``, or ``[2 M, D]`` for guidance, the unconditional ones second.
            noise: normal ``[T + 1, M, C]``: the start, then of each of the T steps (the last of them is
                not read).
            guidance_scale: of the predicted noise. The variance is that of the conditional half.
            temperature: of the noise of the steps.

        Returns:
            ``[M, C]``, float32.
        """
        guided = len(features) == 2 * noise.shape[1]
        condition = self.condition_proj(features)
        times = self.embed_time(process.timesteps.to(features.device))
        steps = list(reversed(range(len(times))))
        ahead = max(1, MODULATION_ROWS // len(features))
        x = noise[0]
        noise = temperature * noise[1:]
        for i, step in enumerate(steps):
            if i % ahead == 0:
                modulations = self.modulations(times[steps[i : i + ahead], None], condition)
            output = self.run(x.repeat(2, 1) if guided else x, modulations[i % ahead])
            if guided:
                output, null = output.chunk(2)
                predicted, variance = output.chunk(2, dim=-1)
                predicted = guide(predicted, null[:, : x.shape[1]], guidance_scale)
                output = torch.cat([predicted, variance], dim=-1)
            x = process.step(output, x, step, noise[i])
        return x
