"""The same inner loops as Triton kernels, for a GPU.

No N x N matrix is written: `best_match` and `similarity_energy` hold one tile of scores in registers
and reduce it at once, so they read the metric (and again from the L2 cache, once a block of rows)
and write one number a token. `segment_sum` reads every token once and writes every row once, without
atomics, from the tokens sorted by row. `select_diverse` makes its dependent picks in one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_CHANNELS, BLOCK_WIDTH = 64, 64, 32, 128


@triton.jit
def _scores(
    base,
    rows,
    columns,
    row_ok,
    column_ok,
    channels,
    stride_n,
    stride_c,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    scores = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        x = tl.load(
            base + rows[:, None] * stride_n + c[None] * stride_c,
            mask=row_ok[:, None] & (c[None] < channels),
            other=0.0,
        )
        y = tl.load(
            base + columns[None] * stride_n + c[:, None] * stride_c,
            mask=column_ok[None] & (c[:, None] < channels),
            other=0.0,
        )
        scores = tl.dot(x, y, scores, input_precision=PRECISION)
    return scores


@triton.jit
def _best_match_kernel(
    metric,
    norms,
    sources,
    targets,
    valid,
    best,
    where,
    tokens,
    channels,
    source_count,
    target_count,
    stride_b,
    stride_n,
    stride_c,
    HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < source_count
    source = tl.load(sources + b * source_count + row, mask=row_ok, other=0)
    source_norm = tl.load(norms + b * tokens + source, mask=row_ok, other=1.0)
    top = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    place = tl.zeros([ROWS], dtype=tl.int64)
    for start in range(0, target_count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_ok = column < target_count
        target = tl.load(targets + b * target_count + column, mask=column_ok, other=0)
        target_norm = tl.load(norms + b * tokens + target, mask=column_ok, other=1.0)
        scores = _scores(
            metric + b * stride_b,
            source,
            target,
            row_ok,
            column_ok,
            channels,
            stride_n,
            stride_c,
            PRECISION,
            ROWS,
            COLUMNS,
            CHANNELS,
        )
        scores = scores / source_norm[:, None] / target_norm[None]
        seen = column_ok
        if HAS_VALID:
            seen = seen & (tl.load(valid + b * tokens + target, mask=column_ok, other=0) != 0)
        scores = tl.where(seen[None], scores, -float("inf"))
        value, index = tl.max(
            scores, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        better = value > top
        top = tl.where(better, value, top)
        place = tl.where(better, start + index, place)
    if HAS_VALID:
        alive = tl.load(valid + b * tokens + source, mask=row_ok, other=0) != 0
        top = tl.where(alive, top, -float("inf"))
    tl.store(best + b * source_count + row, top, mask=row_ok)
    tl.store(where + b * source_count + row, place, mask=row_ok)


def _precision(metric: Tensor) -> str:
    # Three TF32 products keep float32's accuracy; half-precision products are exact as they are.
    return "tf32x3" if metric.dtype == torch.float32 else "ieee"


def _norms(metric: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(metric, dim=-1, dtype=torch.float32)
    return norms.clamp(min=1e-12).contiguous()


def best_match(
    metric: Tensor, sources: Tensor, targets: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`matching.best_match`; one program for each sample and block of sources."""
    dtype = torch.promote_types(metric.dtype, torch.float32)
    metric = metric.float() if metric.dtype == torch.float64 else metric
    (batch, count), (_, tokens, channels) = sources.shape, metric.shape
    best = torch.full((batch, count), -torch.inf, device=metric.device)
    where = torch.zeros(batch, count, dtype=torch.int64, device=metric.device)
    if count and targets.shape[1]:
        _best_match_kernel[(triton.cdiv(count, BLOCK_ROWS), batch)](
            metric,
            _norms(metric),
            sources.contiguous(),
            targets.contiguous(),
            metric if valid is None else valid.to(torch.uint8).contiguous(),
            best,
            where,
            tokens,
            channels,
            count,
            targets.shape[1],
            *metric.stride(),
            HAS_VALID=valid is not None,
            PRECISION=_precision(metric),
            ROWS=BLOCK_ROWS,
            COLUMNS=BLOCK_COLUMNS,
            CHANNELS=BLOCK_CHANNELS,
        )
    return best.to(dtype), where


