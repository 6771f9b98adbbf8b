"""The obvious forms: every pair of tokens, every map as a 0/1 matrix. Any dtype up to float64.

Slow and large on purpose; the tests compare everything else against these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .assignment import Assignment


def cosine_matrix(x: Tensor, y: Tensor) -> Tensor:
    """``[B, S, C]``, ``[B, T, C]`` -> ``[B, S, T]``, in float32 or wider; norm 0 is similar to none."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y = (F.normalize(z.to(dtype), dim=-1, eps=1e-12) for z in (x, y))
    return x @ y.transpose(1, 2)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``[B, S]`` of ``[B, N, C]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def best_match(
    metric: Tensor, sources: Tensor, targets: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sources, targets = sources.expand(len(metric), -1), targets.expand(len(metric), -1)
    scores = cosine_matrix(take(metric, sources), take(metric, targets))
    if valid is not None:
        seen = valid.gather(1, sources)[:, :, None] & valid.gather(1, targets)[:, None]
        scores = scores.masked_fill(~seen, -torch.inf)
    if not scores.shape[2]:
        return scores.new_full(sources.shape, -torch.inf), torch.zeros_like(sources)
    best = scores.max(dim=2).values
    index = torch.arange(scores.shape[2], device=scores.device)
    first = torch.where(scores == best[..., None], index, scores.shape[2]).min(dim=2).values
    return best, first


def similarity_energy(
    metric: Tensor, kernel: str = "elu", margin: float = 0.5, alpha: float = 1.0
) -> Tensor:
    cosine = cosine_matrix(metric, metric)
    if kernel == "elu":
        z = cosine - margin
        return torch.where(z > 0, z, alpha * (z.exp() - 1)).mean(dim=2)
    deviation = 1 - margin
    density = torch.exp(-(((1 - cosine) / deviation) ** 2) / 2)
    return (density / (deviation * (2 * torch.pi) ** 0.5)).mean(dim=2)


def merge(
    x: Tensor, a: Assignment, size: Tensor | None = None, mode: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    matrix = a.matrix().to(torch.promote_types(x.dtype, torch.float32))
    wide = x.to(matrix.dtype)
    if mode == "prune":
        one = torch.zeros_like(matrix)
        for b, m in (a.rep >= 0).nonzero().tolist():
            one[b, m, a.rep[b, m]] = 1
        return (one @ wide).to(x.dtype)
    if mode == "amax":
        member = matrix[..., None] > 0
        y = wide[:, None].masked_fill(~member, -torch.inf).amax(dim=2)
        return y.masked_fill(~member.any(2), 0).to(x.dtype)
    if mode == "wavg":
        size = torch.ones_like(wide[..., :1]) if size is None else size.to(wide.dtype)
        total = matrix @ size
        y = (matrix @ (wide * size)) / torch.where(total > 0, total, 1)
        return y.to(x.dtype), total.float()
    y = matrix @ wide
    if mode == "mean":
        y = y / matrix.sum(2, keepdim=True).clamp(min=1)
    return y.to(x.dtype)


def unmerge(y: Tensor, a: Assignment) -> Tensor:
    return a.matrix().to(y.dtype).transpose(1, 2) @ y


def window_similarity(x: Tensor, hw: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Mean off-diagonal cosine of each window, pair by pair."""
    (rows, columns), (wy, wx) = hw, window
    cells = x.unflatten(1, (rows // wy, wy, columns // wx, wx)).transpose(2, 3)
    cells = cells.flatten(3, 4).flatten(1, 2)
    area = wy * wx
    cosine = torch.stack([cosine_matrix(cells[b], cells[b]) for b in range(len(cells))])
    off = cosine.masked_fill(torch.eye(area, dtype=torch.bool), 0)
    return off.sum(dim=(2, 3)) / (area * (area - 1))


def select_diverse(
    x: Tensor, k: int, pivot: Tensor, objective: str = "sum", valid: Tensor | None = None
) -> Tensor:
    """From the matrix of all cosines, over all picks anew each time."""
    cosine = cosine_matrix(x, x)
    picks = []
    for b in range(len(x)):
        chosen = [int(pivot[b])]
        for _ in range(k - 1):
            rows = cosine[b, chosen]
            score = rows.sum(0) if objective == "sum" else rows.amax(0)
            score[chosen] = torch.inf
            if valid is not None:
                score[~valid[b]] = torch.inf
            chosen.append(int(score.argmin()))
        picks.append(chosen)
    return torch.tensor(picks, device=x.device)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def virtual_scores(
    q: Tensor, k: Tensor, mapping: Tensor, cos: Tensor, sin: Tensor, scale: float | None = None
) -> Tensor:
    """Scores of all positions out of unique pairs (the decomposition of DyMU, section 3.3).

    Args:
        q, k: ``[B, H, M, D]``, not rotated.
        mapping: ``[B, N]``.
        cos, sin: ``[N, D]``, halves repeated.

    Returns:
        ``[B, H, N, N]``.
    """
    half = q.shape[-1] // 2
    (q1, q2), (k1, k2) = ((x[..., :half], x[..., half:]) for x in (q, k))
    pair = "bhuf,bhwf->bhuwf"
    same = torch.einsum(pair, q1, k1) + torch.einsum(pair, q2, k2)
    cross = torch.einsum(pair, q2, k1) - torch.einsum(pair, q1, k2)
    c, s = cos[:, :half], sin[:, :half]
    in_phase = c[:, None] * c + s[:, None] * s
    quadrature = c[:, None] * s - s[:, None] * c
    scores = []
    for b, row in enumerate(mapping.long()):
        at = (slice(None), row[:, None], row[None])
        scores.append((in_phase * same[b][at] + quadrature * cross[b][at]).sum(-1))
    return torch.stack(scores) * (q.shape[-1] ** -0.5 if scale is None else scale)


def attention_virtual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Assignment,
    cos: Tensor,
    sin: Tensor,
    scale: float | None = None,
    causal: bool = False,
    merge_back: bool = True,
) -> Tensor:
    scores = virtual_scores(q, k, a.row, cos, sin, scale)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    matrix = a.matrix().to(q.dtype)[:, None]
    out = scores.softmax(-1) @ (matrix.transpose(2, 3) @ v)
    return matrix @ out / matrix.sum(-1, keepdim=True) if merge_back else out


def attention_token_sparse(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, causal: bool = True
) -> Tensor:
    """Attention over all L x L pairs of which a mask leaves those between selected tokens."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    chosen = torch.zeros(*q.shape[:2], length + 1, dtype=torch.bool, device=q.device)
    chosen.scatter_(2, torch.where(index < 0, length, index), True)
    chosen = chosen[..., :length]
    bias = torch.zeros(length, length, device=q.device, dtype=q.dtype)
    if causal:
        bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), -torch.inf)
    # A token that is not selected would see none; it sees itself and is zeroed after.
    eye = torch.eye(length, dtype=torch.bool, device=q.device)
    bias = bias.masked_fill(~(chosen[:, :, None] | eye), -torch.inf)
    out = attention(q, k, v, bias).masked_fill(~chosen[..., None], 0)
    return out.transpose(1, 2)
