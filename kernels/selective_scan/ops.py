"""Selective scan (S6), the scan of Mamba-1 (Gu and Dao, "Mamba", arXiv 2312.00752).

`selective_scan` is the whole-sequence form, `selective_scan_step` the one-token form. The decay is a
matrix over (channel, state), so there is no matrix-product form: the scan is bound by its exponentials.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError
from ..ssd.ops import DIRECTIONS, document_segments
from . import blocked


def selective_scan(
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
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``s_t = exp(d_t A) s_{t-1} + d_t u_t B_t``, ``y_t = <s_t, C_t> + D u_t``, times ``silu(z_t)``.

    ``d = softplus(delta + delta_bias)``. Dm, N, G: channels, states of a channel, groups;
    consecutive channels share a group. Float32 inside (float64 for float64 inputs). Any strides.

    Args:
        u, delta, z: ``[B, Dm, L]``, L >= 1.
        A: ``[Dm, N]``, negative.
        B, C: ``[B, G, N, L]``, ``[B, N, L]`` (one group), or ``[Dm, N]`` (constant in time; their
            gradients take memory B x L x Dm x N).
        D, delta_bias: ``[Dm]``.
        initial_state: ``[B, Dm, N]``.
        seq_idx: int ``[B, L]``, documents packed in a row: the state is dropped where the value
            changes. Before the first step it counts as 0, so an initial state is used only by a
            first document of index 0.
        direction: "forward", "reverse", or "both": ``delta``, ``B``, ``C``, ``initial_state`` and
            the final state then have a leading axis of size 2 (forward, reverse), ``A`` and
            ``delta_bias`` may, and y is the sum of both.
        order: int64 ``[L]``, a permutation: the position that each step of the scan visits. Inputs
            and outputs keep their places.
        return_final_state: also return the state after the last step.
        backend: "torch" or "triton"; default by device.

    Returns:
        y ``[B, Dm, L]`` in u's dtype, and the final state ``[B, Dm, N]`` if asked for.

    Raises:
        InputError: an unknown direction, or channels that do not divide into the groups.
    """
    if direction not in DIRECTIONS:
        raise InputError(f'Unknown direction "{direction}": use one of {", ".join(DIRECTIONS)}.')
    d = discretise(delta, delta_bias, delta_softplus, u.dtype)
    A = A.to(d.dtype)
    if direction == "both":
        A = A.expand(2, -1, -1)
    else:
        d, A, B, C = d[None], A[None], B[None], C[None]
        initial_state = None if initial_state is None else initial_state[None]
    B, C = _grouped(B, u), _grouped(C, u)
    groups = max(B.shape[2], C.shape[2])
    if u.shape[1] % groups:
        raise InputError(f"{u.shape[1]} channels do not divide into {groups} groups.")
    B, C = (
        t if t.shape[2] == groups else t.repeat_interleave(groups // t.shape[2], 2) for t in (B, C)
    )
    reverse = direction == "reverse"
    segments = None
    if seq_idx is not None:
        segments, initial_state = document_segments(
            seq_idx, order, initial_state, (False, True) if len(d) == 2 else (reverse,)
        )
    if backend is None:
        backend = "triton" if u.is_cuda and u.dtype != torch.float64 else "torch"
    y, final = scan(u, d, A, B, C, initial_state, segments, order, reverse, backend)
    if D is not None:
        y = torch.addcmul(y.to(d.dtype), u.to(d.dtype), D[:, None].to(d.dtype)).to(u.dtype)
    if z is not None:
        y = y * F.silu(z)
    if not return_final_state:
        return y
    return y, final if direction == "both" else final[0]


def discretise(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """Step sizes ``[..., Dm, L]`` in float32 (float64): bias, then softplus."""
    d = delta.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if bias is not None:
        bias = bias.to(d.dtype)
        d = d + (bias[:, None, :, None] if bias.ndim == 2 else bias[:, None])
    return F.softplus(d) if softplus else d


def _grouped(t: Tensor, u: Tensor) -> Tensor:
    """``[R, Dm, N]``, ``[R, B, N, L]`` or ``[R, B, G, N, L]`` -> the last form."""
    if t.ndim == 3:
        return t[:, None, :, :, None].expand(-1, u.shape[0], -1, -1, u.shape[2])
    return t[:, :, None] if t.ndim == 4 else t


@torch.library.custom_op("tessera::selective_scan", mutates_args=())
def scan(
    u: Tensor,
    d: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
    order: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The scan of one or two directions; arguments as of `.blocked.forward`."""
    return _path(backend).forward(u, d, A, B, C, initial, segments, order, reverse)


@scan.register_fake
def _(u, d, A, B, C, initial, segments, order, reverse, backend):
    return torch.empty_like(u), d.new_empty(d.shape[0], *u.shape[:2], A.shape[-1])


@torch.library.custom_op("tessera::selective_scan_backward", mutates_args=())
def scan_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, d, A, B, C and the initial state."""
    run = _path(backend).backward
    return run(dy, dfinal, u, d, A, B, C, initial, segments, order, reverse)


@scan_backward.register_fake
def _(dy, dfinal, u, d, A, B, C, initial, segments, order, reverse, backend):
    rest = [t.new_empty(t.shape) for t in (A, B, C, dfinal)]
    return torch.empty_like(u), torch.empty_like(d), *rest


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy, dfinal):
    *tensors, initial, segments, order = ctx.saved_tensors
    gradients = scan_backward(
        dy, dfinal, *tensors, initial, segments, order, ctx.reverse, ctx.backend
    )
    dinitial = None if initial is None else gradients[5].to(initial.dtype)
    return (*gradients[:5], dinitial, None, None, None, None)


scan.register_autograd(_backward, setup_context=_setup_context)


def _path(backend: str):
    """The module that computes: imported where it is used, since Triton is not everywhere."""
    if backend == "torch":
        return blocked
    if backend == "triton":
        from . import triton

        return triton
    raise InputError(f'Unknown backend "{backend}": use "torch" or "triton".')


def selective_scan_step(
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
    backend: str | None = None,
) -> Tensor:
    """One token of `selective_scan`. For inference: no gradients.

    Args:
        state: float ``[B, Dm, N]``, updated in place.
        u, delta, z: ``[B, Dm]``.
        B, C: ``[B, N]`` or ``[B, G, N]``.

    Returns:
        y ``[B, Dm]`` in u's dtype.
    """
    d = discretise(delta[..., None], delta_bias, delta_softplus, u.dtype)[..., 0]
    B, C = (t[:, None] if t.ndim == 2 else t for t in (B, C))
    if backend is None:
        backend = "triton" if u.is_cuda and u.dtype != torch.float64 else "torch"
    y = step(state, u, d, A, B, C, backend)
    if D is not None:
        y = torch.addcmul(y.to(d.dtype), u.to(d.dtype), D.to(d.dtype)).to(u.dtype)
    return y if z is None else y * F.silu(z)


@torch.library.custom_op("tessera::selective_scan_step", mutates_args=("state",))
def step(
    state: Tensor, u: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, backend: str
) -> Tensor:
    """The scan's part of `selective_scan_step`; d is discretised."""
    return _path(backend).step(state, u, d, A, B, C)


@step.register_fake
def _(state, u, d, A, B, C, backend):
    return u.new_empty(u.shape)
