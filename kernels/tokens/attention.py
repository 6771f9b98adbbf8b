"""Attention over reduced tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_sized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_size: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention in which a key that stands for n tokens counts n times (ToMe, section 3).

    Equal to attention over the unmerged keys where the merged ones were identical.

    Args:
        q, k, v: ``[B, H, L, D]``, ``[B, H, M, D]``, ``[B, H, M, Dv]``.
        key_size: ``[B, M]``, tokens of each key; 0 hides a key.
        mask: bool (True = seen) or additive, broadcastable to ``[B, H, L, M]``.

    Returns:
        ``[B, H, L, Dv]``: ``softmax(q k^T scale + log key_size + mask) v``.
    """
    if key_size is not None:
        bias = key_size.float().log()[:, None, None]
        if mask is not None and mask.dtype == torch.bool:
            bias = bias.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            bias = bias + mask
        mask = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def attention_columns(
    q: Tensor,
    k: Tensor,
    columns: slice,
    *,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """What the last queries pay to some keys, averaged over the heads.

    Only these rows of the attention are made, one head at a time; fused attention can do the rest.

    Args:
        q: ``[B, H, t, D]``, the last t queries of the sequence (the text).
        k: ``[B, Hkv, L, D]``, all keys; H is a multiple of Hkv.
        columns: keys of interest (the vision tokens).
        causal: among the last t positions, a query sees none after it.

    Returns:
        Probabilities, float32 ``[B, t, columns]``.
    """
    count, heads = q.shape[2], q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    hidden = torch.ones(count, k.shape[2], dtype=torch.bool, device=q.device)
    hidden = hidden.triu(k.shape[2] - count + 1)
    total: Tensor | float = 0.0
    for head in range(heads):
        keys = k[:, head * k.shape[1] // heads]
        scores = q[:, head].float() @ keys.float().transpose(1, 2) * scale
        if causal:
            scores.masked_fill_(hidden, -torch.inf)
        total = total + scores.softmax(dim=-1)[..., columns]
    return total / heads
