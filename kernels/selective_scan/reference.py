"""The recurrence of the selective scan, token by token: what the other paths are tested against.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.
Arguments as of `.ops.selective_scan`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    delta_softplus: bool = False,
    direction: str = "forward",
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y`` and the final state, in float32 or in float64 where ``u`` is."""

    def run(r: int | None, reverse: bool) -> tuple[Tensor, Tensor]:
        def pick(t, ndim):
            return t if t is None or r is None or t.ndim == ndim else t[r]

        return _one_direction(
            u,
            delta if r is None else delta[r],
            pick(A, 2),
            B if r is None else B[r],
            C if r is None else C[r],
            pick(delta_bias, 1),
            pick(initial_state, 3),
            seq_idx,
            delta_softplus,
            reverse,
            order,
        )

    if direction == "both":
        (y, first), (other, second) = run(0, False), run(1, True)
        y, state = y + other, torch.stack([first, second])
    else:
        y, state = run(None, direction == "reverse")
    if D is not None:
        y = y + D[:, None].to(y.dtype) * u.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype), state


def _one_direction(
    u, delta, A, B, C, delta_bias, initial_state, seq_idx, delta_softplus, reverse, order
):
    batch, dim, length = u.shape
    kind = torch.float64 if u.dtype == torch.float64 else torch.float32
    d = delta.to(kind)
    if delta_bias is not None:
        d = d + delta_bias[:, None].to(kind)
    if delta_softplus:
        d = F.softplus(d)
    u, A = u.to(kind), A.to(kind)

    def per_channel(t: Tensor) -> Tensor:
        """``[B, Dm, N, L]``."""
        t = t.to(kind)
        if t.ndim == 2:
            return t[None, :, :, None].expand(batch, -1, -1, length)
        t = t[:, None] if t.ndim == 3 else t
        return t.repeat_interleave(dim // t.shape[1], dim=1)

    B, C = per_channel(B), per_channel(C)
    steps = list(range(length)) if order is None else order.tolist()
    if reverse:
        steps.reverse()
    state = u.new_zeros(batch, dim, A.shape[1])
    if initial_state is not None:
        state = initial_state.to(kind)
    previous = torch.zeros(batch, dtype=torch.int64, device=u.device)
    y: list[Tensor] = [u[..., 0]] * length
    for i in steps:
        if seq_idx is not None:
            state = state * (seq_idx[:, i] == previous)[:, None, None]
            previous = seq_idx[:, i]
        decay = torch.exp(d[:, :, i, None] * A)
        state = decay * state + (d[:, :, i] * u[:, :, i])[..., None] * B[..., i]
        y[i] = (state * C[..., i]).sum(-1)
    return torch.stack(y, dim=2), state


def selective_scan_step_reference(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: ``y [B, Dm]`` and the new state; arguments as of `.ops.selective_scan_step`."""
    y, state = selective_scan_reference(
        u[..., None],
        delta[..., None],
        A,
        B[..., None],
        C[..., None],
        D=D,
        z=None if z is None else z[..., None],
        delta_bias=delta_bias,
        initial_state=state,
        delta_softplus=delta_softplus,
    )
    return y[..., 0], state
