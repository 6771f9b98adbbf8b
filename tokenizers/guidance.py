"""How a flow decoder joins its conditional and unconditional velocities."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# (conditional, unconditional, scale) -> guided velocity, each [B, C, h, w].
Guidance = Callable[[Tensor, Tensor, float], Tensor]


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


class NormalizedGuidance:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416); one object per sampled batch.

    The defaults are those of the published FlexTok and COMiT decoders.

    Args:
        momentum: of the running average of the differences; negative repels.
        threshold: longest L2 norm of an item's difference.
        eta: weight of its part parallel to the conditional velocity.
    """

    def __init__(self, momentum: float = -0.5, threshold: float = 2.5, eta: float = 0.0):
        self.momentum = momentum
        self.threshold = threshold
        self.eta = eta
        self.average: Tensor | float = 0.0

    def __call__(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        self.average = conditional - unconditional + self.momentum * self.average
        length = self.average.flatten(1).norm(dim=1)[:, None, None, None]
        difference = self.average * (self.threshold / length.clamp(min=1e-12)).clamp(max=1)
        # In float64, as published.
        direction = F.normalize(conditional.double().flatten(1), dim=1).view(conditional.shape)
        difference = difference.double()
        parallel = (difference * direction).flatten(1).sum(1)[:, None, None, None] * direction
        update = difference - (1 - self.eta) * parallel
        return conditional + (scale - 1) * update.to(conditional.dtype)
