"""The recurrence of SSD, token by token: the definition that the other paths are tested against.

Dao and Gu, "Transformers are SSMs", ICML 2024, arXiv 2405.21060. Arguments as of `.ops.ssd`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    direction: str = "forward",
    order: Tensor | None = None,
    shift: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y`` and the final state, in float32 or in float64 where ``x`` is."""
    if direction == "both":
        runs = [
            _one_direction(
                x,
                dt[r],
                A if A.ndim == 1 else A[r],
                B[r],
                C[r],
                dt_bias if dt_bias is None or dt_bias.ndim == 1 else dt_bias[r],
                None if initial_state is None else initial_state[r],
                seq_idx,
                dt_softplus,
                dt_limit,
                r == 1,
                order,
                shift,
            )
            for r in range(2)
        ]
        y = runs[0][0] + runs[1][0]
        state = torch.stack([runs[0][1], runs[1][1]])
    else:
        reverse = direction == "reverse"
        y, state = _one_direction(
            x, dt, A, B, C, dt_bias, initial_state, seq_idx, dt_softplus, dt_limit, reverse, order,
            shift,
        )  # fmt: skip
    if D is not None:
        y = y + x.to(y.dtype) * (D[:, None] if D.ndim == 1 else D).to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), state


def _one_direction(
    x, dt, A, B, C, dt_bias, initial_state, seq_idx, dt_softplus, dt_limit, reverse, order, shift
):
    batch, length, heads, head_dim = x.shape
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    d = dt.to(kind)
    if dt_bias is not None:
        d = d + dt_bias.to(kind)
    if dt_softplus:
        d = F.softplus(d)
    d = d.clamp(*dt_limit)
    share = heads // B.shape[2]
    B, C = (t.to(kind).repeat_interleave(share, dim=2) for t in (B, C))
    steps = list(range(length)) if order is None else order.tolist()
    if reverse:
        steps.reverse()
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1], dtype=kind)
    if initial_state is not None:
        state = initial_state.to(kind)
    previous = torch.zeros(batch, dtype=torch.int64, device=x.device)
    read = x.new_zeros(batch, heads, head_dim, dtype=kind)
    y = [read] * length
    for i in steps:
        if seq_idx is not None:
            same = seq_idx[:, i] == previous
            previous = seq_idx[:, i]
            state = state * same[:, None, None, None]
            read = read * same[:, None, None]
        if shift:
            y[i] = read
        decay = torch.exp(d[:, i] * A.to(kind))
        value = d[:, i, :, None] * x[:, i].to(kind)
        state = decay[..., None, None] * state + value[..., None] * B[:, i, :, None]
        read = (state * C[:, i, :, None]).sum(-1)
        if not shift:
            y[i] = read
    return torch.stack(y, dim=1), state


def ssd_step_reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """One token: ``y [B, H, P]`` and the new state; arguments as of `.ops.ssd_step`."""
    y, state = ssd_reference(
        x[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        D=D,
        z=None if z is None else z[:, None],
        dt_bias=dt_bias,
        initial_state=state,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )
    return y[:, 0], state
