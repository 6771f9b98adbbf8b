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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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


# The operator behind `kernels.linear`.
_ONEDNN_LINEAR = (
    {torch.ops.mkldnn._linear_pointwise: _linear_flop}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else {}
)


def count_flop(function: Callable[[], Any]) -> int:
    """Floating-point operations of the products, convolutions and attention in a call."""
    # The counter does not know CPU's fused attention; as plain products it counts the same.
    counter = FlopCounterMode(display=False, custom_mapping=_ONEDNN_LINEAR)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


def best_seconds(function: Callable[[], Any], total: float = 1.0) -> float:
    """Shortest wall time of the calls that fit into ``total`` seconds."""
    best, end = float("inf"), time.perf_counter() + total
    while (start := time.perf_counter()) < end:
        function()
        best = min(best, time.perf_counter() - start)
    return best


def flop_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, linear layer or convolution, whichever runs fastest."""
    matrix = torch.randn(2048, 2048).to(dtype)
    pictures, kernels = torch.randn(8, 128, 64, 64).to(dtype), torch.randn(128, 128, 3, 3).to(dtype)
    functions = (
        lambda: torch.mm(matrix, matrix),
        lambda: linear(matrix, matrix),
        lambda: torch.conv2d(pictures, kernels, padding=1),
    )
    return max(count_flop(function) / best_seconds(function) for function in functions)


def processor() -> str:
    """The name of the CPU and its number of logical cores."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"
