"""Continuous time as a condition (sinusoids as in arXiv 2006.11239, then an MLP)."""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ...kernels.linear import Linear

FEATURES = 256


class TimeEmbedding(nn.Module):
    """Times in 0 to 1 -> vectors.

    Args:
        whole_steps: through ``trunc(1000 t)``, as xAR and FlowAR; else through ``1000 t`` itself.
    """

    def __init__(self, dim: int, whole_steps: bool = True):
        super().__init__()
        self.whole_steps = whole_steps
        self.fc1 = Linear(FEATURES, dim)
        self.fc2 = Linear(dim, dim)

    def init_weights(self) -> None:
        """Normal 0.02, biases zero."""
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, times: Tensor) -> Tensor:
        """``[...]`` -> ``[..., dim]``."""
        steps = times.float() * 1000
        steps = steps.trunc() if self.whole_steps else steps
        features = get_timestep_embedding(
            steps.flatten(), FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        features = features.unflatten(0, times.shape).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(features)))