@triton.jit
def _energy_kernel(
    metric,
    norms,
    energy,
    tokens,
    channels,
    stride_b,
    stride_n,
    stride_c,
    margin,
    alpha,
    GAUSS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < tokens
    row_norm = tl.load(norms + b * tokens + row, mask=row_ok, other=1.0)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, tokens, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_ok = column < tokens
        column_norm = tl.load(norms + b * tokens + column, mask=column_ok, other=1.0)
        scores = _scores(
            metric + b * stride_b,
            row,
            column,
            row_ok,
            column_ok,
            channels,
            stride_n,
            stride_c,
            PRECISION,
            ROWS,
            COLUMNS,
            CHANNELS,
        )
        scores = scores / row_norm[:, None] / column_norm[None]
        if GAUSS:
            z = (1 - scores) / (1 - margin)
            value = tl.exp(-0.5 * z * z) / ((1 - margin) * 2.5066282746310002)
        else:
            z = scores - margin
            value = tl.where(z > 0, z, alpha * (tl.exp(z) - 1))
        total += tl.sum(tl.where(column_ok[None], value, 0.0), axis=1)
    tl.store(energy + b * tokens + row, total / tokens, mask=row_ok)


def similarity_energy(metric: Tensor, kernel: str, margin: float, alpha: float) -> Tensor:
    """`matching.similarity_energy`; one program for each sample and block of tokens."""
    dtype = torch.promote_types(metric.dtype, torch.float32)
    metric = metric.float() if metric.dtype == torch.float64 else metric
    batch, tokens, channels = metric.shape
    energy = torch.zeros(batch, tokens, device=metric.device)
    if tokens:
        _energy_kernel[(triton.cdiv(tokens, BLOCK_ROWS), batch)](
            metric,
            _norms(metric),
            energy,
            tokens,
            channels,
            *metric.stride(),
            margin,
            alpha,
            GAUSS=kernel == "gauss",
            PRECISION=_precision(metric),
            ROWS=BLOCK_ROWS,
            COLUMNS=BLOCK_COLUMNS,
            CHANNELS=BLOCK_CHANNELS,
        )
    return energy.to(dtype)


@triton.jit
def _segment_sum_kernel(x, order, offsets, y, width, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for i in range(first, last):
        token = tl.load(order + i)
        total += tl.load(x + token * width + d, mask=d < width, other=0.0)
    tl.store(y + row * width + d, total, mask=d < width)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, flat: Tensor, batch: int, rows: int) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.shape = x.shape
        x = x.flatten(0, 1).contiguous()
        ordered = flat.sort(stable=True)
        bounds = torch.arange(batch * rows + 1, device=x.device)
        y = x.new_empty(batch * rows, x.shape[1])
        if y.numel():
            _segment_sum_kernel[(batch * rows, triton.cdiv(x.shape[1], BLOCK_WIDTH))](
                x,
                ordered.indices,
                torch.searchsorted(ordered.values, bounds),
                y,
                x.shape[1],
                WIDTH=BLOCK_WIDTH,
            )
        return y.view(batch, rows, -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (flat,) = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        out = rows.index_select(0, flat.clamp(max=len(rows) - 1))
        return out.masked_fill((flat >= len(rows))[:, None], 0).view(ctx.shape), None, None, None


def segment_sum(x: Tensor, flat: Tensor, batch: int, rows: int) -> Tensor:
    """Sum of the tokens of each row, ``[B, N, D]`` -> ``[B, rows, D]``, with a gradient.

    Args:
        flat: int64 ``[B * N]``, row of each token counted through the batch; B * rows = dropped.
    """
    return _SegmentSum.apply(x, flat, batch, rows)


@triton.jit
def _diverse_kernel(
    gram, start, pivot, picks, tokens, k, CUMULATIVE: tl.constexpr, TOKENS: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TOKENS)
    ok = column < tokens
    score = tl.load(start + b * tokens + column, mask=ok, other=float("inf"))
    pick = tl.load(pivot + b)
    tl.store(picks + b * k, pick)
    for step in range(1, k):
        cosine = tl.load(gram + (b * tokens + pick) * tokens + column, mask=ok, other=0.0)
        score = score + cosine if CUMULATIVE else tl.maximum(score, cosine)
        score = tl.where(column == pick, float("inf"), score)
        pick = tl.argmin(score, axis=0, tie_break_left=True).to(tl.int64)
        tl.store(picks + b * k + step, pick)


def select_diverse(
    x: Tensor, k: int, pivot: Tensor, objective: str, valid: Tensor | None = None
) -> Tensor:
    """`todre.select_diverse`: all cosines once, then one program a sample makes its k picks."""
    batch, tokens, _ = x.shape
    normed = x / _norms(x)[..., None]
    gram = (normed @ normed.transpose(1, 2)).float().contiguous()
    cumulative = objective == "sum"
    start = gram.new_full((batch, tokens), 0.0 if cumulative else -torch.inf)
    if valid is not None:
        start.masked_fill_(~valid, torch.inf)
    picks = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    _diverse_kernel[(batch,)](
        gram,
        start,
        pivot.long().contiguous(),
        picks,
        tokens,
        k,
        CUMULATIVE=cumulative,
        TOKENS=triton.next_power_of_2(tokens),
    )
    return picks
