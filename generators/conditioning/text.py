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


def text_ids(clip: TextImageCLIP, texts: Sequence[str], length: int, pad: int) -> Tensor:
    """Texts -> ids int64 ``[B, length]`` of a CLIP's own vocabulary, for a generator that embeds them
    itself; cut, or filled up with ``pad``."""
    ids = clip.tokenize(texts)
    # The end token has the highest id, so argmax finds the length.
    places = torch.arange(ids.shape[1], device=ids.device)
    ids = torch.where(places <= ids.argmax(-1, keepdim=True), ids, pad)
    return F.pad(ids, (0, max(0, length - ids.shape[1])), value=pad)[:, :length]
