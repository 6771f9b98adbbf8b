"""Attention among the tokens that an index names, without gathered copies: a Triton kernel.

It serves virtual unmerging (dymu.py), where an index repeats the merged tokens at every position, and
token sparse attention, where each head has a list of its own. Queries, keys and values are read
through the index and rotated in registers; the outputs are written by position, or through the index
as well. Forward only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_QUERIES, BLOCK_KEYS = 64, 64


@triton.jit
def _load_rows(base, stride, row, ok, width, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    mask = ok[:, None] & (d[None] < width)
    return tl.load(base + row[:, None] * stride + d[None], mask=mask, other=0.0)


@triton.jit
def _load_rotated(base, stride, row, place, ok, cos, sin, width, WIDTH: tl.constexpr):
    """Rows of a half-split rotary embedding: ``x cos + (-second half, first half) sin``."""
    d = tl.arange(0, WIDTH)
    mask = ok[:, None] & (d[None] < width)
    half = width // 2
    partner = tl.where(d < half, d + half, d - half)
    sign = tl.where(d < half, -1.0, 1.0)
    x = tl.load(base + row[:, None] * stride + d[None], mask=mask, other=0.0)
    other = tl.load(base + row[:, None] * stride + partner[None], mask=mask, other=0.0)
    at = place[:, None] * width + d[None]
    c = tl.load(cos + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * c + other.to(tl.float32) * sign[None] * s).to(x.dtype)


@triton.jit
def _attention_kernel(
    q,
    k,
    v,
    index,
    cos,
    sin,
    out,
    count,
    groups,
    scale,
    head_dim,
    value_dim,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    index_batch,
    index_head,
    out_batch,
    out_head,
    out_row,
    CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr,
    SCATTER: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    first = tl.program_id(0) * QUERIES
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q += b * q_batch + h * q_head
    k += b * k_batch + (h // groups) * k_head
    v += b * v_batch + (h // groups) * v_head
    index += b * index_batch + h * index_head
    i = first + tl.arange(0, QUERIES)
    row = tl.load(index + i, mask=i < count, other=-1)
    if ROTARY:
        x = _load_rotated(q, q_row, row, i, row >= 0, cos, sin, head_dim, D)
    else:
        x = _load_rows(q, q_row, row, row >= 0, head_dim, D)
    top = tl.full([QUERIES], -float("inf"), dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    sums = tl.zeros([QUERIES, DV], dtype=tl.float32)
    stop = tl.minimum(count, first + QUERIES) if CAUSAL else count
    for start in range(0, stop, KEYS):
        j = start + tl.arange(0, KEYS)
        key = tl.load(index + j, mask=j < count, other=-1)
        if ROTARY:
            y = _load_rotated(k, k_row, key, j, key >= 0, cos, sin, head_dim, D)
        else:
            y = _load_rows(k, k_row, key, key >= 0, head_dim, D)
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
        seen = (key >= 0)[None]
        if CAUSAL:
            seen = seen & (i[:, None] >= j[None])
        scores = tl.where(seen, scores, -float("inf"))
        peak = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(peak == -float("inf"), 0.0, peak)  # No key was seen yet.
        weights = tl.exp(scores - safe[:, None])
        fade = tl.exp(top - safe)
        values = _load_rows(v, v_row, key, key >= 0, value_dim, DV)
        total = total * fade + tl.sum(weights, axis=1)
        sums = tl.dot(
            weights.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION
        )
        top = peak
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    target = row if SCATTER else i
    e = tl.arange(0, DV)
    tl.store(
        out + b * out_batch + h * out_head + target[:, None] * out_row + e[None],
        result.to(out.dtype.element_ty),
        mask=(row >= 0)[:, None] & (e[None] < value_dim),
    )


def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    out: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    scatter: bool = False,
) -> Tensor:
    """Attention over the positions ``0..S-1`` whose tokens ``index`` names.

    Args:
        q: ``[B, H, M, D]``.
        k, v: ``[B, Hkv, M, D]`` and ``[B, Hkv, M, Dv]``; H is a multiple of Hkv.
        index: integers ``[B, H or 1, S]``, token of each position; -1 = padding, which nothing sees.
        out: ``[B, H, S, Dv]`` by position, or ``[B, H, M, Dv]`` by token with ``scatter``; any
            strides. Padding, and tokens that no position names, are not written.
        causal: a position sees those up to itself.
        rotation: cosines and sines, each ``[S, D]`` with the halves repeated.

    Returns:
        ``out``.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    index = index.expand(len(q), q.shape[1], -1)
    index = index if index.stride(2) == 1 else index.contiguous()
    cos, sin = (t.contiguous() for t in rotation) if rotation else (q, q)
    count = index.shape[2]
    if count:
        _attention_kernel[(triton.cdiv(count, BLOCK_QUERIES), q.shape[1], len(q))](
            q,
            k,
            v,
            index,
            cos,
            sin,
            out,
            count,
            q.shape[1] // k.shape[1],
            q.shape[-1] ** -0.5 if scale is None else scale,
            q.shape[-1],
            v.shape[-1],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *index.stride()[:2],
            *out.stride()[:3],
            CAUSAL=causal,
            ROTARY=rotation is not None,
            SCATTER=scatter,
            # Three TF32 products keep float32's accuracy.
            PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
            QUERIES=BLOCK_QUERIES,
            KEYS=BLOCK_KEYS,
            D=max(16, triton.next_power_of_2(q.shape[-1])),
            DV=max(16, triton.next_power_of_2(v.shape[-1])),
        )
    return out
