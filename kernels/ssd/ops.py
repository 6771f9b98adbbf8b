"""SSD, the scan of Mamba-2 (Dao and Gu, "Transformers are SSMs", ICML 2024, arXiv 2405.21060).

`ssd` is the whole-sequence form, `ssd_step` the one-token form. The scan itself is a custom operator
with a plain torch path (`.chunked`) and a Triton path (`.triton`); what is pointwise (softplus, D,
gate) stays outside of it, where torch.compile joins it with its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError
from . import chunked

DIRECTIONS = ("forward", "reverse", "both")


def ssd(
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
    cu_seqlens: Sequence[int] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    direction: str = "forward",
    order: Tensor | None = None,
    shift: bool = False,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T``, ``y_t = S_t C_t + D x_t``, times ``silu(z_t)``.

    ``d = clip(softplus(dt + dt_bias), dt_limit)``. B, L, H, P, G, N: batch, length, heads, head
    size, groups, state size; consecutive heads share a group. The state is float32 (float64 for
    float64 inputs) in every path. Any strides are taken as they are.

    Args:
        x: ``[B, L, H, P]``, L >= 1.
        dt: ``[B, L, H]``.
        A: ``[H]``, negative.
        B, C: ``[B, L, G, N]``.
        D: ``[H]`` or ``[H, P]``.
        z: ``[B, L, H, P]``.
        dt_bias: ``[H]``.
        initial_state: ``[B, H, P, N]``.
        seq_idx: int ``[B, L]``, documents packed in a row: the state is dropped where the value
            changes. Before the first step it counts as 0, so an initial state is used only by a
            first document of index 0.
        cu_seqlens: (batch 1, forward, no order) bounds ``0, ..., L`` of n packed documents: the
            states returned are those at their ends, ``[n, H, P, N]``. It separates nothing:
            ``seq_idx`` does.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        dt_limit: least and greatest d.
        direction: "forward", "reverse" (from the last step to the first), or "both": ``dt``, ``B``,
            ``C``, ``initial_state`` and the final state then have a leading axis of size 2 (forward,
            reverse), ``A`` and ``dt_bias`` may, and y is the sum of both.
        order: int64 ``[L]``, a permutation: the position that each step of the scan visits. Inputs
            and outputs keep their places.
        shift: output t is that of the step before t in the scan, 0 at the first one and at the
            start of each document (the shift of Hydra, arXiv 2407.09941). D is not shifted.
        return_final_state: also return the state after the last step.
        backend: "torch" or "triton"; default by device.

    Returns:
        y ``[B, L, H, P]`` in x's dtype, and the final state ``[B, H, P, N]`` if asked for.

    Raises:
        InputError: an unknown direction, heads that do not divide into the groups, or
            ``cu_seqlens`` where it has no meaning or with other bounds.
    """
    if direction not in DIRECTIONS:
        raise InputError(f'Unknown direction "{direction}": use one of {", ".join(DIRECTIONS)}.')
    if x.shape[2] % B.shape[-2]:
        raise InputError(f"{x.shape[2]} heads do not divide into {B.shape[-2]} groups.")
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "shift": shift, "backend": backend}
    if cu_seqlens is not None:
        if direction != "forward" or order is not None or x.shape[0] != 1 or shift:
            raise InputError("cu_seqlens needs batch 1 and a plain forward scan.")
        bounds = list(cu_seqlens)
        if bounds != sorted({0, *bounds, x.shape[1]}):
            raise InputError(
                f"cu_seqlens must rise from 0 to the length {x.shape[1]}, got {bounds}."
            )
        return _packed(
            x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens, return_final_state,
            options,
        )  # fmt: skip
    d = discretise(dt, dt_bias, dt_softplus, dt_limit, x.dtype)
    A = A.to(d.dtype)
    if direction == "both":
        A = A.expand(2, -1)
    else:
        d, A, B, C = d[None], A[None], B[None], C[None]
        initial_state = None if initial_state is None else initial_state[None]
    B, C = B.to(x.dtype), C.to(x.dtype)
    reverse = direction == "reverse"
    segments = None
    if seq_idx is not None:
        segments, initial_state = document_segments(
            seq_idx, order, initial_state, (False, True) if len(d) == 2 else (reverse,)
        )
    if backend is None:
        backend = "triton" if x.is_cuda and x.dtype != torch.float64 else "torch"
    y, final = scan(x, d, A, B, C, initial_state, segments, order, reverse, shift, backend)
    if D is not None:
        D = D[:, None] if D.ndim == 1 else D
        y = torch.addcmul(y.to(d.dtype), x.to(d.dtype), D.to(d.dtype)).to(x.dtype)
    if z is not None:
        y = y * F.silu(z)
    if not return_final_state:
        return y
    return y, final if direction == "both" else final[0]


