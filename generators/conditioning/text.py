"""Features of texts as a condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError

if TYPE_CHECKING:
    from .clip import TextImageCLIP


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


@torch.no_grad()
def text_prefix(clip: TextImageCLIP, texts: Sequence[str], length: int) -> Tensor:
    """Texts -> features ``[B, length, text_dim]``, cut, or filled up with zeros."""
    features, mask = clip.text_features(texts)
    features = (features * mask[..., None])[:, :length]
    return F.pad(features, (0, 0, 0, length - features.shape[1]))
