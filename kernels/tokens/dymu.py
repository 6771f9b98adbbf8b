"""DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs (Wang et al., NeurIPS 2025).

Paper: arXiv 2504.17040. Published code: MikeWangWZHL/dymu (MIT-style; LLaVA parts Apache-2.0).
Checkpoints with learnt thresholds: mikewang/DyMU (CLIP ViT-L/14@336, SigLIP B/16@384, SO400M/14@384;
upstream licences). A threshold of 1 never merges.

ToMe's pairs merge where their cosine is above a threshold of the layer, so plain pictures get fewer
tokens. A decoder with rotary positions then attends as if the tokens were still there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError
from .assignment import Assignment, check_match, merge
from .matching import best_match, check_metric, stable_order
from .tome import match_bipartite

# The published batch-level average divides by size + this; the one of a single image by size.
BATCH_EPS = 1e-4


def match_threshold(
    metric: Tensor,
    threshold: float,
    *,
    cls: bool = False,
    max_r: int | None = None,
    order: str = "position",
) -> Assignment:
    """Merge the A tokens of one image whose best cosine is above the threshold.

    Args:
        metric: ``[1, N, C]``.
        threshold: strict; 1 merges nothing.
        cls: the first token is protected.
        max_r: most tokens to remove.
        order: of the A tokens that stay: "position", or "reference" as published (by descending
            score without a class token). They are followed by the B tokens.
    """
    check_metric(metric)
    if len(metric) != 1:
        raise InputError(
            f"match_threshold takes one image, got {len(metric)}: match_batch takes more."
        )
    if order not in ("position", "reference"):
        raise InputError(f'The order must be "position" or "reference", got "{order}".')
    position = torch.arange(metric.shape[1], device=metric.device)
    best, _ = best_match(metric, position[::2], position[1::2])
    if cls:
        best[:, :1] = -torch.inf
    r = int((best > threshold).sum())
    a = match_bipartite(metric, r if max_r is None else min(r, max_r), cls=cls)
    return _a_ascending(a) if order == "position" else a


def _a_ascending(a: Assignment) -> Assignment:
    """Even representatives in ascending order, then the odd ones."""
    count = a.row.shape[1]
    key = a.rep + (a.rep % 2) * count
    rank = key.argsort(dim=1)
    row = rank.argsort(dim=1).gather(1, a.row.long())
    return Assignment.build(row, a.rep.gather(1, rank))


def match_batch(
    metric: Tensor,
    *,
    r: int | None = None,
    threshold: float | None = None,
    cls: bool = False,
    max_r: int | None = None,
    valid: Tensor | None = None,
) -> tuple[Assignment, Tensor]:
    """Merge over a whole batch: above a threshold, or the ``r * B`` best pairs of all images.

    Images with more redundancy lose more tokens. Rows: the A tokens that stay, then B, both by
    position, then padding.

    Args:
        metric: ``[B, N, C]``.
        r: tokens to remove, on average an image; with a threshold only 0 has a meaning (none).
        threshold: strict.
        cls: the first token is protected.
        max_r: most tokens to remove from one image.
        valid: bool ``[B, N]``, False = padding, which is dropped.

    Returns:
        The assignment, and the score of the best pair that did not merge, at least 0: the threshold
        that a training batch finds for its layer.
    """
    check_metric(metric)
    if r is None and threshold is None:
        raise InputError("Give r or a threshold.")
    batch, tokens, _ = metric.shape
    if valid is None:
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=metric.device)
    if valid.shape != metric.shape[:2]:
        raise InputError(f"The mask is {list(valid.shape)} for tokens {[batch, tokens]}.")
    limit = max(tokens - cls, 0) // 2
    r = limit if r is None else min(r, limit)
    position = torch.arange(tokens, device=metric.device)
    best, target = best_match(metric, position[::2], position[1::2], valid)
    if cls:
        best[:, :1] = -torch.inf
    if max_r is not None:
        best.scatter_(1, stable_order(best)[:, max_r:], -torch.inf)
    order = stable_order(best.flatten())
    ranked = best.flatten()[order]
    if r <= 0:
        pairs = torch.zeros_like(ranked, dtype=torch.bool)
    elif threshold is not None:
        pairs = ranked > threshold
    else:  # Pairs at -inf are none, so there may be fewer than r * B.
        pairs = ranked > -torch.inf
        pairs[r * batch :] = False
    merged = torch.zeros_like(pairs).scatter(0, order, pairs).view_as(best)
    next_best = pairs.sum().clamp(max=len(ranked) - 1)
    return _pack(merged, target, valid), ranked[next_best].clamp(min=0)


def _pack(merged: Tensor, target: Tensor, valid: Tensor) -> Assignment:
    """Valid tokens that did not merge become the rows: even ones by position, then odd ones."""
    tokens = valid.shape[1]
    position = torch.arange(tokens, device=valid.device)
    layout = torch.cat([position[::2], position[1::2]])
    stays = valid.clone()
    stays[:, ::2] &= ~merged
    stays = stays[:, layout]
    num = stays.sum(dim=1)
    rows = int(num.max())
    front = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :rows]
    rep = layout[front].masked_fill(position[:rows] >= num[:, None], -1)
    row = torch.full_like(stays, -1, dtype=torch.int64)
    row[:, layout] = (stays.cumsum(dim=1) - 1).masked_fill(~stays, -1)
    of_target = row.gather(1, 2 * target + 1) if target.numel() and tokens > 1 else row[:, ::2]
    row[:, ::2] = torch.where(merged, of_target, row[:, ::2])
    return Assignment.build(row, rep, num, drops=True)


def merge_batch(x: Tensor, a: Assignment, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The published average of `match_batch`: ``sum(x size) / (sum(size) + 1e-4)``.

    Args:
        x: ``[B, N, D]``.
        size: ``[B, N, 1]``, 0 for padding; default 1.

    Returns:
        ``[B, M, D]`` and the new sizes ``[B, M, 1]``; 0 in padding.
    """
    check_match(x, a)
    size = torch.ones_like(x[..., :1], dtype=torch.float32) if size is None else size
    total = merge(size, a, mode="sum")
    return (merge(x * size, a, mode="sum") / (total + BATCH_EPS)).to(x.dtype), total


