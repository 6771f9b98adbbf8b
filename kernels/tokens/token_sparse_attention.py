"""Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection.

Paper: arXiv 2602.03216. Published code: dongwonjo/Token-Sparse-Attention (MIT). No weights.

In the prefill of some layers every head attends among the tokens that the last queries look at; the
others get nothing from it and go on in the residual stream. Keys and values are cached in full.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError


def token_scores(q: Tensor, k: Tensor, window: int, *, scale: float | None = None) -> Tensor:
    """How much the last queries look at each token before them.

    Args:
        q, k: ``[B, H, L, D]`` and ``[B, Hkv, L, D]``, rotated; H is a multiple of Hkv.
        window: last queries, W < L.

    Returns:
        Mean probability, float32 ``[B, H, L - W]``.
    """
    length, heads = q.shape[2], q.shape[1]
    if not 0 < window < length:
        raise InputError(f"The window must be 1 to {length - 1} of {length} tokens, got {window}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    prefix = length - window
    hidden = torch.ones(window, length, dtype=torch.bool, device=q.device).triu(prefix + 1)
    scores = torch.empty(len(q), heads, prefix, device=q.device)
    for head in range(heads):
        keys = k[:, head * k.shape[1] // heads]
        logits = q[:, head, prefix:].float() @ keys.float().transpose(1, 2)
        logits = logits.mul_(scale).masked_fill_(hidden, -torch.inf)
        scores[:, head] = logits.softmax(dim=-1)[..., :prefix].mean(dim=1)
    return scores


def coverage_count(scores: Tensor, coverage: float) -> Tensor:
    """How many tokens of the lowest scores together hold less than ``coverage`` of their sum.

    Args:
        scores: ``[B, H, n]``.

    Returns:
        int64 ``[B]``: tokens that may go, one more than hold less than that; 0 for none.
    """
    mean = scores.mean(dim=1)
    mean = mean / (mean.sum(dim=1, keepdim=True) + 1e-8)
    count = (mean.sort(dim=1).values.cumsum(dim=1) < coverage).sum(dim=1)
    return torch.where(count > 0, count + 1, count)


def select_tokens(
    q: Tensor,
    k: Tensor,
    *,
    window: int = 128,
    pool_kernel: int = 7,
    min_tokens: int = 1024,
    coverage: float = 0.005,
) -> Tensor | None:
    """The tokens among which each head attends.

    Args:
        q, k: ``[B, H, L, D]`` and ``[B, Hkv, L, D]``.
        window: last tokens, always kept.
        pool_kernel: odd width of a moving average over the scores.
        min_tokens: kept at least, besides the window.
        coverage: share of the attention that may be lost.

    Returns:
        int64 ``[B, H, S]``, ascending, -1 = padding at the end (samples differ in number); None
        where all of them attend.
    """
    if pool_kernel < 1 or pool_kernel % 2 == 0:
        raise InputError(f"The pooling kernel must be odd, got {pool_kernel}.")
    length, heads = q.shape[2], q.shape[1]
    if length <= min_tokens + window or coverage <= 0:
        return None
    scores = token_scores(q, k, window)
    scores = F.avg_pool1d(scores, pool_kernel, stride=1, padding=pool_kernel // 2)
    prefix = length - window
    dropped = coverage_count(scores, coverage)
    if not dropped.any():
        return None
    keep = (prefix - dropped).clamp(min=min_tokens)
    most = int(keep.max())
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    padding = torch.arange(most, device=q.device) >= keep[:, None, None]
    order = order.masked_fill(padding, length).sort(dim=-1).values
    last = torch.arange(prefix, length, device=q.device).expand(len(q), heads, -1)
    index = torch.cat([order, last], dim=-1)
    index = index.sort(dim=-1).values  # Padding goes behind the window.
    return index.masked_fill(index == length, -1)


def attention_token_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "torch",
) -> Tensor:
    """Attention of each head among its own tokens.

    Args:
        q: ``[B, H, L, D]``.
        k, v: ``[B, Hkv, L, D]``.
        index: ascending int64 ``[B, H, S]`` of `select_tokens`, -1 = padding; None = all tokens.
        backend: "torch" gathers the tokens and attends with PyTorch's fused kernel; "triton" reads
            them through the index, without copies and without a gradient.

    Returns:
        ``[B, L, H, D]``, 0 where a head did not select a token.
    """
    if index is not None and (index.ndim != 3 or index.shape[:2] != q.shape[:2]):
        raise InputError(f"The index must be {list(q.shape[:2])} + [S], got {list(index.shape)}.")
    if backend not in ("torch", "triton"):
        raise InputError(f'The backend must be "torch" or "triton", got "{backend}".')
    if backend == "triton" and index is not None:
        from .indexed_attention import indexed_attention

        out = q.new_zeros(len(q), q.shape[2], q.shape[1], v.shape[-1])
        by_head = out.transpose(1, 2)
        indexed_attention(q, k, v, index, by_head, causal=causal, scale=scale, scatter=True)
        return out
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if index is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return out.transpose(1, 2)
    padding = index < 0
    length = q.shape[2]
    at = index.masked_fill(padding, 0)[..., None].expand(-1, -1, -1, q.shape[-1])
    q, k, v = (x.gather(2, at) for x in (q, k, v))
    mask = None
    if padding.any() and not causal:
        # In a causal order padding comes last and nothing sees it.
        mask = ~padding[:, :, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    # One more row takes the padding.
    result = q.new_zeros(*q.shape[:2], length + 1, v.shape[-1])
    result.scatter_(2, at.masked_fill(padding[..., None], length), out)
    return result[:, :, :length].transpose(1, 2)
