"""The table of `bench_video` over a tiny system; no time is asserted."""

from __future__ import annotations

import json

import pytest
import torch

from tessera.benchmarks import bench_video
from tessera.kernels.linear import Linear


def tiny():
    model, x = Linear(64, 32, bias=False), torch.ones(4, 64)
    return model, [("run", lambda: model(x), 2.0)]


def test_rows_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_video, "SYSTEMS", {"tiny": tiny, "other": None})
    monkeypatch.setattr(bench_video, "flop_rate", lambda *_, **__: 1e9)
    monkeypatch.setattr(bench_video, "read_rate", lambda *_, **__: 1e6)
    bench_video.main(tmp_path / "video.json", only="t*", threads=1, repeats=1)
    report = json.loads((tmp_path / "video.json").read_text("utf8"))
    (row,) = report["rows"]
    assert row["gflop"] == pytest.approx(2 * 4 * 64 * 32 / 1e9)
    assert row["by_flop"] == pytest.approx(row["gflop"]) and row["weights_mb"] == 64 * 32 * 4 / 1e6
    assert row["floor_cpu_seconds"] == max(row["by_flop"], row["by_bytes"])
    assert "| tiny | run |" in (tmp_path / "video.md").read_text("utf8")
