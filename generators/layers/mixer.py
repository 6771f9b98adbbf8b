"""One interface for everything that mixes tokens: attention, scans, fast weights.

A block of a generator knows `TokenMixer` only; `build_mixer` makes one by name.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...modalities.errors import InputError

# Scan orders over a grid (t, h, w), slowest axis first: LinGen's rotary major scan, arXiv 2412.09856.
ORDERS = ("thw", "twh", "hwt", "wht")

MIXERS = {
    "attention": ".attention_mixer:AttentionMixer",
    "window_attention": ".attention_mixer:WindowAttention",
    "ssd": ".mamba:Mamba2",
    "s6": ".mamba:Mamba1",
    "hydra": ".hydra:Hydra",
    "mate": ".mate:MATE",
    "lact": ".lact:LaCT",
}


def build_mixer(name: str, dim: int, **config: Any) -> TokenMixer:
    """The mixer of that name, of width ``dim``.

    Raises:
        InputError: no such mixer.
    """
    if name not in MIXERS:
        raise InputError(f'Unknown mixer "{name}": use one of {", ".join(MIXERS)}.')
    module, kind = MIXERS[name].split(":")
    return getattr(importlib.import_module(module, __package__), kind)(dim, **config)


class State(dict[str, Tensor]):
    """What a causal mixer carries from token to token; tensors by name, batch first."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.values())

    def detach(self) -> State:
        return State({name: t.detach() for name, t in self.items()})

    def index(self, rows: Tensor) -> State:
        """Batch items ``rows``, int64: a part, or the order of a beam search."""
        return State({name: t[rows] for name, t in self.items()})


class TokenMixer(nn.Module, ABC):
    """``[B, L, D]`` -> ``[B, L, D]``.

    Attributes:
        causal: token t sees none after it; the mixer carries a state and has `step`.
        granularity: tokens of a step.
    """

    causal = False
    granularity = 1

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        *,
        grid: tuple[int, int, int] | None = None,
        order: str | None = None,
        seq_idx: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """Mix a sequence.

        Args:
            x: ``[B, L, D]``, tokens of a grid in order (t, h, w).
            grid: (t, h, w) with product L; only mixers that know places need it.
            order: one of `ORDERS` in which a scan visits the grid; others ignore it.
            seq_idx: int ``[B, L]``, documents packed in a row, counted from 0, that must not see
                each other.
            state: what `init_state` or an earlier call returned (causal mixers).
            return_state: also return the state after the last token.
        """

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token.

        Raises:
            InputError: the mixer is not causal.
        """
        raise InputError(f"{type(self).__name__} sees all tokens at once and has no state.")

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The next ``granularity`` tokens ``[B, n, D]``; the state may be changed in place.

        Raises:
            InputError: the mixer is not causal.
        """
        raise InputError(f"{type(self).__name__} sees all tokens at once and takes no steps.")

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over so many tokens."""


def linear_flops(*layers: nn.Module) -> int:
    """Of the products of linear layers and depthwise convolutions, a token."""
    return sum(2 * layer.weight.numel() for layer in layers)


@torch.compiler.assume_constant_result
def _scan_order(order: str, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    return _cached_scan_order(order, grid, device)


@lru_cache(maxsize=64)
def _cached_scan_order(order: str, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    places = torch.arange(grid[0] * grid[1] * grid[2], device=device).view(grid)
    return places.permute(["thw".index(axis) for axis in order]).flatten()


def scan_order(
    order: str | None, grid: tuple[int, int, int] | None, device: torch.device
) -> Tensor | None:
    """Positions ``[t h w]`` of the grid in the order of a scan; None for the stored order "thw".

    Raises:
        InputError: an unknown order, or no grid.
    """
    if order is None or order == "thw":
        return None
    if order not in ORDERS:
        raise InputError(f'Unknown scan order "{order}": use one of {", ".join(ORDERS)}.')
    if grid is None:
        raise InputError(f'The scan order "{order}" needs grid=(t, h, w).')
    return _scan_order(order, tuple(grid), device)
