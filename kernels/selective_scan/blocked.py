"""The selective scan in plain torch: a loop over time, vectorised over channels and states.

What one block of time needs (decays, inputs, states; ``[T, B, G, N, channels of the group]``) is made
by a few operations and stays in cache; between blocks only the state goes on. Nothing of the size
length x channels x states is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16


class Scan:
    """The arguments of one call, and how a block of each is taken."""

    def __init__(self, u, d, A, B, C, initial, segments, order, reverse):
        self.kind = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.u, self.d, self.B, self.C, self.initial, self.order = u, d, B, C, initial, order
        self.batch, self.dim, self.length = u.shape
        self.groups, self.state_size = B.shape[2:4]
        self.A = self.pack(A.to(self.kind))
        self.reverse = (False, True) if len(d) == 2 else (reverse,)
        self.keep = None
        if segments is not None:
            # Whether the document goes on between two neighbours of the scan.
            self.keep = (segments[:, 1:] == segments[:, :-1]).to(self.kind)

    def blocks(self, r: int) -> list[tuple[int, int]]:
        """(first step, end) in forward scan order, in the order in which direction r meets them."""
        rows = [(s, min(s + BLOCK, self.length)) for s in range(0, self.length, BLOCK)]
        return rows[::-1] if self.reverse[r] else rows

    def take(self, r: int, t: Tensor, start: int, stop: int) -> Tensor:
        """Steps of a ``[..., L]`` as ``[T, ...]``, the first one that direction r meets on top."""
        t = t[..., start:stop] if self.order is None else t[..., self.order[start:stop]]
        t = t.movedim(-1, 0).to(self.kind)
        return t.flip(0) if self.reverse[r] else t.contiguous()

    def put(self, r: int, into: Tensor, start: int, stop: int, value: Tensor) -> None:
        """Add ``[T, ...]`` to steps of a ``[..., L]``."""
        value = (value.flip(0) if self.reverse[r] else value).movedim(0, -1)
        if self.order is None:
            into[..., start:stop] += value
        else:
            into.index_add_(into.ndim - 1, self.order[start:stop], value.to(into.dtype))

    def pack(self, t: Tensor) -> Tensor:
        """``[..., Dm, N]`` -> ``[..., G, N, channels of the group]``."""
        return t.unflatten(-2, (self.groups, -1)).transpose(-1, -2).contiguous()

    def start(self, r: int) -> Tensor:
        if self.initial is not None:
            return self.pack(self.initial[r].to(self.kind))
        channels = self.dim // self.groups
        shape = (self.batch, self.groups, self.state_size, channels)
        return torch.zeros(shape, dtype=self.kind, device=self.u.device)

    def by_group(self, t: Tensor) -> Tensor:
        """``[T, B, Dm]`` -> ``[T, B, G, 1, channels of the group]``."""
        return t.unflatten(2, (self.groups, 1, -1))

    def block(self, r: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decays and inputs ``[T, B, G, N, channels]``, and d and u ``[T, B, G, 1, channels]``."""
        d = self.by_group(self.take(r, self.d[r], start, stop))
        u = self.by_group(self.take(r, self.u, start, stop))
        decay = (d * self.A[r]).exp_()
        if self.keep is not None:
            # keep[i] stands between steps i and i + 1; at the ends nothing is dropped.
            ends = (1, 0) if not self.reverse[r] else (0, 1)
            keep = F.pad(self.keep, ends, value=1.0)[:, start:stop].T
            keep = keep.flip(0) if self.reverse[r] else keep
            decay *= keep[:, :, None, None, None]
        return decay, (d * u) * self.take(r, self.B[r], start, stop)[..., None], d, u


