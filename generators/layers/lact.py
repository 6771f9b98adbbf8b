"""LaCT: Test-Time Training Done Right (Zhang et al., arXiv 2505.23884). Code of the paper: MIT.

The state is a small SwiGLU network (fast weights). A chunk of tokens trains it by one gradient step to
map keys to values; queries read it. Everything is a plain matrix product, and the chunk (a group of
frames, say) may be as large as wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from .mixer import State, TokenMixer, linear_flops

# Coefficients of the five Newton-Schulz steps of the paper's Muon.
MUON = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalise(update: Tensor) -> Tensor:
    """Matrices ``[..., m, n]`` with their singular values moved near 1 (Muon)."""
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x
    for a, b, c in MUON:
        square = x @ x.transpose(-1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.transpose(-1, -2) if tall else x


class LaCT(TokenMixer):
    """Fast weights ``f(x) = w1 (silu(w0 x) * (w2 x))`` a head, updated chunk by chunk.

    Args:
        dim: width D.
        head_dim: of a head.
        hidden_ratio: hidden width of the fast weights over head_dim.
        chunk: tokens that make one update.
        is_causal: a chunk reads the weights before it updates them (token t sees earlier chunks
            only); else it updates first and reads all of itself.
        muon: orthogonalise each update.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 64,
        hidden_ratio: float = 2.0,
        chunk: int = 2048,
        is_causal: bool = True,
        muon: bool = True,
    ):
        super().__init__()
        if dim % head_dim:
            raise InputError(f"Heads of {head_dim} do not divide a width of {dim}.")
        heads, hidden = dim // head_dim, int(hidden_ratio * head_dim)
        self.causal, self.granularity, self.muon = is_causal, chunk, muon
        self.head_dim = head_dim
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.rates = Linear(dim, 3 * heads)
        nn.init.constant_(self.rates.bias, -4.6)  # softplus of it is 0.01.
        self.w0 = nn.Parameter(torch.empty(heads, hidden, head_dim))
        self.w1 = nn.Parameter(torch.empty(heads, head_dim, hidden))
        self.w2 = nn.Parameter(torch.empty(heads, hidden, head_dim))
        for weight in (self.w0, self.w1, self.w2):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        self.norm = nn.RMSNorm(head_dim, eps=1e-5)
        self.proj = Linear(dim, dim, bias=False)

    def _update(self, state: State, k: Tensor, v: Tensor, rates: Tensor) -> State:
        """One gradient step on ``-f(k) . v`` a token, then every row back to its first length.

        ``k``, ``v``: ``[B, heads, n, head_dim]``; ``rates [3, B, heads, n, 1]``.
        """
        w0, w1, w2 = (state[name] for name in ("w0", "w1", "w2"))
        gate, value = k @ w0.transpose(-1, -2), k @ w2.transpose(-1, -2)
        sigmoid = gate.sigmoid()
        active = gate * sigmoid
        dhidden = v @ w1
        dgate = dhidden * value * sigmoid * (1 + gate * (1 - sigmoid))
        updates = {
            "w0": (rates[0] * dgate).transpose(-1, -2) @ k,
            "w1": (rates[1] * v).transpose(-1, -2) @ (active * value),
            "w2": (rates[2] * dhidden * active).transpose(-1, -2) @ k,
        }
        new = State()
        for name, update in updates.items():
            weight = state[name] + (orthogonalise(update) if self.muon else update)
            length = getattr(self, name).norm(dim=-1, keepdim=True)
            new[name] = weight / (weight.norm(dim=-1, keepdim=True) + 1e-5) * length
        return new

    @staticmethod
    def _read(state: State, q: Tensor) -> Tensor:
        hidden = F.silu(q @ state["w0"].transpose(-1, -2)) * (q @ state["w2"].transpose(-1, -2))
        return hidden @ state["w1"].transpose(-1, -2)

    def forward(
        self, x, *, grid=None, order=None, seq_idx=None, state=None, return_state=False
    ) -> Tensor | tuple[Tensor, State]:
        """As `TokenMixer.forward`; a state belongs between two chunks.

        Raises:
            InputError: packed documents, or a state wanted of a mixer that is not causal.
        """
        if seq_idx is not None:
            raise InputError("LaCT has no packed documents: run each as a batch item of its own.")
        if (state is not None or return_state) and not self.causal:
            raise InputError("LaCT carries a state only if it is causal.")
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = (F.normalize(F.silu(t), dim=-1, eps=1e-5) for t in (q, k))
        rates = F.softplus(self.rates(x)).unflatten(-1, (3, -1)).permute(2, 0, 3, 1)[..., None]
        state = self._initial(len(x)) if state is None else state
        outputs = []
        for start in range(0, x.shape[1], self.granularity):
            part = slice(start, start + self.granularity)
            last = part.stop >= x.shape[1]
            if self.causal:
                outputs.append(self._read(state, q[:, :, part]))
            if not (self.causal and last and not return_state):
                state = self._update(state, k[:, :, part], v[:, :, part], rates[:, :, :, part])
            if not self.causal:
                outputs.append(self._read(state, q[:, :, part]))
        y = self.norm(torch.cat(outputs, dim=2)).transpose(1, 2).flatten(2)
        y = self.proj(y)
        return (y, state) if return_state else y

    def _initial(self, batch: int) -> State:
        return State(
            {name: getattr(self, name).expand(batch, -1, -1, -1) for name in ("w0", "w1", "w2")}
        )

    def init_state(self, batch, device=None, dtype=None) -> State:
        if not self.causal:
            return super().init_state(batch, device, dtype)
        return State({k: t.to(device, dtype) for k, t in self._initial(batch).items()})

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.causal:
            return super().step(x, state)
        return self(x, state=state, return_state=True)

    def flops(self, tokens: int) -> int:
        # Keys forward 2 products, their gradients 4, queries 3: of 2 x head_dim x hidden each.
        return tokens * (linear_flops(self.qkv, self.rates, self.proj) + 18 * self.w0.numel())
