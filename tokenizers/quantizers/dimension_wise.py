"""Dimension-wise quantization of trained continuous latents: one scalar grid for every channel.

Paper: "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (Wang et al.,
2025), arXiv 2503.16430, section 3.2. Needs no training: the latents of a VAE are nearly Gaussian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...modalities.errors import InputError


def gaussian_levels(levels: int, std_range: float) -> tuple[Tensor, Tensor]:
    """Cells of equal probability of N(0, 1) and the mean in each.

    The outermost boundaries are cut at ``std_range`` before the means are taken.

    Returns:
        boundaries float32 ``[levels + 1]``, values float32 ``[levels]``.
    """
    boundaries = math.sqrt(2) * torch.erfinv(2 * torch.linspace(0, 1, levels + 1) - 1)
    boundaries = boundaries.clamp(-std_range, std_range)
    density = torch.exp(-boundaries.square() / 2) / math.sqrt(2 * math.pi)
    mass = 0.5 * (1 + torch.erf(boundaries / math.sqrt(2)))
    width = mass.diff()
    width = torch.where(width == 0, 1e-10, width)
    return boundaries, -density.diff() / width


class DimensionWiseQuantizer(nn.Module):
    """Each number of a latent becomes the index of the nearest of ``levels`` values.

    Args:
        levels: ids a channel, 2 or more.
        value_range: latents that map to -std_range and std_range; what lies outside is clamped.
        std_range: where the Gaussian is cut, in standard deviations.
    """

    def __init__(
        self,
        levels: int = 64,
        value_range: tuple[float, float] = (-5.0, 5.0),
        std_range: float = 3.0,
    ):
        super().__init__()
        if levels < 2 or not value_range[0] < value_range[1] or std_range <= 0:
            raise InputError(
                f"A dimension-wise quantizer needs 2 levels or more and ranges above zero, got "
                f"{levels} levels over {tuple(value_range)} and std_range {std_range}."
            )
        self.low, self.high = value_range
        self.std_range = std_range
        # Published checkpoints carry this table: theirs counts.
        self.register_buffer("reconstruction_values", gaussian_levels(levels, std_range)[1])

    @property
    def vocab_size(self) -> int:
        return len(self.reconstruction_values)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[...]`` -> (the values they are rounded to, float32 ``[...]``, ids int64 ``[...]``).

        The gradient of the values passes straight through. Of two equally near levels the lower wins.
        """
        z = z.float()
        unit = (z.detach() - self.low) / (self.high - self.low) * (2 * self.std_range)
        unit = (unit - self.std_range).clamp(-self.std_range, self.std_range)
        ids = (unit[..., None] - self.reconstruction_values.float()).abs().argmin(-1)
        values = self.ids_to_codes(ids)
        return (z + (values - z).detach() if z.requires_grad else values), ids

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[...]`` -> latents float32 ``[...]``."""
        unit = self.reconstruction_values.float()[ids]
        return (unit + self.std_range) / (2 * self.std_range) * (self.high - self.low) + self.low
