"""The benchmark of the scans: its baselines compute the same; its GPU part: test_bench_kernels."""

from __future__ import annotations

import torch

from tessera.benchmarks.bench_scans import (
    Sizes,
    markdown,
    measure,
    plain_loop,
    published_listing,
    scan_inputs,
)
from tessera.kernels.ssd.ops import ssd


def test_baselines_compute_the_same():
    tensors = scan_inputs(Sizes((128,), 2, 4, 8), 1, 128, "cpu", torch.float32)
    expected = ssd(**tensors)
    for baseline in (plain_loop, published_listing):
        found = baseline(*tensors.values())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_cpu_tables():
    machine = {"name": "", "threads": 1, "torch": "", "python": ""}
    machine |= {"heads": 2, "head_dim": 4, "state": 8}
    report = measure(Sizes((64, 128), 2, 4, 8), "cpu", 1)
    assert [row["length"] for row in report["ratios"]] == [64, 128]
    assert "ssd / loop" in markdown({"machine": machine, **report})
