"""S4 and S4D: linear state spaces as long convolutions and as recurrences.

"Efficiently Modeling Long Sequences with Structured State Spaces" (Gu, Goel and Re, arXiv 2111.00396);
"On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893);
``A = Lambda - P P*`` is that of SaShiMi (arXiv 2202.09729), whose eigenvalues stay in the left half plane.

Every channel h has a state of N numbers, ``s' = A s + B u, y = C s + D u``, and a step dt. A sequence is
one convolution with ``K_l = C dA^l dB``, done by FFT; a sample is one step ``s <- dA s + dB u``. Of the N
states N / 2 are stored, the others are their conjugates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError

MODES = ("diagonal", "dplr")


class S4State(NamedTuple):
    """The discretised matrices, and the state s of every item.

    "diagonal" is complex: dA, dB and C ``[H, N / 2]``, s ``[B, H, N / 2]``. "dplr" is real, the real
    parts of the N / 2 states before the imaginary ones: dA ``[H, N, N]``, dB and C ``[H, N]``, s
    ``[B, H, N]``. C holds the factor 2 for the conjugates: ``y = Re sum(C s)``.
    """

    dA: Tensor
    dB: Tensor
    C: Tensor
    s: Tensor


def advance(dA: Tensor, s: Tensor) -> Tensor:
    """``dA s`` of states ``[B, H, n]``."""
    return dA * s if dA.ndim == 2 else torch.einsum("hmn,bhn->bhm", dA, s)


def _columns(dA: Tensor, dB: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """``dA^t dB`` for t < T, ``[H, n, T]``, and ``dA^T``; T^2 reaches the length."""
    columns = dB[..., None]
    while columns.shape[-1] ** 2 < length:
        more = dA[..., None] * columns if dA.ndim == 2 else dA @ columns
        columns = torch.cat([columns, more], dim=-1)
        dA = _square(dA)
    return columns, dA


def _square(dA: Tensor) -> Tensor:
    return dA * dA if dA.ndim == 2 else dA @ dA


def s4_kernel(dA: Tensor, dB: Tensor, C: Tensor, length: int) -> Tensor:
    """``K_l = Re(C dA^l dB)`` for l < length: ``[..., H, length]`` of C ``[..., H, n]``.

    With l = a T + t it is the product of the rows ``C dA^(a T)`` and the columns ``dA^t dB``, about
    sqrt(length) of each, which repeated squaring makes.
    """
    columns, jump = _columns(dA, dB, length)
    rows = C[..., None, :]
    while rows.shape[-2] * columns.shape[-1] < length:
        more = rows * jump[:, None] if jump.ndim == 2 else rows @ jump
        rows = torch.cat([rows, more], dim=-2)
        jump = _square(jump)
    if rows.is_complex():
        rows = torch.cat([rows.real, -rows.imag], dim=-1)
        columns = torch.cat([columns.real, columns.imag], dim=-2)
    return (rows @ columns).flatten(-2)[..., :length]


def final_state(dA: Tensor, dB: Tensor, u: Tensor) -> Tensor:
    """The state ``[B, H, n]`` after the inputs ``[B, H, L]``, from a state of zeros."""
    columns, jump = _columns(dA, dB, u.shape[-1])
    size = columns.shape[-1]
    columns = columns.flip(-1)
    s = dB.new_zeros(len(u), *dB.shape)
    # Zeros in front do not change a state of zeros.
    for part in F.pad(u, (-u.shape[-1] % size, 0)).split(size, dim=-1):
        s = advance(jump, s) + torch.einsum("bht,hnt->bhn", part.to(columns.dtype), columns)
    return s


def long_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of ``[B, H, L]`` with ``[1, H, L]``; with ``[2, H, L]`` also an anti-causal one.

    The first tap of the second kernel meets the next sample, not the present one, as published.
    """
    length = u.shape[-1]
    if len(kernel) == 2:
        kernel = F.pad(kernel[0], (0, length)) + F.pad(kernel[1].flip(-1), (length, 0))
    else:
        kernel = kernel[0]
    spectrum = torch.fft.rfft(u, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length]


def discretize_zoh(log_dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold of diagonal systems ``[H, n]``: ``dA = exp(dt A), dB = (dA - 1) / A B``."""
    dA = torch.exp(log_dt.exp()[:, None] * A)
    return dA, (dA - 1) / A * B


def discretize_bilinear(log_dt: Tensor, A: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear transform of ``diag(A) - P P*`` over the states and their conjugates, in real numbers.

    With q = (Re P, Im P) the matrix is ``[[Re A, -Im A], [Im A, Re A]] - 2 q q^T``.

    Args:
        log_dt: ``[H]``.
        A, P, B: complex ``[H, n]``.

    Returns:
        ``(1 - dt A / 2)^-1 (1 + dt A / 2)``, ``[H, 2 n, 2 n]``, and ``(1 - dt A / 2)^-1 dt B``.
    """
    real, imaginary = torch.diag_embed(A.real), torch.diag_embed(A.imag)
    upper, lower = torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)
    q, b = (torch.cat([t.real, t.imag], dim=-1) for t in (P, B))
    matrix = torch.cat([upper, lower], dim=-2) - 2 * q[..., None] * q[..., None, :]
    half = matrix * (log_dt.exp() / 2)[:, None, None]
    one = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
    right = torch.cat([one + half, (log_dt.exp()[:, None] * b)[..., None]], dim=-1)
    solved = torch.linalg.solve(one - half, right)
    return solved[..., :-1], solved[..., -1]


