"""SSD in Triton (Dao and Gu, arXiv 2405.21060): one pass forward, recomputation backward.

Forward: one program owns (a run of chunks, a head and a block of its channels, a batch item) and walks
the run's chunks with the state in registers; every input is read once and y is written once. Where
batch x heads do not fill the GPU, the sequence is cut into several runs: a first pass finds the state
at the end of each run, and a short sum over the runs gives the states they start from.

Backward: two passes keep the state entering every chunk and the gradient of the state leaving it; then
all chunks are independent. One program owns (chunk, group, batch item) and walks the group's heads, so
that the gradients of B and C are summed in registers.

A second direction is a second launch that adds to the first one's output. Sizes of tiles and numbers
of warps follow from head size, state size and dtype alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

# Arguments whose value must not lead to another compilation.
COUNTS = ["length", "chunks", "chunks_per_run"]


@triton.jit
def _place(t, length, order, REVERSE: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Steps of the scan -> (index in forward scan order, position in memory)."""
    index = t
    if REVERSE:
        index = length - 1 - t
    place = index
    if HAS_ORDER:
        place = tl.load(order + index, mask=(t >= 0) & (t < length), other=0)
    # Positions times strides pass 2^31 at a million steps.
    return index, place.to(tl.int64)


@triton.jit
def _decay(
    d_ptr, decay, seg_ptr, k, t, length, index, place, stride_d,
    Q: tl.constexpr, REVERSE: tl.constexpr, SHIFT: tl.constexpr, HAS_SEG: tl.constexpr,
):  # fmt: skip
    """Of one chunk: d, its log decays a, their sums c, the sums at which outputs read, their total,
    and the document masks of outputs, inputs and the carried state."""
    inside = t < length
    d = tl.load(d_ptr + place * stride_d, mask=inside, other=0.0)
    # Below -110 exp is 0 in float32 anyway, and the sum stays finite.
    a = tl.maximum(d * decay, -110.0)
    c = tl.cumsum(a, 0)
    total = tl.sum(a, 0)
    row = c
    if SHIFT:
        row = c - a
    reading = inside
    writing = inside
    carried = total == total
    segment = t * 0
    if HAS_SEG:
        segment = tl.load(seg_ptr + index, mask=inside, other=-1)
        first = k * Q - 1
        first = tl.maximum(first, 0)
        last = tl.minimum(k * Q + Q, length) - 1
        if REVERSE:
            first = length - 1 - first
            last = length - 1 - last
        entering = tl.load(seg_ptr + first)
        leaving = tl.load(seg_ptr + last)
        reading = inside & (segment == entering)
        writing = inside & (segment == leaving)
        carried = leaving == entering
    reads = tl.where(reading, tl.exp(row), 0.0)
    writes = tl.where(writing, tl.exp(tl.minimum(total - c, 0.0)), 0.0)
    carry = tl.where(carried, tl.exp(total), 0.0)
    return d, c, row, segment, reads, writes, carry


