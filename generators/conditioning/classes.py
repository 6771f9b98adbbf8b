"""Class labels as conditions; the label after the last class is the null class of guidance.

Labels are int64 ``[B]``; between classes, ``[B, num_classes + 1]`` weights of the rows of the table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise InputError unless labels are whole numbers ``[B]`` of 0 to ``num_classes`` (null), or
    weights ``[B, num_classes + 1]``."""
    if labels.dtype.is_floating_point and labels.shape[1:] == (num_classes + 1,):
        return
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


def null_labels(labels: Tensor, num_classes: int, count: int | None = None) -> Tensor:
    """The null class in the form of ``labels``, ``count`` times (default: for each of them)."""
    null = labels.new_full((len(labels) if count is None else count,), num_classes)
    if labels.ndim == 1:
        return null
    return F.one_hot(null.long(), num_classes + 1).to(labels)


def embed_labels(table: Tensor, labels: Tensor) -> Tensor:
    """Rows of ``[num_classes + 1, D]`` by label, or weighted sums of them: ``[B, D]``."""
    return F.embedding(labels, table) if labels.ndim == 1 else labels.to(table.dtype) @ table


def drop_labels(
    labels: Tensor, num_classes: int, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Each label ``[B]`` becomes the null class with this probability."""
    drawn = torch.rand(labels.shape, generator=generator, device=labels.device)
    return labels.masked_fill(drawn < probability, num_classes)