def advance(decay: Tensor, states: Tensor, state: Tensor) -> Tensor:
    """Turn inputs into states, in place, from ``state`` on; returns the last one."""
    for a, h in zip(decay.unbind(0), states.unbind(0), strict=True):
        state = h.addcmul_(a, state)
    return state


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
    """R = 1 direction (``reverse`` or not) or R = 2 (forward, reverse), their outputs added.

    Args:
        u: ``[B, Dm, L]``.
        d: discretised steps, float ``[R, B, Dm, L]``.
        A: ``[R, Dm, N]``.
        B, C: ``[R, B, G, N, L]``.
        initial: ``[R, B, Dm, N]``.
        segments: ``[B, L]`` in scan order: the state is dropped where the value changes.
        order: int64 ``[L]``, position of each scan step.

    Returns:
        y ``[B, Dm, L]`` laid out as u, and the last states, float ``[R, B, Dm, N]``.
    """
    scan = Scan(u, d, A, B, C, initial, segments, order, reverse)
    y = torch.zeros_like(u, dtype=scan.kind)
    final = []
    for r in range(len(d)):
        state = scan.start(r)
        for start, stop in scan.blocks(r):
            decay, states, _, _ = scan.block(r, start, stop)
            state = advance(decay, states, state)
            read = scan.take(r, C[r], start, stop)[..., None, :] @ states
            scan.put(r, y, start, stop, read.flatten(2))
        final.append(state.transpose(-1, -2).flatten(1, 2))
    return y.to(u.dtype), torch.stack(final)


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
    """Gradients of u, d, A, B, C and the initial state; states are recomputed block by block."""
    scan = Scan(u, d, A, B, C, initial, segments, order, reverse)
    du, dd = torch.zeros_like(u, dtype=scan.kind), torch.zeros_like(d)
    dB = torch.zeros(B.shape, dtype=scan.kind, device=u.device)
    dC = torch.zeros(C.shape, dtype=scan.kind, device=u.device)
    dA = torch.zeros_like(scan.A)
    dinitial = []
    for r in range(len(d)):
        state = scan.start(r)
        entering = []
        for start, stop in scan.blocks(r):
            entering.append(state)
            decay, states, _, _ = scan.block(r, start, stop)
            state = advance(decay, states, state).clone()
        carried = scan.pack(dfinal[r].to(scan.kind))
        for (start, stop), state in zip(reversed(scan.blocks(r)), reversed(entering), strict=True):
            decay, states, steps, values = scan.block(r, start, stop)
            advance(decay, states, state)
            rows_B, rows_C = (scan.take(r, t[r], start, stop)[..., None] for t in (B, C))
            dout = scan.by_group(scan.take(r, dy, start, stop))
            dstates = rows_C * dout
            for a, g in zip(reversed(decay.unbind(0)), reversed(dstates.unbind(0)), strict=True):
                g.add_(carried)
                carried = a * g
            scan.put(r, dC[r], start, stop, (states @ dout.transpose(3, 4))[..., 0])
            scaled = steps * values
            scan.put(r, dB[r], start, stop, (dstates @ scaled.transpose(3, 4))[..., 0])
            dscaled = rows_B.transpose(3, 4) @ dstates
            # The gradient of each log decay: state's gradient x decayed state.
            before = torch.cat([state[None], states[:-1]])
            dlog = before.mul_(decay).mul_(dstates)
            dA[r] += (dlog * steps).sum((0, 1))
            dsteps = dscaled * values + (dlog * scan.A[r]).sum(3, keepdim=True)
            scan.put(r, du, start, stop, (dscaled * steps).flatten(2))
            scan.put(r, dd[r], start, stop, dsteps.flatten(2))
        dinitial.append(carried.transpose(-1, -2).flatten(1, 2))
    dA = dA.transpose(-1, -2).flatten(1, 2)
    return (
        du.to(u.dtype),
        dd,
        dA.to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        torch.stack(dinitial),
    )


def step(state: Tensor, u: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One token; updates ``state [B, Dm, N]`` in place. ``B, C [B, G, N]``."""
    kind, groups = state.dtype, B.shape[1]
    state.mul_((d[..., None] * A).exp().to(kind))
    view = state.unflatten(1, (groups, -1))
    scaled = (d * u).to(kind).unflatten(1, (groups, -1))
    view.addcmul_(scaled[..., None], B.to(kind)[:, :, None])
    return (view @ C.to(kind)[..., None]).flatten(1).to(u.dtype)