class RunningThreshold:
    """Mean of the thresholds that batches find, in float64; the first batch counts once.

    Attributes:
        value: 1 (never merges) before the first batch.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self.count = 0

    def update(self, found: Tensor | float) -> float:
        """Add the threshold of a batch and return the mean."""
        self.count += 1
        self.value += (float(found) - self.value) / self.count
        return self.value


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def attention_virtual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Assignment,
    cos: Tensor,
    sin: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    merge_back: bool = True,
    backend: str = "torch",
) -> Tensor:
    """Rotary attention over all N positions of M unique tokens (section 3.3 of the paper).

    Equal to repeating the rows of every position, rotating them and attending. It saves no
    attention, but all projections and MLPs run on M rows.

    Args:
        q, k, v: ``[B, H, M, D]``, not rotated.
        a: which row each position has; none may be dropped.
        cos, sin: ``[N, D]``, halves repeated (half-split rotation).
        causal: over the positions.
        merge_back: average the outputs of the positions of each row.
        backend: "torch" repeats the rows and attends with PyTorch's fused kernel; "triton" reads
            them through the map, without copies and without a gradient.

    Returns:
        ``[B, H, M, D]``, or ``[B, H, N, D]`` without ``merge_back``.
    """
    if a.drops or q.shape[2] != a.rep.shape[1]:
        raise InputError(
            f"Virtual unmerging needs a row for every position, and {a.rep.shape[1]} of them; "
            f"got {q.shape[2]} tokens."
        )
    if backend not in ("torch", "triton"):
        raise InputError(f'The backend must be "torch" or "triton", got "{backend}".')
    if backend == "triton":
        from .indexed_attention import indexed_attention

        out = q.new_empty(*q.shape[:2], a.row.shape[1], v.shape[-1])
        index, rotation = a.row[:, None], (cos, sin)
        indexed_attention(q, k, v, index, out, causal=causal, scale=scale, rotation=rotation)
    else:
        index = a.row.long()[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        q, k, v = (part.gather(2, index) for part in (q, k, v))
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    if not merge_back:
        return out
    merged = merge(out.transpose(1, 2).flatten(2), a, mode="mean")
    return merged.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
