"""Class labels as conditions; the label after the last class is the null class of guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from ...modalities.errors import InputError


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise InputError unless labels are whole numbers ``[B]`` of 0 to ``num_classes`` (null)."""
    if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise InputError(
            f"Class labels must be whole numbers of shape [batch], got "
            f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}."
        )
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) <= num_classes):
        raise InputError(
            f"Class labels must lie in 0 to {num_classes - 1} ({num_classes} is the null class), "
            f"got {int(labels.min())} to {int(labels.max())}."
        )


def drop_labels(
    labels: Tensor, num_classes: int, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Each label ``[B]`` becomes the null class with this probability."""
    drawn = torch.rand(labels.shape, generator=generator, device=labels.device)
    return labels.masked_fill(drawn < probability, num_classes)
