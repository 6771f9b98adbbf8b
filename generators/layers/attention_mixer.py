"""Softmax attention behind the interface of the mixers: over everything, or inside windows of a grid."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from .mixer import State, TokenMixer, linear_flops


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: pairs of halves of ``[B, L, heads, d]`` by angles ``[L, d / 2]``."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def angles_of(positions: Tensor, dim: int) -> Tensor:
    """Float positions ``[L]`` -> angles ``[L, dim / 2]``, base 10000."""
    exponents = torch.arange(0, dim, 2, device=positions.device) / dim
    return positions[:, None].float() * 10000.0**-exponents


class _QKV(TokenMixer):
    """Projections without biases, RMSNorm over each head's queries and keys."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        if dim % head_dim or head_dim % 16:
            raise InputError(
                f"Heads of {head_dim} do not divide a width of {dim} into multiples of 16."
            )
        self.head_dim = head_dim
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)

    def project(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three of ``[B, L, heads, head_dim]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles), v


class AttentionMixer(_QKV):
    """Softmax attention over the whole sequence, with rotary positions along it.

    Args:
        dim: width D.
        head_dim: of a head.
        is_causal: token t sees none after it; the state is the keys and values so far.
    """

    def __init__(self, dim: int, head_dim: int = 64, is_causal: bool = False):
        super().__init__(dim, head_dim)
        self.causal = is_causal

    def forward(
        self, x, *, grid=None, order=None, seq_idx=None, state=None, return_state=False
    ) -> Tensor | tuple[Tensor, State]:
        if (state is not None or return_state) and not self.causal:
            raise InputError("Attention over everything takes and returns no state.")
        length = x.shape[1]
        past = 0 if state is None else state["k"].shape[2]
        positions = torch.arange(past, past + length, device=x.device)
        q, k, v = (t.transpose(1, 2) for t in self.project(x, angles_of(positions, self.head_dim)))
        if state is not None:
            k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)
        mask = None
        if self.causal and (past > 0 or seq_idx is not None):
            mask = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril(past)
        if seq_idx is not None:
            keys = F.pad(seq_idx, (past, 0))
            same = (seq_idx[:, :, None] == keys[:, None])[:, None]
            mask = same if mask is None else same & mask
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None
        )
        y = self.proj(y.transpose(1, 2).flatten(2))
        return (y, State(k=k, v=v)) if return_state else y

    def init_state(self, batch, device=None, dtype=None) -> State:
        if not self.causal:
            return super().init_state(batch, device, dtype)
        weight = self.qkv.weight
        shape = (batch, weight.shape[1] // self.head_dim, 0, self.head_dim)
        empty = torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype)
        return State(k=empty, v=empty)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.causal:
            return super().step(x, state)
        return self(x, state=state, return_state=True)

    def flops(self, tokens: int) -> int:
        pairs = tokens * tokens // (2 if self.causal else 1)
        return tokens * linear_flops(self.qkv, self.proj) + 4 * pairs * self.qkv.weight.shape[1]


class WindowAttention(_QKV):
    """Attention inside windows of a (t, h, w) grid: LinGen's temporal Swin attention (TESA).

    Wang et al., CVPR 2025, arXiv 2412.09856; the window's size is our choice, the paper's could not be
    read. Windows that the border cuts are smaller; nothing wraps around.

    Args:
        dim: width D.
        head_dim: of a head.
        window: tokens of a window along (t, h, w); cut to the grid where it is smaller.
        shifted: windows begin half a window earlier, as in every other layer.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 64,
        window: tuple[int, int, int] = (16, 4, 4),
        shifted: bool = False,
    ):
        super().__init__(dim, head_dim)
        self.window, self.shifted = tuple(window), shifted

    def forward(
        self, x, *, grid=None, order=None, seq_idx=None, state=None, return_state=False
    ) -> Tensor:
        """As `TokenMixer.forward`; ``order`` has no effect.

        Raises:
            InputError: no grid, or a state is given or wanted.
        """
        if grid is None:
            raise InputError("Window attention needs grid=(t, h, w).")
        if state is not None or return_state:
            raise InputError("Window attention takes and returns no state.")
        q, k, v = self.project(x, grid_angles(tuple(grid), self.head_dim, x.device))
        y = torch.empty_like(v)
        for places, missing, kept in windows_of(tuple(grid), self.window, self.shifted, x.device):
            windows, size = places.shape
            # [B, windows, heads, tokens, head_dim]; tokens that are missing are masked as keys.
            parts = [
                t[:, places.flatten()].unflatten(1, (windows, size)).transpose(2, 3)
                for t in (q, k, v)
            ]
            mask = None if missing is None else ~missing[:, None, None]
            if seq_idx is not None:
                index = seq_idx[:, places.flatten()].unflatten(1, (windows, size))
                same = (index[..., :, None] == index[..., None, :])[:, :, None]
                # A missing query sees everything: a row that sees nothing has no gradient.
                mask = same if mask is None else mask & same | missing[:, None, :, None]
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(2, 3)
            places, out = places.flatten(), out.flatten(1, 2)
            if kept is not None:
                places, out = places[kept], out[:, kept]
            y = y.index_copy(1, places, out)
        return self.proj(y.flatten(2))

    def flops(self, tokens: int) -> int:
        t, h, w = self.window
        return tokens * (
            linear_flops(self.qkv, self.proj) + 4 * t * h * w * self.qkv.weight.shape[1]
        )


@torch.compiler.assume_constant_result
def grid_angles(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotary angles ``[t h w, head_dim / 2]``: axes share the head 2 : 3 : 3."""
    return _grid_angles(grid, head_dim, device)


@lru_cache(maxsize=64)
def _grid_angles(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    sizes = [head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8]
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    return torch.cat(
        [angles_of(axis.flatten(), size) for axis, size in zip(axes, sizes, strict=True)], dim=1
    )


@torch.compiler.assume_constant_result
def windows_of(
    grid: tuple[int, int, int], window: tuple[int, int, int], shifted: bool, device: torch.device
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Windows of a grid, the whole ones and then those that its border cuts.

    Returns:
        Rows of places int64 ``[n, tokens]``, what is missing of them bool ``[n, tokens]`` (filled
        up with place 0), and indices of the others in the flattened places; None where nothing
        is missing.
    """
    return _windows_of(grid, window, shifted, device)


@lru_cache(maxsize=64)
def _windows_of(
    grid: tuple[int, int, int], window: tuple[int, int, int], shifted: bool, device: torch.device
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    spans = []
    for size, width in zip(grid, window, strict=True):
        width = min(size, width)
        first = -(width // 2) if shifted and width < size else 0
        starts = range(first, size, width)
        spans.append([range(max(s, 0), min(s + width, size)) for s in starts])
    _, rows, columns = grid
    found = [
        torch.tensor([(t * rows + h) * columns + w for t, h, w in product(*span)])
        for span in product(*spans)
    ]
    size = max(len(places) for places in found)
    whole = torch.stack([places for places in found if len(places) == size])
    groups = [(whole.to(device), None, None)]
    cut = [places for places in found if len(places) < size]
    if cut:
        missing = torch.stack([torch.arange(size) >= len(places) for places in cut])
        filled = torch.stack([F.pad(places, (0, size - len(places))) for places in cut])
        kept = (~missing).flatten().nonzero()[:, 0]
        groups.append((filled.to(device), missing.to(device), kept.to(device)))
    return groups
