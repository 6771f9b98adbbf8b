"""The blocks of Mamba-1 and Mamba-2.

"Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu and Dao, arXiv 2312.00752) and
"Transformers are SSMs" (Dao and Gu, ICML 2024, arXiv 2405.21060). Code of the papers: Apache-2.0.
Names of weights are the published ones. The language model over these blocks and its checkpoints:
`..autoregressive.mamba`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ...kernels.selective_scan.ops import selective_scan, selective_scan_step
from ...kernels.ssd.ops import ssd, ssd_step
from .conv import conv_state, conv_step, scan_conv
from .mixer import State, TokenMixer, linear_flops, scan_order


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, gated by ``silu(z)`` after or before the norm, in float32.

    Args:
        norm_before_gate: ``rms(y) w silu(z)``; else ``rms(y silu(z)) w``.
    """

    def __init__(
        self, dim: int, groups: int = 1, norm_before_gate: bool = False, eps: float = 1e-5
    ):
        super().__init__()
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        dtype = y.dtype
        y, z = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (y, z))
        if not self.norm_before_gate:
            y = y * F.silu(z)
        y = y.unflatten(-1, (self.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        if self.norm_before_gate:
            y = y * F.silu(z)
        return y.to(dtype)


def init_dt_bias_(bias: Tensor, dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """softplus of it is log-uniform in [dt_min, dt_max], at least the floor."""
    with torch.no_grad():
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand_like(bias) * (high - low) + low).clamp(min=dt_init_floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class Mamba2(TokenMixer):
    """The block of Mamba-2; defaults are the published ones.

    Args:
        dim: width D.
        d_state: N.
        d_conv: taps of the causal convolution in front of x, B and C.
        expand: inner width over D.
        headdim: P.
        d_ssm: inner channels that are scanned; the others run as a gated MLP. Default: all.
        ngroups: groups of heads that share B and C.
        D_has_hdim: D of each channel, not of each head.
        rmsnorm: norm after the scan; else the scan's output is gated only.
        norm_before_gate: see `GatedRMSNorm`.
        dt_limit: least and greatest step size.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__()
        inner = int(expand * dim)
        self.d_ssm = inner if d_ssm is None else d_ssm
        self.d_mlp = inner - self.d_ssm
        self.d_state, self.headdim, self.ngroups = d_state, headdim, ngroups
        self.heads = self.d_ssm // headdim
        self.dt_limit = tuple(dt_limit)
        width = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = Linear(dim, 2 * self.d_mlp + self.d_ssm + width + self.heads, bias=bias)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        init_dt_bias_(self.dt_bias, dt_min, dt_max, dt_init_floor)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        with torch.no_grad():
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.heads))
        self.norm = GatedRMSNorm(self.d_ssm, ngroups, norm_before_gate) if rmsnorm else None
        self.out_proj = Linear(inner, dim, bias=bias)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(gate and value of the MLP part, gate, input of the convolution, dt)."""
        width = self.conv1d.weight.shape[0]
        sizes = [self.d_mlp, self.d_mlp, self.d_ssm, width, self.heads]
        return self.in_proj(x).split(sizes, dim=-1)

    def _scan_arguments(self, xBC: Tensor, z: Tensor) -> tuple[tuple[Tensor, ...], dict]:
        """(x, A, B, C) and options of the scan, of ``[..., W]`` after the convolution."""
        state_width = self.ngroups * self.d_state
        x, B, C = F.silu(xBC).split([self.d_ssm, state_width, state_width], dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        B, C = (t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))
        options = {
            "D": self.D.view(self.heads, -1) if self.D.numel() > self.heads else self.D,
            "z": None if self.norm is not None else z.unflatten(-1, (self.heads, -1)),
            "dt_bias": self.dt_bias,
            "dt_softplus": True,
            "dt_limit": self.dt_limit,
        }
        return (x, -torch.exp(self.A_log.to(_at_least_float(self.A_log))), B, C), options

    def _finish(self, y: Tensor, z: Tensor, z0: Tensor, x0: Tensor) -> Tensor:
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z)
        if self.d_mlp > 0:
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        return self.out_proj(y)

    def forward(
        self, x, *, grid=None, order=None, seq_idx=None, state=None, return_state=False
    ) -> Tensor | tuple[Tensor, State]:
        order = scan_order(order, grid, x.device)
        z0, x0, z, xBC, dt = self._project(x)
        taps = self.conv1d.weight.shape[-1]
        history = None if state is None else state["conv"][..., 1:]
        inputs = scan_conv(
            xBC,
            self.conv1d.weight,
            self.conv1d.bias,
            causal=True,
            seq_idx=seq_idx,
            order=order,
            history=history,
        )
        (value, A, B, C), options = self._scan_arguments(inputs, z)
        y, ssm = ssd(
            value,
            dt,
            A,
            B,
            C,
            **options,
            initial_state=None if state is None else state["ssm"],
            seq_idx=seq_idx,
            order=order,
            return_final_state=True,
        )
        y = self._finish(y, z, z0, x0)
        if not return_state:
            return y
        if order is not None:
            xBC, seq_idx = xBC[:, order], None if seq_idx is None else seq_idx[:, order]
        return y, State(conv=conv_state(xBC, taps, history, seq_idx), ssm=ssm)

    def init_state(self, batch, device=None, dtype=None) -> State:
        weight = self.conv1d.weight
        options = {"device": device or weight.device}
        dtype = dtype or weight.dtype
        shape = (batch, self.heads, self.headdim, self.d_state)
        return State(
            conv=torch.zeros(batch, weight.shape[0], weight.shape[-1], dtype=dtype, **options),
            ssm=torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), **options),
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        z0, x0, z, xBC, dt = self._project(x[:, 0])
        inputs = conv_step(state["conv"], xBC, self.conv1d.weight, self.conv1d.bias)
        (value, A, B, C), options = self._scan_arguments(inputs, z)
        y = ssd_step(state["ssm"], value, dt, A, B, C, **options)
        return self._finish(y, z, z0, x0)[:, None], state

    def flops(self, tokens: int) -> int:
        # Per token: scores of a chunk of 64 once a group, then products with values and states.
        scan = 2 * 64 * self.ngroups * self.d_state
        scan += self.d_ssm * (2 * 64 + 4 * self.d_state)
        return tokens * (linear_flops(self.in_proj, self.conv1d, self.out_proj) + scan)


def _at_least_float(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


class Mamba1(TokenMixer):
    """The block of Mamba-1; defaults are the published ones.

    Args:
        dim: width D.
        d_state: N.
        d_conv: taps of the causal convolution.
        expand: inner width over D.
        dt_rank: rank of the projection to step sizes; None: ceil(D / 16).
    """

    causal = True

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__()
        inner = int(expand * dim)
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = Linear(dim, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias)
        self.x_proj = Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(self.dt_rank, inner)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        init_dt_bias_(self.dt_proj.bias, dt_min, dt_max, dt_init_floor)
        steps = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(steps.log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, dim, bias=bias)

    def _scan_arguments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(delta ``[..., E]``, A, B and C ``[..., N]``) of ``[..., E]``."""
        low, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = linear(low, self.dt_proj.weight)
        return delta, -torch.exp(self.A_log.to(_at_least_float(self.A_log))), B, C

    def forward(
        self, x, *, grid=None, order=None, seq_idx=None, state=None, return_state=False
    ) -> Tensor | tuple[Tensor, State]:
        order = scan_order(order, grid, x.device)
        raw, z = self.in_proj(x).chunk(2, dim=-1)
        taps = self.conv1d.weight.shape[-1]
        history = None if state is None else state["conv"][..., 1:]
        value = F.silu(
            scan_conv(
                raw,
                self.conv1d.weight,
                self.conv1d.bias,
                causal=True,
                seq_idx=seq_idx,
                order=order,
                history=history,
            )
        )
        delta, A, B, C = self._scan_arguments(value)
        y, ssm = selective_scan(
            value.transpose(1, 2),
            delta.transpose(1, 2),
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            D=self.D,
            z=z.transpose(1, 2),
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            initial_state=None if state is None else state["ssm"],
            seq_idx=seq_idx,
            order=order,
            return_final_state=True,
        )
        y = self.out_proj(y.transpose(1, 2))
        if not return_state:
            return y
        if order is not None:
            raw, seq_idx = raw[:, order], None if seq_idx is None else seq_idx[:, order]
        return y, State(conv=conv_state(raw, taps, history, seq_idx), ssm=ssm)

    def init_state(self, batch, device=None, dtype=None) -> State:
        weight = self.conv1d.weight
        options = {"device": device or weight.device}
        dtype = dtype or weight.dtype
        inner, _, taps = weight.shape
        kind = torch.promote_types(dtype, torch.float32)
        return State(
            conv=torch.zeros(batch, inner, taps, dtype=dtype, **options),
            ssm=torch.zeros(batch, inner, self.d_state, dtype=kind, **options),
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        raw, z = self.in_proj(x[:, 0]).chunk(2, dim=-1)
        value = F.silu(conv_step(state["conv"], raw, self.conv1d.weight, self.conv1d.bias))
        delta, A, B, C = self._scan_arguments(value)
        y = selective_scan_step(
            state["ssm"],
            value,
            delta,
            A,
            B,
            C,
            D=self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
        return self.out_proj(y)[:, None], state

    def flops(self, tokens: int) -> int:
        layers = linear_flops(self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj)
        # Decay, input, sum and read-out of every (channel, state).
        return tokens * (layers + 7 * self.A_log.numel())
