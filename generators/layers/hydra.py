"""Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers (Hwang et al., NeurIPS 2024).

Paper: arXiv 2407.09941. Code of the paper: MIT. Names of weights are the published ones; checkpoint of
an encoder over this block: goombalab/hydra.

Two scans, one in each direction, each read one step late, and a diagonal of their own between them:
a quasiseparable matrix. Both directions run in one call of `ssd`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ...kernels.ssd.ops import ssd
from ...modalities.errors import InputError
from .conv import scan_conv
from .mamba import GatedRMSNorm, init_dt_bias_
from .mixer import TokenMixer, linear_flops, scan_order


class Hydra(TokenMixer):
    """The block of Hydra; defaults are the published ones.

    Args:
        dim: width D.
        d_state: N.
        d_conv: odd number of taps of the symmetric convolution.
        expand: inner width over D.
        headdim: P.
        ngroups: groups of heads that share B and C.
        dt_limit: least and greatest step size.
        learnable_init_states: both directions start from a trained state.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__()
        self.inner = int(expand * dim)
        self.heads = self.inner // headdim
        self.d_state, self.ngroups = d_state, ngroups
        self.dt_limit = tuple(dt_limit)
        width = self.inner + 4 * ngroups * d_state
        self.in_proj = Linear(dim, self.inner + width + 2 * self.heads, bias=bias)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, bias=conv_bias)
        self.init_states = None
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.zeros(self.heads, headdim, d_state))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        init_dt_bias_(self.dt_bias, dt_min, dt_max, dt_init_floor)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.fc_D = Linear(self.inner, self.heads, bias=False)
        self.norm = GatedRMSNorm(self.inner, norm_before_gate=True)
        self.out_proj = Linear(self.inner, dim, bias=bias)

    def _inputs(
        self, u: Tensor, order: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z and x ``[B, L, E]``, dt ``[2, B, L, H]``, B and C ``[2, B, L, G, N]`` (both directions)."""
        z, xBC, dt = self.in_proj(u).split(
            [self.inner, self.conv1d.weight.shape[0], 2 * self.heads], dim=-1
        )
        weight, bias = self.conv1d.weight, self.conv1d.bias
        xBC = F.silu(scan_conv(xBC, weight, bias, causal=False, seq_idx=seq_idx, order=order))
        x, BC = xBC.split([self.inner, xBC.shape[-1] - self.inner], dim=-1)
        BC = BC.unflatten(-1, (2, 2, self.ngroups, self.d_state)).permute(2, 3, 0, 1, 4, 5)
        dt = dt.unflatten(-1, (2, -1)).movedim(2, 0)
        return z, x, dt, BC[:, 0], BC[:, 1]

    def _scan(self, x, dt, B, C, initial, order, seq_idx) -> tuple[Tensor, Tensor]:
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        return ssd(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            A,
            B,
            C,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=initial,
            seq_idx=seq_idx,
            direction="both",
            order=order,
            shift=True,
            return_final_state=True,
        )

    def forward(
        self,
        x: Tensor,
        *,
        grid: tuple[int, int, int] | None = None,
        order: str | None = None,
        seq_idx: Tensor | None = None,
        state: None = None,
        return_state: bool = False,
        prefix: Tensor | None = None,
        prefix_grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """As `TokenMixer.forward`.

        Args:
            prefix: ``[B, R, D]``, tokens that both directions scan before the others; they have
                the grid ``prefix_grid`` and no outputs.

        Raises:
            InputError: a state is given or wanted (the mixer sees all tokens at once), or packed
                documents together with a prefix or trained initial states.
        """
        if state is not None or return_state:
            raise InputError("Hydra sees all tokens at once: it takes and returns no state.")
        if seq_idx is not None and (prefix is not None or self.init_states is not None):
            raise InputError("Packed documents all start from zero: give no prefix or states.")
        initial = None
        if self.init_states is not None:
            initial = self.init_states.expand(2, len(x), -1, -1, -1)
        if prefix is not None:
            places = scan_order(order, prefix_grid, x.device)
            _, value, dt, B, C = self._inputs(prefix, places, None)
            _, initial = self._scan(value, dt, B, C, initial, places, None)
        places = scan_order(order, grid, x.device)
        z, value, dt, B, C = self._inputs(x, places, seq_idx)
        y, _ = self._scan(value, dt, B, C, initial, places, seq_idx)
        diagonal = linear(value, self.fc_D.weight, self.D)
        y = y + value.unflatten(-1, (self.heads, -1)) * diagonal[..., None]
        return self.out_proj(self.norm(y.flatten(2), z))

    def flops(self, tokens: int) -> int:
        layers = linear_flops(self.in_proj, self.conv1d, self.fc_D, self.out_proj)
        scan = 4 * 64 * self.ngroups * self.d_state
        scan += self.inner * (2 * 64 + 8 * self.d_state)
        return tokens * (layers + scan)
