"""SSD in plain torch: matrix products inside chunks, a loop over chunks (arXiv 2405.21060, section 6).

What one chunk needs stays in a core's cache, and B C^T is formed once a group. The two directions of
a bidirectional scan share one score matrix: below its diagonal it is the forward scan's, above it
the reverse one's.

The state is held as ``[B, G, N, heads of the group * P]``, so that it is read and written by one
product a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


@dataclass
class Decays:
    """Factors of one direction, chunk by chunk in scan order; K chunks of Q steps.

    Attributes:
        row, column: logarithms ``[B, K, H, Q]``; what step j wrote is worth
            ``exp(row_i - column_j)`` where output i reads it.
        reads: ``[B, K, Q, H]``, of the state that enters the chunk, at each output.
        writes: ``[B, K, Q, H]``, of each step's input in the state that leaves the chunk.
        carry: ``[B, K, H]``, of the entering state in the leaving one.
    """

    row: Tensor
    column: Tensor
    reads: Tensor
    writes: Tensor
    carry: Tensor


def decays(
    d: Tensor, A: Tensor, segments: Tensor | None, reverse: bool, shift: bool, size: int
) -> Decays:
    """``d [B, L, H]`` and ``segments [B, L]`` in scan order, in chunks of ``size``."""
    batch, length, heads = d.shape
    padding = -length % size
    # Missing steps have d = 0: they decay nothing and write nothing.
    d = F.pad(d, (0, 0, 0, padding)).view(batch, -1, size, heads)
    # Below this, exp is 0 anyway, and the sum stays finite.
    a = (d * A).clamp(min=-750 if d.dtype == torch.float64 else -110)
    total = a.flip(2).cumsum(2).flip(2) if reverse else a.cumsum(2)
    first, last = (-1, 0) if reverse else (0, -1)
    whole = total[:, :, last]
    row = total - a if shift else total
    reads, writes, carry = row.exp(), (whole[:, :, None] - total).exp(), whole.exp()
    if segments is not None:
        s = F.pad(segments[:, None].float(), (0, padding), mode="replicate")[:, 0]
        s = s.view(batch, -1, size)
        leaving = s[:, :, last]
        start = s[:, -1:, first] if reverse else s[:, :1, first]
        parts = [leaving[:, 1:], start] if reverse else [start, leaving[:, :-1]]
        entering = torch.cat(parts, dim=1)
        reads = reads * (s == entering[:, :, None])[..., None]
        writes = writes * (s == leaving[:, :, None])[..., None]
        carry = carry * (leaving == entering)[..., None]
    return Decays(
        row.transpose(2, 3).contiguous(), total.transpose(2, 3).contiguous(), reads, writes, carry
    )


class Scan:
    """The arguments of one call, and how a chunk of each is taken."""

    def __init__(self, x, d, A, B, C, initial, segments, order, reverse, shift):
        self.kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.B, self.C, self.order, self.shift = x, B, C, order, shift
        self.segments = segments
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state_size = B.shape[-2:]
        self.reverse = (False, True) if len(d) == 2 else (reverse,)
        self.size = min(CHUNK, self.length)
        self.starts = range(0, self.length, self.size)
        self.d = d.to(self.kind)
        if order is not None:
            self.d = self.d[:, :, order]
        self.A = A.to(self.kind)
        self.decays = [
            decays(self.d[r], self.A[r], segments, backwards, shift, self.size)
            for r, backwards in enumerate(self.reverse)
        ]
        self.initial = initial

    def chunks(self, r: int):
        """(number, first step, end) of the chunks in the order in which direction r meets them."""
        rows = [(k, s, min(s + self.size, self.length)) for k, s in enumerate(self.starts)]
        return rows[::-1] if self.reverse[r] else rows

    def take(self, t: Tensor, start: int, stop: int) -> Tensor:
        """Steps of a ``[B, L, ...]``; of positions only, no permuted copy of the whole."""
        t = t[:, start:stop] if self.order is None else t[:, self.order[start:stop]]
        return t.to(self.kind)

    def put(self, into: Tensor, start: int, stop: int, value: Tensor, add: bool) -> None:
        """Store or add steps of a ``[B, L, ...]``."""
        if self.order is None:
            view = into[:, start:stop]
            view.add_(value) if add else view.copy_(value)
        elif add:
            into.index_add_(1, self.order[start:stop], value)
        else:
            into.index_copy_(1, self.order[start:stop], value)

    def read_steps(self, r: int, start: int, stop: int) -> tuple[int, int, tuple[int, int]]:
        """Steps whose C reads for outputs start..stop, and zero rows before and after them."""
        if not self.shift:
            return start, stop, (0, 0)
        if self.reverse[r]:
            end = min(stop + 1, self.length)
            return start + 1, end, (0, stop + 1 - end)
        begin = max(start - 1, 0)
        return begin, stop - 1, (begin - start + 1, 0)

    def take_C(self, r: int, start: int, stop: int) -> Tensor:
        """``[B, G, Q, N]``: with ``shift``, of the step before each output (zeros before the first)."""
        begin, end, padding = self.read_steps(r, start, stop)
        rows = self.take(self.C[r], begin, end)
        return F.pad(rows, (0, 0, 0, 0, *padding)).transpose(1, 2)

    def take_B(self, r: int, start: int, stop: int) -> Tensor:
        return self.take(self.B[r], start, stop).transpose(1, 2)

    def by_group(self, t: Tensor) -> Tensor:
        """``[B, Q, H, P]`` -> ``[B, G, Q, heads of the group * P]``."""
        return t.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(3)

    def by_head(self, t: Tensor) -> Tensor:
        """``[B, G, Q, heads of the group * P]`` -> ``[B, Q, H, P]``."""
        return t.unflatten(3, (-1, self.head_dim)).transpose(1, 2).flatten(2, 3)

    def pack(self, state: Tensor | None) -> Tensor:
        """``[B, H, P, N]`` -> ``[B, G, N, heads of the group * P]``, always a copy."""
        shape = (self.batch, self.groups, self.state_size, self.heads // self.groups, self.head_dim)
        packed = torch.zeros(shape, dtype=self.kind, device=self.x.device)
        if state is not None:
            packed.copy_(state.unflatten(1, (self.groups, -1)).permute(0, 1, 4, 2, 3))
        return packed.flatten(3)

    def unpack(self, packed: Tensor) -> Tensor:
        state = packed.unflatten(3, (-1, self.head_dim)).permute(0, 1, 3, 4, 2)
        return state.flatten(1, 2).contiguous()

    def advance(self, packed: Tensor, carry: Tensor, rows: Tensor, values: Tensor) -> None:
        """``packed = carry * packed + rows^T values`` in place; rows ``[B, G, Q, N]``."""
        share = carry.view(self.batch, self.groups, 1, -1, 1)
        packed.unflatten(3, (-1, self.head_dim)).mul_(share)
        packed.flatten(0, 1).baddbmm_(
            rows.transpose(2, 3).flatten(0, 1), self.by_group(values).flatten(0, 1)
        )

    def mask(self, reverse: bool, size: int) -> Tensor:
        """True ``[Q, Q]`` where output i (row) reads step j (column)."""
        square = torch.ones(size, size, dtype=torch.bool, device=self.x.device)
        return square.triu(int(self.shift)) if reverse else square.tril(-int(self.shift))

    def same_segment(self, start: int, stop: int) -> Tensor:
        s = self.segments[:, start:stop]
        return (s[:, :, None] == s[:, None])[:, None]


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
    """R = 1 direction (``reverse`` or not) or R = 2 (forward, reverse), their outputs added.

    Args:
        x: ``[B, L, H, P]``.
        d: discretised steps, float ``[R, B, L, H]``.
        A: ``[R, H]``.
        B, C: ``[R, B, L, G, N]``.
        initial: ``[R, B, H, P, N]``.
        segments: ``[B, L]`` in scan order: the state is dropped where the value changes.
        order: int64 ``[L]``, position of each scan step.
        shift: output i reads the state before step i with C of that earlier step.

    Returns:
        y ``[B, L, H, P]`` in x's dtype and the last states, float ``[R, B, H, P, N]``.
    """
    scan = Scan(x, d, A, B, C, initial, segments, order, reverse, shift)
    log_d = F.pad(scan.d, (0, 0, 0, -scan.length % scan.size)).log()
    log_d = log_d.unflatten(2, (-1, scan.size)).transpose(3, 4)
    columns = [scan.decays[r].column - log_d[r] for r in range(len(d))]
    d_chunks = F.pad(scan.d, (0, 0, 0, -scan.length % scan.size)).unflatten(2, (-1, scan.size))
    y = torch.empty(x.shape, dtype=scan.kind, device=x.device)
    final = []
    for r in range(len(d)):
        decay = scan.decays[r]
        writes = decay.writes * d_chunks[r]
        state = scan.pack(None if initial is None else initial[r])
        for k, start, stop in scan.chunks(r):
            size = stop - start
            values = scan.take(x, start, stop)
            rows = scan.take_C(r, start, stop)
            read = scan.by_head(rows @ state) * decay.reads[:, k, :size, :, None]
            if r == len(d) - 1:
                scores = _scores(scan, columns, k, start, stop)
                read += (scores @ values.transpose(1, 2)).transpose(1, 2)
            scan.put(y, start, stop, read, add=r > 0)
            written = values * writes[:, k, :size, :, None]
            scan.advance(state, decay.carry[:, k], scan.take_B(r, start, stop), written)
        final.append(scan.unpack(state))
    return y.to(x.dtype), torch.stack(final)


def _scores(scan: Scan, columns: list[Tensor], k: int, start: int, stop: int) -> Tensor:
    """``[B, H, Q, Q]``: what output i takes of x_j within a chunk, of all directions."""
    size = stop - start
    logs, products = [], []
    for r in range(len(columns)):
        row, column = scan.decays[r].row[:, k, :, :size], columns[r][:, k, :, :size]
        logs.append(row[..., :, None] - column[..., None, :])
        products.append(scan.take_C(r, start, stop) @ scan.take_B(r, start, stop).transpose(2, 3))
    log, product = logs[0], products[0]
    if len(columns) == 1:
        mask = scan.mask(scan.reverse[0], size)
        # Where the mask is not, exp may overflow: it must be excluded before, not multiplied by 0.
        log += torch.zeros_like(mask, dtype=scan.kind).masked_fill_(~mask, -math.inf)
    else:
        lower = torch.ones(size, size, dtype=torch.bool, device=log.device).tril()
        log = torch.where(lower, log, logs[1])
        diagonal = products[1].diagonal(dim1=2, dim2=3)
        product = torch.where(lower, product, products[1])
        if scan.shift:
            log.diagonal(dim1=2, dim2=3).fill_(-math.inf)
    if scan.segments is not None:
        product = product * scan.same_segment(start, stop)
    scores = log.exp_().unflatten(1, (scan.groups, -1)).mul_(product[:, :, None]).flatten(1, 2)
    if len(columns) == 2 and not scan.shift:
        share = scan.heads // scan.groups
        own = diagonal.repeat_interleave(share, dim=1) * scan.d[1, :, start:stop].transpose(1, 2)
        scores.diagonal(dim1=2, dim2=3).add_(own)
    return scores


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
    """Gradients of x, d, A, B, C and the initial state; everything is recomputed chunk by chunk.

    The gradient of a step's log decay is what flows across that step: pairs within the chunk (row
    sums less column sums of score times its gradient), the entering state's share in later outputs,
    earlier inputs' share in the leaving state, and the state that passes through.
    """
    scan = Scan(x, d, A, B, C, initial, segments, order, reverse, shift)
    d_chunks = F.pad(scan.d, (0, 0, 0, -scan.length % scan.size)).unflatten(2, (-1, scan.size))
    dx = torch.zeros(x.shape, dtype=scan.kind, device=x.device)
    dd = torch.zeros(d.shape, dtype=scan.kind, device=x.device)
    dA = torch.zeros(A.shape, dtype=scan.kind, device=x.device)
    dB = torch.zeros(B.shape, dtype=scan.kind, device=x.device)
    dC = torch.zeros(C.shape, dtype=scan.kind, device=x.device)
    dinitial = []
    for r in range(len(d)):
        decay = scan.decays[r]
        state = scan.pack(None if initial is None else initial[r])
        entering = {}
        for k, start, stop in scan.chunks(r):
            entering[k] = state.clone()
            scale = (decay.writes[:, k] * d_chunks[r, :, k])[:, : stop - start, :, None]
            written = scan.take(x, start, stop) * scale
            scan.advance(state, decay.carry[:, k], scan.take_B(r, start, stop), written)
        dstate = scan.pack(dfinal[r])
        for k, start, stop in reversed(scan.chunks(r)):
            size, state = stop - start, entering.pop(k)
            values, dout = scan.take(x, start, stop), scan.take(dy, start, stop)
            steps = scan.d[r, :, start:stop]
            rows_C, rows_B = scan.take_C(r, start, stop), scan.take_B(r, start, stop)
            reads, writes = decay.reads[:, k, :size], decay.writes[:, k, :size]
            scaled = values * steps[..., None]

            mask = scan.mask(scan.reverse[r], size)
            row, column = decay.row[:, k, :, :size], decay.column[:, k, :, :size]
            weight = (row[..., :, None] - column[..., None, :]).masked_fill_(~mask, -math.inf)
            weight = weight.exp_()
            if segments is not None:
                weight *= scan.same_segment(start, stop)
            weight = weight.unflatten(1, (scan.groups, -1))
            product = rows_C @ rows_B.transpose(2, 3)
            scores = (weight * product[:, :, None]).flatten(1, 2)
            dscores = dout.transpose(1, 2) @ scaled.permute(0, 2, 3, 1)
            dproduct = (weight * dscores.unflatten(1, (scan.groups, -1))).sum(2)
            pairs = scores * dscores

            read = scan.by_head(rows_C @ state)
            write = scan.by_head(rows_B @ dstate)
            dread = dout * reads[..., None]
            dscaled = (scores.transpose(2, 3) @ dout.transpose(1, 2)).transpose(1, 2)
            dscaled = dscaled + write * writes[..., None]
            scan.put(dx, start, stop, dscaled * steps[..., None], add=True)

            packed_read, packed_write = (
                scan.by_group(dread),
                scan.by_group(scaled * writes[..., None]),
            )
            drows_C = packed_read @ state.transpose(2, 3) + dproduct @ rows_B
            drows_B = packed_write @ dstate.transpose(2, 3) + dproduct.transpose(2, 3) @ rows_C
            scan.put(dB[r], start, stop, drows_B.transpose(1, 2), add=True)
            begin, end, (before, after) = scan.read_steps(r, start, stop)
            drows_C = drows_C[:, :, before : size - after].transpose(1, 2)
            scan.put(dC[r], begin, end, drows_C, add=True)

            reading = pairs.sum(3).transpose(1, 2) + (read * dread).sum(3)
            written_pairs = pairs.sum(2).transpose(1, 2)
            leaving = (write * scaled).sum(3) * writes
            through = (state * dstate).unflatten(3, (-1, scan.head_dim)).sum((2, 4)).flatten(1)
            dlog = _after(reading, scan.reverse[r], shift) - _after(
                written_pairs, scan.reverse[r], False
            )
            dlog += _after(leaving, not scan.reverse[r], True)
            dlog += (through * decay.carry[:, k])[:, None]
            dsteps = (dscaled * values).sum(3) + dlog * scan.A[r]
            scan.put(dd[r], start, stop, dsteps, add=True)
            dA[r] += (dlog * steps).sum((0, 1))
            scan.advance(dstate, decay.carry[:, k], rows_C, dread)
        dinitial.append(scan.unpack(dstate))
    return (
        dx.to(x.dtype),
        dd.to(d.dtype),
        dA.to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        torch.stack(dinitial),
    )


def _after(t: Tensor, reverse: bool, exclusive: bool) -> Tensor:
    """Sums ``[B, Q, H]`` over the later steps of a scan, each step's own included or not."""
    total = t.cumsum(1) if reverse else t.flip(1).cumsum(1).flip(1)
    return total - t if exclusive else total


def step(state: Tensor, x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One token; updates ``state [B, H, P, N]`` in place."""
    groups = B.shape[1]
    kind = state.dtype
    state.mul_((d * A).exp().to(kind)[..., None, None])
    written = (d[..., None] * x).to(kind).unflatten(1, (groups, -1))
    view = state.unflatten(1, (groups, -1))
    view.add_(written[..., None] * B.to(kind)[:, :, None, None])
    y = (view @ C.to(kind)[:, :, None, :, None])[..., 0]
    return y.flatten(1, 2).to(x.dtype)