def hippo_legs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A, P, B) complex128 ``[n]`` of HiPPO-LegS with 2 n states, one of each conjugate pair.

    LegS plus ``P P*`` is normal, with eigenvalues -1/2 + i w; all is in the basis of its eigenvectors.
    """
    index = torch.arange(2 * n, dtype=torch.float64)
    p, b = (index + 0.5).sqrt(), (2 * index + 1).sqrt()
    product = p[:, None] * p
    skew = product.triu(1) - product.tril(-1)
    w, vectors = torch.linalg.eigh(-1j * skew)
    vectors = vectors[:, n:].mH
    A = torch.complex(torch.full((n,), -0.5, dtype=torch.float64), w[n:])
    return A, vectors @ p.to(vectors.dtype), vectors @ b.to(vectors.dtype)


class S4(nn.Module):
    """State space, GELU, and a gated linear layer: ``[B, L, H]`` -> ``[B, L, H]``.

    Args:
        dim: channels H.
        d_state: N.
        mode: "diagonal" (S4D with zero-order hold) or "dplr" (diagonal plus low rank, bilinear), whose
            steps cost N / 2 times as much.
        bidirectional: a second kernel reads the sequence from its end; no steps.
        dt_min, dt_max: the steps are log-uniform between them at first.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        mode: str = "diagonal",
        bidirectional: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        super().__init__()
        if mode not in MODES:
            raise InputError(f'Unknown mode of S4 "{mode}": choose one of {", ".join(MODES)}.')
        self.bidirectional = bidirectional
        n = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(dim))
        self.log_A_real = nn.Parameter(torch.empty(dim, n))
        self.A_imag = nn.Parameter(torch.empty(dim, n))
        self.B = nn.Parameter(torch.empty(dim, n, 2))
        self.C = nn.Parameter(torch.empty(1 + bidirectional, dim, n, 2))
        self.P = nn.Parameter(torch.empty(dim, n, 2)) if mode == "dplr" else None
        self.D = nn.Parameter(torch.empty(dim))
        self.output = Linear(dim, 2 * dim)
        with torch.no_grad():
            self.log_dt.uniform_(math.log(dt_min), math.log(dt_max))
            self.C.normal_(std=0.5**0.5)
            self.D.normal_()
            if mode == "diagonal":  # S4D-Lin
                A = torch.complex(torch.full((n,), -0.5), math.pi * torch.arange(n))
                B = torch.ones_like(A)
            else:
                A, P, B = hippo_legs(n)
                self.P.copy_(torch.view_as_real(P))
            self.log_A_real.copy_((-A.real).log())
            self.A_imag.copy_(A.imag)
            self.B.copy_(torch.view_as_real(B))
        for name in ("log_dt", "log_A_real", "A_imag", "B", "P"):
            if getattr(self, name) is not None:
                getattr(self, name)._no_weight_decay = True

    def discretize(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dA, dB, C) as in `S4State`, in double precision; C ``[1 or 2, H, n]``."""
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        B, C = (torch.view_as_complex(t.double()) for t in (self.B, self.C))
        log_dt = self.log_dt.double()
        if self.P is None:
            return *discretize_zoh(log_dt, A, B), 2 * C
        P = torch.view_as_complex(self.P.double())
        return *discretize_bilinear(log_dt, A, P, B), 2 * torch.cat([C.real, -C.imag], dim=-1)

    def _finish(self, y: Tensor, u: Tensor) -> Tensor:
        y = y.to(u.dtype) + self.D.to(u.dtype) * u
        return F.glu(self.output(F.gelu(y)), dim=-1)

    def forward(self, u: Tensor, return_state: bool = False) -> Tensor | tuple[Tensor, S4State]:
        """``[B, L, H]`` -> the same shape, and, where asked for, the state after the last sample."""
        dA, dB, C = self.discretize()
        x = u.transpose(1, 2).to(torch.promote_types(u.dtype, torch.float32))
        y = long_conv(x, s4_kernel(dA, dB, C, u.shape[1]).to(x.dtype))
        y = self._finish(y.transpose(1, 2), u)
        if not return_state:
            return y
        return y, self._state(dA, dB, C, final_state(dA, dB, x))

    def _state(self, dA: Tensor, dB: Tensor, C: Tensor, s: Tensor) -> S4State:
        if self.bidirectional:
            raise InputError("A bidirectional S4 sees the whole sequence and takes no steps.")
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        dtype = dtype.to_complex() if dA.is_complex() else dtype
        return S4State(*(t.to(dtype) for t in (dA, dB, C[0], s)))

    def init_state(self, batch: int) -> S4State:
        """The state before the first sample.

        Raises:
            InputError: the layer is bidirectional.
        """
        dA, dB, C = self.discretize()
        return self._state(dA, dB, C, dB.new_zeros(batch, *dB.shape))

    def step(self, u: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """The next sample ``[B, H]`` -> ``[B, H]`` and the state after it."""
        s = advance(state.dA, state.s) + state.dB * u[..., None]
        return self._finish((state.C * s).sum(-1).real, u), state._replace(s=s)
