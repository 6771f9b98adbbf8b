"""Features of texts as a condition."""

from __future__ import annotations

import torch
from torch import Tensor

from ...modalities.errors import InputError


def check_text(features: Tensor, mask: Tensor, dim: int) -> None:
    """Raise InputError unless features are ``[B, L, dim]`` with a mask bool ``[B, L]``."""
    if features.ndim != 3 or features.shape[-1] != dim:
        raise InputError(
            f"text_features must have the shape [batch, length, {dim}], got {list(features.shape)}."
        )
    if mask.dtype != torch.bool or mask.shape != features.shape[:2]:
        raise InputError(
            f"text_mask must be bool of the shape {list(features.shape[:2])} (True = a word), got "
            f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}."
        )