@triton.jit(do_not_specialize=COUNTS)
def _state_kernel(
    x_ptr, d_ptr, A_ptr, B_ptr, start_ptr, seg_ptr, order_ptr, end_ptr, carry_ptr, chunk_ptr,
    length, chunks, chunks_per_run, heads, share,
    sxb, sxl, sxh, sxp, sdb, sdl, sdh, sbb, sbl, sbg, sbn,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    REVERSE: tl.constexpr, SHIFT: tl.constexpr, ADJOINT: tl.constexpr,
    HAS_SEG: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_START: tl.constexpr,
    STORE_CHUNKS: tl.constexpr,
):  # fmt: skip
    """The state at the end of a run of chunks, and on request the one entering each chunk.

    ADJOINT: the gradient of the state, from the last chunk to the first; x is dy and B is C.
    """
    blocks = tl.cdiv(P, BP)
    run = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    head = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    p = block * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_in = p < P
    n_in = n < N
    x_ptr += item * sxb + head * sxh
    d_ptr += item * sdb + head * sdh
    B_ptr += item * sbb + (head // share) * sbg
    seg_ptr += item * length
    A = tl.load(A_ptr + head)
    own = ((run * batch + item) * heads + head).to(tl.int64) * P * N
    tile = p[:, None] * N + n[None, :]
    tile_in = p_in[:, None] & n_in[None, :]
    state = tl.zeros((BP, BN), tl.float32)
    if HAS_START:
        state = tl.load(start_ptr + own + tile, mask=tile_in, other=0.0)
    product = 1.0
    for step in range(run * chunks_per_run, tl.minimum((run + 1) * chunks_per_run, chunks)):
        k = step
        if ADJOINT:
            k = chunks - 1 - step
        t = k * Q + tl.arange(0, Q)
        inside = t < length
        index, place = _place(t, length, order_ptr, REVERSE, HAS_ORDER)
        d, _c, _row, _seg, reads, writes, carry = _decay(
            d_ptr, A, seg_ptr, k, t, length, index, place, sdl, Q, REVERSE, SHIFT, HAS_SEG
        )
        if STORE_CHUNKS:
            at = ((item * heads + head) * chunks + k).to(tl.int64) * P * N
            tl.store(chunk_ptr + at + tile, state.to(chunk_ptr.dtype.element_ty), mask=tile_in)
        x_at = x_ptr + place[:, None] * sxl + p[None, :] * sxp
        x = tl.load(x_at, mask=inside[:, None] & p_in[None, :], other=0.0)
        weight = writes * d
        b_in = inside
        b_place = place
        if ADJOINT:
            weight = reads
            if SHIFT:
                _, b_place = _place(t - 1, length, order_ptr, REVERSE, HAS_ORDER)
                b_in = inside & (t >= 1)
        b_at = B_ptr + b_place[:, None] * sbl + n[None, :] * sbn
        b = tl.load(b_at, mask=b_in[:, None] & n_in[None, :], other=0.0)
        written = (x * weight[:, None]).to(b.dtype)
        state = state * carry + tl.dot(tl.trans(written), b, input_precision="ieee")
        product = product * carry
    tl.store(end_ptr + own + tile, state, mask=tile_in)
    if block == 0:
        tl.store(carry_ptr + (run * batch + item) * heads + head, product)


@triton.jit(do_not_specialize=COUNTS)
def _scan_kernel(
    x_ptr, d_ptr, A_ptr, B_ptr, C_ptr, start_ptr, seg_ptr, order_ptr, y_ptr, end_ptr,
    length, chunks, chunks_per_run, heads, share,
    sxb, sxl, sxh, sxp, sdb, sdl, sdh, sbb, sbl, sbg, sbn, scb, scl, scg, scn, syb, syl, syh, syp,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    REVERSE: tl.constexpr, SHIFT: tl.constexpr, ADD: tl.constexpr,
    HAS_SEG: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """y of a run of chunks, and the state at its end."""
    blocks = tl.cdiv(P, BP)
    run = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    head = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    p = block * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    q = tl.arange(0, Q)
    p_in = p < P
    n_in = n < N
    x_ptr += item * sxb + head * sxh
    y_ptr += item * syb + head * syh
    d_ptr += item * sdb + head * sdh
    B_ptr += item * sbb + (head // share) * sbg
    C_ptr += item * scb + (head // share) * scg
    seg_ptr += item * length
    A = tl.load(A_ptr + head)
    own = ((run * batch + item) * heads + head).to(tl.int64) * P * N
    tile = p[:, None] * N + n[None, :]
    tile_in = p_in[:, None] & n_in[None, :]
    state = tl.load(start_ptr + own + tile, mask=tile_in, other=0.0)
    for k in range(run * chunks_per_run, tl.minimum((run + 1) * chunks_per_run, chunks)):
        t = k * Q + q
        inside = t < length
        index, place = _place(t, length, order_ptr, REVERSE, HAS_ORDER)
        d, c, row, segment, reads, writes, carry = _decay(
            d_ptr, A, seg_ptr, k, t, length, index, place, sdl, Q, REVERSE, SHIFT, HAS_SEG
        )
        x_at = x_ptr + place[:, None] * sxl + p[None, :] * sxp
        x_in = inside[:, None] & p_in[None, :]
        x = tl.load(x_at, mask=x_in, other=0.0)
        b_at = B_ptr + place[:, None] * sbl + n[None, :] * sbn
        b = tl.load(b_at, mask=inside[:, None] & n_in[None, :], other=0.0)
        c_place = place
        c_in = inside
        if SHIFT:
            _, c_place = _place(t - 1, length, order_ptr, REVERSE, HAS_ORDER)
            c_in = inside & (t >= 1)
        c_at = C_ptr + c_place[:, None] * scl + n[None, :] * scn
        cc = tl.load(c_at, mask=c_in[:, None] & n_in[None, :], other=0.0)

        pairs = q[:, None] >= q[None, :]
        if SHIFT:
            pairs = q[:, None] > q[None, :]
        if HAS_SEG:
            pairs = pairs & (segment[:, None] == segment[None, :])
        scores = tl.dot(cc, tl.trans(b), input_precision="ieee")
        weight = tl.exp(tl.minimum(row[:, None] - c[None, :], 0.0)) * d[None, :]
        # A select, not a product: what is masked may be infinite.
        scores = tl.where(pairs, scores * weight, 0.0)
        y = tl.dot(cc, tl.trans(state).to(cc.dtype), input_precision="ieee") * reads[:, None]
        y += tl.dot(scores.to(x.dtype), x, input_precision="ieee")
        y_at = y_ptr + place[:, None] * syl + p[None, :] * syp
        if ADD:
            y += tl.load(y_at, mask=x_in, other=0.0)
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=x_in)
        written = (x * (writes * d)[:, None]).to(b.dtype)
        state = state * carry + tl.dot(tl.trans(written), b, input_precision="ieee")
    tl.store(end_ptr + own + tile, state, mask=tile_in)


@triton.jit(do_not_specialize=COUNTS)
def _chunk_backward_kernel(
    dy_ptr, x_ptr, d_ptr, A_ptr, B_ptr, C_ptr, state_ptr, dstate_ptr, seg_ptr, order_ptr,
    dx_ptr, dd_ptr, dA_ptr, dB_ptr, dC_ptr,
    length, chunks, heads, groups,
    sgb, sgl, sgh, sgp, sxb, sxl, sxh, sxp, sdb, sdl, sdh, sbb, sbl, sbg, sbn, scb, scl, scg, scn,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    SHARE: tl.constexpr, REVERSE: tl.constexpr, SHIFT: tl.constexpr, ADD: tl.constexpr,
    HAS_SEG: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk, for all heads of a group; names as in `.chunked.backward`."""
    k = tl.program_id(0)
    group = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BN)
    n_in = n < N
    t = k * Q + q
    inside = t < length
    index, place = _place(t, length, order_ptr, REVERSE, HAS_ORDER)
    c_place = place
    c_in = inside
    if SHIFT:
        _, c_place = _place(t - 1, length, order_ptr, REVERSE, HAS_ORDER)
        c_in = inside & (t >= 1)
    b_at = B_ptr + item * sbb + group * sbg + place[:, None] * sbl + n[None, :] * sbn
    c_at = C_ptr + item * scb + group * scg + c_place[:, None] * scl + n[None, :] * scn
    b = tl.load(b_at, mask=inside[:, None] & n_in[None, :], other=0.0)
    cc = tl.load(c_at, mask=c_in[:, None] & n_in[None, :], other=0.0)
    product = tl.dot(cc, tl.trans(b), input_precision="ieee")
    dproduct = tl.zeros((Q, Q), tl.float32)
    db = tl.zeros((Q, BN), tl.float32)
    dc = tl.zeros((Q, BN), tl.float32)
    seg_ptr += item * length
    for h in range(SHARE):
        head = group * SHARE + h
        A = tl.load(A_ptr + head)
        d, c, row, segment, reads, writes, carry = _decay(
            d_ptr + item * sdb + head * sdh, A, seg_ptr, k, t, length, index, place, sdl,
            Q, REVERSE, SHIFT, HAS_SEG,
        )  # fmt: skip
        pairs = q[:, None] >= q[None, :]
        if SHIFT:
            pairs = q[:, None] > q[None, :]
        if HAS_SEG:
            pairs = pairs & (segment[:, None] == segment[None, :])
        weight = tl.where(pairs, tl.exp(tl.minimum(row[:, None] - c[None, :], 0.0)), 0.0)
        scores = weight * product
        dscores = tl.zeros((Q, Q), tl.float32)
        reading = tl.zeros((Q,), tl.float32)
        leaving = tl.zeros((Q,), tl.float32)
        dsteps = tl.zeros((Q,), tl.float32)
        through = 0.0
        state_at = ((item * heads + head) * chunks + k).to(tl.int64) * P * N
        for block in tl.static_range((P + BP - 1) // BP):
            p = block * BP + tl.arange(0, BP)
            x_in = inside[:, None] & (p < P)[None, :]
            x_at = item * sxb + head * sxh + place[:, None] * sxl + p[None, :] * sxp
            dy_at = item * sgb + head * sgh + place[:, None] * sgl + p[None, :] * sgp
            x = tl.load(x_ptr + x_at, mask=x_in, other=0.0)
            dy = tl.load(dy_ptr + dy_at, mask=x_in, other=0.0)
            tile = state_at + p[:, None] * N + n[None, :]
            tile_in = (p < P)[:, None] & n_in[None, :]
            state = tl.load(state_ptr + tile, mask=tile_in, other=0.0)
            dstate = tl.load(dstate_ptr + tile, mask=tile_in, other=0.0)
            scaled = (x * d[:, None]).to(x.dtype)
            dscores += tl.dot(dy, tl.trans(scaled), input_precision="ieee")
            read = tl.dot(cc, tl.trans(state), input_precision="ieee")
            write = tl.dot(b, tl.trans(dstate), input_precision="ieee")
            dscaled = tl.dot(tl.trans(scores.to(dy.dtype)), dy, input_precision="ieee")
            dscaled += write * writes[:, None]
            dx = dscaled * d[:, None]
            dx_at = dx_ptr + (item * length + place[:, None]) * (heads * P) + head * P + p[None, :]
            if ADD:
                dx += tl.load(dx_at, mask=x_in, other=0.0)
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=x_in)
            dread = dy * reads[:, None]
            dc += tl.dot(dread.to(state.dtype), state, input_precision="ieee")
            wrote = (scaled * writes[:, None]).to(dstate.dtype)
            db += tl.dot(wrote, dstate, input_precision="ieee")
            reading += tl.sum(read * dread, 1)
            leaving += tl.sum(write * scaled, 1) * writes
            dsteps += tl.sum(dscaled * x, 1)
            through += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        both = scores * dscores
        dproduct += weight * dscores
        reading += tl.sum(both, 1)
        written = tl.sum(both, 0)
        after = tl.sum(reading, 0) - tl.cumsum(reading, 0)
        if not SHIFT:
            after += reading
        dlog = after - (tl.sum(written, 0) - tl.cumsum(written, 0) + written)
        dlog += tl.cumsum(leaving, 0) - leaving + through * carry
        dsteps += dlog * A
        at = (item * length + place) * heads + head
        tl.store(dd_ptr + at, dsteps, mask=inside)
        dA = tl.sum(tl.where(inside, dlog * d, 0.0), 0)
        tl.store(dA_ptr + (item * chunks + k) * heads + head, dA)
    dproduct = dproduct.to(b.dtype)
    dc += tl.dot(dproduct, b, input_precision="ieee")
    db += tl.dot(tl.trans(dproduct), cc, input_precision="ieee")
    db_at = dB_ptr + ((item * length + place) * groups + group)[:, None] * N + n[None, :]
    dc_at = dC_ptr + ((item * length + c_place) * groups + group)[:, None] * N + n[None, :]
    tl.store(db_at, db.to(dB_ptr.dtype.element_ty), mask=inside[:, None] & n_in[None, :])
    tl.store(dc_at, dc.to(dC_ptr.dtype.element_ty), mask=c_in[:, None] & n_in[None, :])


@triton.jit
def _step_kernel(
    state_ptr, x_ptr, d_ptr, A_ptr, B_ptr, C_ptr, y_ptr, heads, share,
    ssb, ssh, ssp, ssn, sxb, sxh, sxp, sdb, sdh, sbb, sbg, sbn, scb, scg, scn,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_in = p < P
    n_in = n < N
    d = tl.load(d_ptr + item * sdb + head * sdh)
    decay = tl.exp(d * tl.load(A_ptr + head))
    x = tl.load(x_ptr + item * sxb + head * sxh + p * sxp, mask=p_in, other=0.0).to(tl.float32)
    group = head // share
    b = tl.load(B_ptr + item * sbb + group * sbg + n * sbn, mask=n_in, other=0.0).to(tl.float32)
    c = tl.load(C_ptr + item * scb + group * scg + n * scn, mask=n_in, other=0.0).to(tl.float32)
    at = state_ptr + item * ssb + head * ssh + p[:, None] * ssp + n[None, :] * ssn
    tile_in = p_in[:, None] & n_in[None, :]
    state = tl.load(at, mask=tile_in, other=0.0).to(tl.float32)
    state = state * decay + (x * d)[:, None] * b[None, :]
    tl.store(at, state.to(state_ptr.dtype.element_ty), mask=tile_in)
    y = tl.sum(state * c[None, :], 1)
    tl.store(y_ptr + (item * heads + head) * P + p, y.to(y_ptr.dtype.element_ty), mask=p_in)


def _sizes(head_dim: int, state_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages, by head size, state size and dtype alone."""
    rows = min(max(triton.next_power_of_2(head_dim), 16), 64)
    columns = max(triton.next_power_of_2(state_size), 16)
    return {
        "P": head_dim,
        "N": state_size,
        "BP": rows,
        "BN": columns,
        "num_warps": 4 if rows * columns <= 64 * 64 else 8,
        "num_stages": 1 if dtype == torch.float32 else 3,
    }


def _chunk(state_size: int, dtype: torch.dtype) -> int:
    return 64 if state_size * dtype.itemsize <= 256 else 32


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 8


def _runs(programs: int, chunks: int, device: torch.device) -> tuple[int, int]:
    """(runs, chunks of a run) that fill the device; how often a kernel starts, not how it is built."""
    wanted = min(chunks, -(-2 * _processors(device) // programs))
    if programs >= _processors(device):
        wanted = 1
    size = -(-chunks // wanted)
    return -(-chunks // size), size


def _directions(x, d, A, B, C, initial, segments, order, reverse, shift):
    """What the launches of each direction share."""
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[-2:]
    sizes = _sizes(head_dim, state_size, x.dtype)
    size = _chunk(state_size, x.dtype)
    chunks = -(-length // size)
    blocks = -(-head_dim // sizes["BP"])
    runs, chunks_per_run = _runs(batch * heads * blocks, chunks, x.device)
    for r in range(len(d)):
        start = torch.zeros(batch, heads, head_dim, state_size, device=x.device)
        if initial is not None:
            start.copy_(initial[r])
        yield SimpleNamespace(
            x=x,
            d=d[r],
            A=A[r].contiguous(),
            B=B[r],
            C=C[r],
            start=start,
            # Triton wants a pointer even where it is not followed.
            segments=A if segments is None else segments.contiguous(),
            order=A if order is None else order.contiguous(),
            length=length,
            heads=heads,
            groups=groups,
            chunks=chunks,
            runs=runs,
            chunks_per_run=chunks_per_run,
            grid=(runs * blocks, heads, batch),
            options={
                **sizes,
                "Q": size,
                "REVERSE": bool(r) if len(d) == 2 else reverse,
                "SHIFT": shift,
                "HAS_SEG": segments is not None,
                "HAS_ORDER": order is not None,
            },
        )


def _launch_states(
    one: SimpleNamespace, x, B, start, adjoint, runs, chunks_per_run, chunk_states=None
):
    """Ends ``[runs, B, H, P, N]`` and carries ``[runs, B, H]`` of the runs, started from ``start``."""
    batch, _, heads, head_dim = x.shape
    ends = x.new_empty(runs, batch, heads, head_dim, B.shape[-1], dtype=torch.float32)
    carries = x.new_empty(runs, batch, heads, dtype=torch.float32)
    blocks = one.grid[0] // one.runs
    _state_kernel[(runs * blocks, heads, batch)](
        x, one.d, one.A, B, ends if start is None else start, one.segments, one.order, ends,
        carries, ends if chunk_states is None else chunk_states,
        one.length, one.chunks, chunks_per_run, heads, heads // one.groups,
        *x.stride(), *one.d.stride(), *B.stride(),
        ADJOINT=adjoint, HAS_START=start is not None, STORE_CHUNKS=chunk_states is not None,
        **one.options,
    )  # fmt: skip
    return ends, carries


def _run_starts(one: SimpleNamespace, x: Tensor, B: Tensor, first: Tensor, adjoint: bool) -> Tensor:
    """The state at the start of each run, ``[runs, B, H, P, N]``."""
    if one.runs == 1:
        return first[None]
    ends, carries = _launch_states(one, x, B, None, adjoint, one.runs, one.chunks_per_run)
    starts = torch.empty_like(ends)
    starts[0] = first
    for run in range(1, one.runs):
        carried = starts[run - 1] * carries[run - 1, ..., None, None]
        torch.add(carried, ends[run - 1], out=starts[run])
    return starts


def forward(
    x: Tensor,
    d: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
    order: Tensor | None,
    reverse: bool,
    shift: bool,
) -> tuple[Tensor, Tensor]:
    """As `.chunked.forward`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = []
    for r, one in enumerate(_directions(x, d, A, B, C, initial, segments, order, reverse, shift)):
        starts = _run_starts(one, x, one.B, one.start, False)
        ends = torch.empty_like(starts)
        _scan_kernel[one.grid](
            x, one.d, one.A, one.B, one.C, starts, one.segments, one.order, y, ends,
            one.length, one.chunks, one.chunks_per_run, one.heads, one.heads // one.groups,
            *x.stride(), *one.d.stride(), *one.B.stride(), *one.C.stride(), *y.stride(),
            ADD=r > 0, **one.options,
        )  # fmt: skip
        final.append(ends[-1])
    return y, torch.stack(final)


def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    d: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
    order: Tensor | None,
    reverse: bool,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `.chunked.backward`."""
    batch, length, heads, head_dim = x.shape
    state_size = B.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dd = torch.empty(d.shape, dtype=torch.float32, device=x.device)
    dB = torch.empty(B.shape, dtype=B.dtype, device=x.device)
    # With a shift, nothing reads C of a scan's last step.
    dC = torch.zeros(C.shape, dtype=C.dtype, device=x.device)
    dA, dinitial = [], []
    for r, one in enumerate(_directions(x, d, A, B, C, initial, segments, order, reverse, shift)):
        kept = (batch, heads, one.chunks, head_dim, state_size)
        states, dstates = (torch.empty(kept, dtype=x.dtype, device=x.device) for _ in range(2))
        runs = (one.runs, one.chunks_per_run)
        starts = _run_starts(one, x, one.B, one.start, False)
        _launch_states(one, x, one.B, starts, False, *runs, states)
        starts = _run_starts(one, dy, one.C, dfinal[r].float().contiguous(), True)
        ends, _ = _launch_states(one, dy, one.C, starts, True, *runs, dstates)
        partial = torch.empty(batch, one.chunks, heads, device=x.device)
        _chunk_backward_kernel[(one.chunks, one.groups, batch)](
            dy, x, one.d, one.A, one.B, one.C, states, dstates, one.segments, one.order,
            dx, dd[r], partial, dB[r], dC[r],
            length, one.chunks, heads, one.groups,
            *dy.stride(), *x.stride(), *one.d.stride(), *one.B.stride(), *one.C.stride(),
            SHARE=heads // one.groups, ADD=r > 0, **one.options,
        )  # fmt: skip
        dA.append(partial.sum((0, 1)))
        dinitial.append(ends[-1])
    return dx, dd, torch.stack(dA).to(A.dtype), dB, dC, torch.stack(dinitial)


def step(state: Tensor, x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As `.chunked.step`."""
    batch, heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = _sizes(head_dim, B.shape[-1], x.dtype)
    grid = (-(-head_dim // sizes["BP"]), heads, batch)
    _step_kernel[grid](
        state, x, d, A, B, C, y, heads, heads // B.shape[1],
        *state.stride(), *x.stride(), *d.stride(), *B.stride(), *C.stride(), **sizes,
    )  # fmt: skip
    return y
