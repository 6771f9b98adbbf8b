"""What the benchmarks share: times, FLOPs, and the rates of this machine that set the floors."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..kernels.linear import linear


def seconds_of(function: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _linear_flop(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


def _lstm_flop(
    x: Sequence[int], weight: Sequence[int], recurrent: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * x[0] * x[1] * (prod(weight) + prod(recurrent))


# The operators behind `kernels.linear`, and behind nn.LSTM on a CPU.
_ONEDNN = {torch.ops.aten.mkldnn_rnn_layer: _lstm_flop}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _ONEDNN[torch.ops.mkldnn._linear_pointwise] = _linear_flop


_PRODUCTS = {*flop_registry, *_ONEDNN}


def count_flop(function: Callable[[], Any]) -> int:
    """Floating-point operations of the products, convolutions and attention in a call."""
    # The counter does not know CPU's fused attention; as plain products it counts the same.
    counter = FlopCounterMode(display=False, custom_mapping=_ONEDNN)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


class _WeightReads(TorchDispatchMode):
    """Adds up the bytes of a model's weights that products and convolutions are given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _PRODUCTS:
            for value in args:
                if isinstance(value, Tensor) and value.ndim > 1:
                    read = value.untyped_storage().data_ptr() in self.weights
                    self.bytes += value.nbytes if read else 0
        return func(*args, **(kwargs or {}))


def count_work(function: Callable[[], Any], model: nn.Module) -> tuple[int, int]:
    """Of a call: `count_flop`, and the bytes of a model's weights that its products read."""
    with _WeightReads(model) as reads:
        flop = count_flop(function)
    return flop, reads.bytes


def cpu_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Least CPU time, of all threads, of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times[1:])


def time_stages(stages: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Of each call "seconds" and "cpu_seconds", least of several, and "gflop"."""
    return {
        name: {
            "seconds": seconds_of(function, repeats),
            "cpu_seconds": cpu_seconds(function, repeats),
            "gflop": count_flop(function) / 1e9,
        }
        for name, function in stages.items()
    }


def best_seconds(
    function: Callable[[], Any],
    total: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Shortest time of the calls that fit into ``total`` seconds; by default wall time."""
    best, end = float("inf"), clock() + total
    while (start := clock()) < end:
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def read_rate(size: int, device: str = "cpu", **options: Any) -> float:
    """Bytes/s at which a buffer of ``size`` bytes is read over and over.

    Args:
        options: of `best_seconds`.
    """
    buffer = torch.ones(max(size // 4, 1), device=device)
    return buffer.nbytes / best_seconds(buffer.sum, **options)


def flop_rate(dtype: torch.dtype, device: str = "cpu", **options: Any) -> float:
    """FLOP/s of a large matrix product, linear layer or convolution, whichever runs fastest.

    Args:
        options: of `best_seconds`.
    """
    kind = {"dtype": dtype, "device": device}
    matrix = torch.randn(2048, 2048).to(**kind)
    pictures = torch.randn(8, 128, 64, 64).to(**kind)
    kernels = torch.randn(128, 128, 3, 3).to(**kind)
    functions = (
        lambda: torch.mm(matrix, matrix),
        lambda: linear(matrix, matrix),
        lambda: torch.conv2d(pictures, kernels, padding=1),
    )
    return max(count_flop(function) / best_seconds(function, **options) for function in functions)


def processor() -> str:
    """The name of the CPU and its number of logical cores."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"