def _packed(
    x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens, return_final_state, options
):
    """Document by document, each from the state that the last one left."""
    outputs, states, state = [], [], initial_state
    for start, stop in pairwise(cu_seqlens):
        index = None
        if seq_idx is not None:
            index = seq_idx[:, start:stop]
            if start > 0:
                same = index[:, :1] == seq_idx[:, start - 1 : start]
                state = state * same[:, :, None, None]
                index = index - index[:, :1]
        y, state = ssd(
            x[:, start:stop],
            dt[:, start:stop],
            A,
            B[:, start:stop],
            C[:, start:stop],
            D=D,
            z=None if z is None else z[:, start:stop],
            dt_bias=dt_bias,
            initial_state=state,
            seq_idx=index,
            return_final_state=True,
            **options,
        )
        outputs.append(y)
        states.append(state)
    y = torch.cat(outputs, dim=1)
    return (y, torch.cat(states)) if return_final_state else y


def discretise(
    dt: Tensor,
    bias: Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    """Step sizes in float32 (float64): bias, softplus, clip, in this order."""
    d = dt.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if bias is not None:
        bias = bias.to(d.dtype)
        d = d + (bias[:, None, None] if bias.ndim == 2 else bias)
    if softplus:
        d = F.softplus(d)
    return d if tuple(limit) == (0.0, math.inf) and softplus else d.clamp(*limit)


def document_segments(
    seq_idx: Tensor,
    order: Tensor | None,
    initial_state: Tensor | None,
    reverses: Sequence[bool],
) -> tuple[Tensor, Tensor | None]:
    """Documents numbered from 0 in scan order, int32 ``[B, L]``, and the initial states in use.

    Numbers, unlike ``seq_idx``, never come back: equal numbers mean the same document.
    """
    if order is not None:
        seq_idx = seq_idx[:, order]
    changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    if initial_state is not None:
        used = torch.stack([seq_idx[:, -1 if reverse else 0] == 0 for reverse in reverses])
        initial_state = initial_state * used.view(*used.shape, *[1] * (initial_state.ndim - 2))
    return changes.cumsum(1, dtype=torch.int32), initial_state


@torch.library.custom_op("tessera::ssd", mutates_args=())
def scan(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The scan of one or two directions; arguments as of `.chunked.forward`."""
    run = _path(backend).forward
    return run(x, d, A, B, C, initial, segments, order, reverse, shift)


@scan.register_fake
def _(x, d, A, B, C, initial, segments, order, reverse, shift, backend):
    batch, _, heads, head_dim = x.shape
    final = d.new_empty(d.shape[0], batch, heads, head_dim, B.shape[-1])
    return x.new_empty(x.shape), final


@torch.library.custom_op("tessera::ssd_backward", mutates_args=())
def scan_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, d, A, B, C and the initial state."""
    run = _path(backend).backward
    return run(dy, dfinal, x, d, A, B, C, initial, segments, order, reverse, shift)


@scan_backward.register_fake
def _(dy, dfinal, x, d, A, B, C, initial, segments, order, reverse, shift, backend):
    inputs = [t.new_empty(t.shape) for t in (x, d, A, B, C)]
    return (*inputs, dfinal.new_empty(dfinal.shape))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.shift, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy, dfinal):
    *tensors, initial, segments, order = ctx.saved_tensors
    gradients = scan_backward(
        dy, dfinal, *tensors, initial, segments, order, ctx.reverse, ctx.shift, ctx.backend
    )
    dinitial = None if initial is None else gradients[5].to(initial.dtype)
    return (*gradients[:5], dinitial, None, None, None, None, None)


scan.register_autograd(_backward, setup_context=_setup_context)


def _path(backend: str):
    """The module that computes: imported where it is used, since Triton is not everywhere."""
    if backend == "torch":
        return chunked
    if backend == "triton":
        from . import triton

        return triton
    raise InputError(f'Unknown backend "{backend}": use "torch" or "triton".')


def ssd_step(
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
    backend: str | None = None,
) -> Tensor:
    """One token of `ssd`: reads and writes the state once. For inference: no gradients.

    Args:
        state: float ``[B, H, P, N]``, updated in place.
        x, z: ``[B, H, P]``.
        dt: ``[B, H]``.
        B, C: ``[B, G, N]``.
        dt_limit: applied here as in the full form (the published step leaves it out).

    Returns:
        y ``[B, H, P]`` in x's dtype.
    """
    d = discretise(dt, dt_bias, dt_softplus, dt_limit, x.dtype)
    if backend is None:
        backend = "triton" if x.is_cuda and x.dtype != torch.float64 else "torch"
    y = step(state, x, d, A, B, C, backend)
    if D is not None:
        D = D[:, None] if D.ndim == 1 else D
        y = torch.addcmul(y.to(d.dtype), x.to(d.dtype), D.to(d.dtype)).to(x.dtype)
    return y if z is None else y * F.silu(z)


@torch.library.custom_op("tessera::ssd_step", mutates_args=("state",))
def step(
    state: Tensor, x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, backend: str
) -> Tensor:
    """The scan's part of `ssd_step`; d is discretised."""
    return _path(backend).step(state, x, d, A, B, C)


@step.register_fake
def _(state, x, d, A, B, C, backend):
    return x.new_empty(x.shape)
