"""The selective scan in Triton (arXiv 2312.00752): one pass over time, states in registers.

One program owns a block of channels of one batch item. It reads u, d, B and C once and writes y once;
the states never reach memory. For the gradients it leaves the state at the start of every block of
time; the backward pass redoes a block forward into a scratch that only this program sees, then walks
it back. Sums over channels (gradients of B and C) are written once a channel block and added by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
# Arguments whose value must not lead to another compilation.
COUNTS = ["length", "blocks"]


@triton.jit
def _place(t, length, seg_ptr, order_ptr, REVERSE: tl.constexpr, HAS_SEG: tl.constexpr, HAS_ORDER: tl.constexpr):  # fmt: skip
    """Step of the scan -> (position in memory, 1.0 where the state goes on, else 0.0)."""
    index = t
    before = tl.maximum(t - 1, 0)
    if REVERSE:
        index = length - 1 - t
        before = length - 1 - before
    inside = t < length
    keep = 1.0
    if HAS_SEG:
        here = tl.load(seg_ptr + index, mask=inside, other=0)
        there = tl.load(seg_ptr + before, mask=inside, other=0)
        keep = tl.where(here == there, 1.0, 0.0)
    place = index
    if HAS_ORDER:
        place = tl.load(order_ptr + index, mask=inside, other=0)
    # Positions times strides pass 2^31 at a million steps.
    return place.to(tl.int64), keep


@triton.jit(do_not_specialize=COUNTS)
def _scan_kernel(
    u_ptr, d_ptr, A_ptr, B_ptr, C_ptr, start_ptr, seg_ptr, order_ptr, y_ptr, end_ptr, kept_ptr,
    length, blocks, dim, channels, programs,
    sub, sud, sul, sdb, sdd, sdl, sbb, sbg, sbn, sbl, scb, scg, scn, scl, syb, syd, syl,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
    REVERSE: tl.constexpr, HAS_SEG: tl.constexpr, HAS_ORDER: tl.constexpr,
    WRITE: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """WRITE: y. KEEP: the state at the start of every block of time."""
    group = tl.program_id(0) // programs
    own = (tl.program_id(0) % programs) * BD + tl.arange(0, BD)
    item = tl.program_id(1).to(tl.int64)
    ch = group * channels + own
    ch_in = own < channels
    n = tl.arange(0, BN)
    n_in = n < N
    tile = (item * dim + ch)[:, None] * N + n[None, :]
    tile_in = ch_in[:, None] & n_in[None, :]
    A = tl.load(A_ptr + ch[:, None] * N + n[None, :], mask=tile_in, other=0.0)
    state = tl.load(start_ptr + tile, mask=tile_in, other=0.0)
    seg_ptr += item * length
    size = tl.num_programs(1).to(tl.int64) * dim * N
    for block in range(blocks):
        if KEEP:
            tl.store(
                kept_ptr + block * size + tile,
                state,
                mask=tile_in,
            )
        for i in range(T):
            t = block * T + i
            place, keep = _place(t, length, seg_ptr, order_ptr, REVERSE, HAS_SEG, HAS_ORDER)
            here = ch_in & (t < length)
            d = tl.load(d_ptr + item * sdb + ch * sdd + place * sdl, mask=here, other=0.0)
            u = tl.load(u_ptr + item * sub + ch * sud + place * sul, mask=here, other=0.0).to(
                tl.float32
            )
            b_in = n_in & (t < length)
            b = tl.load(
                B_ptr + item * sbb + group * sbg + n * sbn + place * sbl, mask=b_in, other=0.0
            ).to(tl.float32)
            state = tl.exp(d[:, None] * A) * keep * state + (d * u)[:, None] * b[None, :]
            if WRITE:
                c = tl.load(
                    C_ptr + item * scb + group * scg + n * scn + place * scl, mask=b_in, other=0.0
                ).to(tl.float32)
                y = tl.sum(state * c[None, :], 1)
                at = y_ptr + item * syb + ch * syd + place * syl
                if ADD:
                    y += tl.load(at, mask=here, other=0.0)
                tl.store(at, y.to(y_ptr.dtype.element_ty), mask=here)
    tl.store(end_ptr + tile, state, mask=tile_in)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    dy_ptr, u_ptr, d_ptr, A_ptr, B_ptr, C_ptr, dend_ptr, seg_ptr, order_ptr, kept_ptr, scratch_ptr,
    du_ptr, dd_ptr, dA_ptr, dB_ptr, dC_ptr, dstart_ptr,
    length, blocks, dim, channels, programs,
    sgb, sgd, sgl, sub, sud, sul, sdb, sdd, sdl, sbb, sbg, sbn, sbl, scb, scg, scn, scl,
    svb, svd, svl, swb, swd, swl,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
    REVERSE: tl.constexpr, HAS_SEG: tl.constexpr, HAS_ORDER: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    own = part * BD + tl.arange(0, BD)
    item = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    ch = group * channels + own
    ch_in = own < channels
    n = tl.arange(0, BN)
    n_in = n < N
    tile = (item * dim + ch)[:, None] * N + n[None, :]
    tile_in = ch_in[:, None] & n_in[None, :]
    A = tl.load(A_ptr + ch[:, None] * N + n[None, :], mask=tile_in, other=0.0)
    carried = tl.load(dend_ptr + tile, mask=tile_in, other=0.0)
    dA = tl.zeros((BD, BN), tl.float32)
    seg_ptr += item * length
    scratch = (item * tl.num_programs(0) + tl.program_id(0)) * (T * BD * BN)
    size = batch.to(tl.int64) * dim * N
    cell = tl.arange(0, BD)[:, None] * BN + n[None, :]
    for back in range(blocks):
        block = blocks - 1 - back
        state = tl.load(kept_ptr + block * size + tile, mask=tile_in, other=0.0)
        for i in range(T):
            t = block * T + i
            place, keep = _place(t, length, seg_ptr, order_ptr, REVERSE, HAS_SEG, HAS_ORDER)
            here = ch_in & (t < length)
            b_in = n_in & (t < length)
            d = tl.load(d_ptr + item * sdb + ch * sdd + place * sdl, mask=here, other=0.0)
            u = tl.load(u_ptr + item * sub + ch * sud + place * sul, mask=here, other=0.0).to(
                tl.float32
            )
            b = tl.load(
                B_ptr + item * sbb + group * sbg + n * sbn + place * sbl, mask=b_in, other=0.0
            ).to(tl.float32)
            tl.store(scratch_ptr + scratch + i * (BD * BN) + cell, state)
            state = tl.exp(d[:, None] * A) * keep * state + (d * u)[:, None] * b[None, :]
        tl.debug_barrier()
        for j in range(T):
            i = T - 1 - j
            t = block * T + i
            place, keep = _place(t, length, seg_ptr, order_ptr, REVERSE, HAS_SEG, HAS_ORDER)
            here = ch_in & (t < length)
            b_in = n_in & (t < length)
            d = tl.load(d_ptr + item * sdb + ch * sdd + place * sdl, mask=here, other=0.0)
            u = tl.load(u_ptr + item * sub + ch * sud + place * sul, mask=here, other=0.0).to(
                tl.float32
            )
            b = tl.load(
                B_ptr + item * sbb + group * sbg + n * sbn + place * sbl, mask=b_in, other=0.0
            ).to(tl.float32)
            c = tl.load(
                C_ptr + item * scb + group * scg + n * scn + place * scl, mask=b_in, other=0.0
            ).to(tl.float32)
            dy = tl.load(dy_ptr + item * sgb + ch * sgd + place * sgl, mask=here, other=0.0).to(
                tl.float32
            )
            before = tl.load(scratch_ptr + scratch + i * (BD * BN) + cell)
            decay = tl.exp(d[:, None] * A) * keep
            decayed = decay * before
            state = decayed + (d * u)[:, None] * b[None, :]
            dstate = carried + dy[:, None] * c[None, :]
            carried = decay * dstate
            dlog = dstate * decayed
            dA += dlog * d[:, None]
            dscaled = tl.sum(dstate * b[None, :], 1)
            dd = dscaled * u + tl.sum(dlog * A, 1)
            tl.store(dd_ptr + item * swb + ch * swd + place * swl, dd, mask=here)
            du = dscaled * d
            at = du_ptr + item * svb + ch * svd + place * svl
            if ADD:
                du += tl.load(at, mask=here, other=0.0)
            tl.store(at, du.to(du_ptr.dtype.element_ty), mask=here)
            groups = tl.num_programs(0) // programs
            row = (((part * batch + item) * groups + group) * length + place) * N + n
            tl.store(dC_ptr + row, tl.sum(state * dy[:, None], 0), mask=b_in)
            tl.store(dB_ptr + row, tl.sum(dstate * (d * u)[:, None], 0), mask=b_in)
        tl.debug_barrier()
    tl.store(dstart_ptr + tile, carried, mask=tile_in)
    tl.store(dA_ptr + tile, dA, mask=tile_in)


@triton.jit
def _step_kernel(
    state_ptr, u_ptr, d_ptr, A_ptr, B_ptr, C_ptr, y_ptr, dim, channels,
    ssb, ssd, ssn, sub, sud, sdb, sdd, sbb, sbg, sbn, scb, scg, scn,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    item = tl.program_id(1).to(tl.int64)
    ch_in = ch < dim
    n = tl.arange(0, BN)
    tile_in = ch_in[:, None] & (n < N)[None, :]
    group = ch // channels
    at = state_ptr + item * ssb + ch[:, None] * ssd + n[None, :] * ssn
    state = tl.load(at, mask=tile_in, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + ch[:, None] * N + n[None, :], mask=tile_in, other=0.0)
    d = tl.load(d_ptr + item * sdb + ch * sdd, mask=ch_in, other=0.0)
    u = tl.load(u_ptr + item * sub + ch * sud, mask=ch_in, other=0.0).to(tl.float32)
    b_at = B_ptr + item * sbb + group[:, None] * sbg + n[None, :] * sbn
    c_at = C_ptr + item * scb + group[:, None] * scg + n[None, :] * scn
    b = tl.load(b_at, mask=tile_in, other=0.0).to(tl.float32)
    c = tl.load(c_at, mask=tile_in, other=0.0).to(tl.float32)
    state = tl.exp(d[:, None] * A) * state + (d * u)[:, None] * b
    tl.store(at, state.to(state_ptr.dtype.element_ty), mask=tile_in)
    y = tl.sum(state * c, 1)
    tl.store(y_ptr + item * dim + ch, y.to(y_ptr.dtype.element_ty), mask=ch_in)


def _sizes(channels: int, state_size: int) -> dict[str, int]:
    """Tiles and warps, by channels of a group and state size alone."""
    columns = triton.next_power_of_2(state_size)
    rows = min(triton.next_power_of_2(channels), max(256 // columns, 1))
    return {"N": state_size, "BN": columns, "BD": rows, "num_warps": 1}


def _setting(u, d, A, B, segments, order, reverse, r):
    """Grid, counts and constants of a launch, and the pointers to segments and order."""
    batch, dim, length = u.shape
    groups, state_size = B.shape[2:4]
    channels = dim // groups
    sizes = _sizes(channels, state_size)
    programs = -(-channels // sizes["BD"])
    counts = (length, -(-length // BLOCK), dim, channels, programs)
    options = {
        **sizes,
        "T": BLOCK,
        "REVERSE": bool(r) if len(d) == 2 else reverse,
        "HAS_SEG": segments is not None,
        "HAS_ORDER": order is not None,
    }
    # Triton wants a pointer even where it is not followed.
    pointers = (
        A if segments is None else segments.contiguous(),
        A if order is None else order.contiguous(),
    )
    return (groups * programs, batch), counts, options, pointers


def _start(initial: Tensor | None, u: Tensor, A: Tensor, r: int) -> Tensor:
    start = torch.zeros(*u.shape[:2], A.shape[-1], device=u.device)
    return start if initial is None else start.copy_(initial[r])


def forward(
    u: Tensor,
    d: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
    order: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """As `.blocked.forward`."""
    y = torch.empty_like(u)
    A = A.contiguous()
    final = torch.empty(len(d), *u.shape[:2], A.shape[-1], device=u.device)
    for r in range(len(d)):
        grid, counts, options, pointers = _setting(u, d, A, B, segments, order, reverse, r)
        _scan_kernel[grid](
            u, d[r], A[r], B[r], C[r], _start(initial, u, A, r), *pointers, y, final[r], final[r],
            *counts, *u.stride(), *d[r].stride(), *B[r].stride(), *C[r].stride(), *y.stride(),
            WRITE=True, ADD=r > 0, KEEP=False, **options,
        )  # fmt: skip
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor,
    u: Tensor,
    d: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
    order: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `.blocked.backward`."""
    device = u.device
    du, dd = torch.empty_like(u), torch.empty_like(d)
    A = A.contiguous()
    batch, dim, length = u.shape
    groups, state_size = B.shape[2:4]
    dA = torch.empty(len(d), batch, dim, state_size, device=device)
    dB, dC, dinitial = [], [], torch.empty_like(dA)
    for r in range(len(d)):
        grid, counts, options, pointers = _setting(u, d, A, B, segments, order, reverse, r)
        kept = torch.empty(counts[1], batch, dim, state_size, device=device)
        end = torch.empty(batch, dim, state_size, device=device)
        strides = (*u.stride(), *d[r].stride(), *B[r].stride(), *C[r].stride())
        _scan_kernel[grid](
            u, d[r], A[r], B[r], C[r], _start(initial, u, A, r), *pointers, u, end, kept,
            *counts, *strides, *u.stride(), WRITE=False, ADD=False, KEEP=True, **options,
        )  # fmt: skip
        scratch = torch.empty(grid[0] * batch, BLOCK, options["BD"], options["BN"], device=device)
        parts = torch.empty(2, counts[4], batch, groups, length, state_size, device=device)
        _backward_kernel[grid](
            dy, u, d[r], A[r], B[r], C[r], dfinal[r].float().contiguous(), *pointers, kept, scratch,
            du, dd[r], dA[r], parts[0], parts[1], dinitial[r],
            *counts, *dy.stride(), *strides, *du.stride(), *dd[r].stride(), ADD=r > 0, **options,
        )  # fmt: skip
        dB.append(parts[0].sum(0).transpose(2, 3))
        dC.append(parts[1].sum(0).transpose(2, 3))
    return (
        du,
        dd,
        dA.sum(1).to(A.dtype),
        torch.stack(dB).to(B.dtype).contiguous(),
        torch.stack(dC).to(C.dtype).contiguous(),
        dinitial,
    )


def step(state: Tensor, u: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As `.blocked.step`."""
    batch, dim = u.shape
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    sizes = _sizes(dim, A.shape[-1])
    _step_kernel[(-(-dim // sizes["BD"]), batch)](
        state, u, d, A.float().contiguous(), B, C, y, dim, dim // B.shape[1],
        *state.stride(), *u.stride(), *d.stride(), *B.stride(), *C.stride(), **sizes,
    )  # fmt: skip
    return y
