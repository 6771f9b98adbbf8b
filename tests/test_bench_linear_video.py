"""The benchmark of the linear video systems: what it counts, and its tables, at toy sizes."""

from __future__ import annotations

import torch

from tessera.benchmarks import bench_linear_video
from tessera.benchmarks.bench_linear_video import as_dit, lingen_rows, scan_exponentials
from tessera.generators.linear_video.lingen import LinGen
from tessera.generators.linear_video.vfimamba import VFIMamba

TOY = {"dim": 32, "depth": 1, "head_dim": 16, "d_state": 8, "headdim": 16, "text_dim": 8}


def test_exponentials():
    """Stage 3: 2 x 4 x 8 steps; four directions, 2 x 32 channels, 16 states; stage 4 twice as wide."""
    model = VFIMamba(dim=4, depths=(1, 1, 1, 2, 1))
    expected = 2 * 64 * 4 * 64 * 16 + 16 * 4 * 128 * 16
    assert scan_exponentials(model, 32, 64) == expected


def test_dit_has_full_attention():
    model = LinGen(**TOY)
    linear = [model.flops((frames, 16, 16)) for frames in (16, 64)]
    dit = as_dit(model, 16)
    assert dit.velocity(
        torch.zeros(1, 16, 2, 4, 4),
        torch.ones(1),
        dit.condition(torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)),
    ).shape == (1, 16, 2, 4, 4)
    full = [dit.flops((frames, 16, 16)) for frames in (16, 64)]
    assert linear[1] / linear[0] < 4.1
    assert full[1] / full[0] > 8


def test_tables(monkeypatch):
    monkeypatch.setattr(bench_linear_video, "FRAMES", ((32, 32),))
    monkeypatch.setattr(bench_linear_video, "PUBLISHED", {("vfimamba-s", 32, 32): 1.0})
    monkeypatch.setattr(bench_linear_video, "flop_rate", lambda *_, **__: 1e11)
    rows = bench_linear_video.interpolation_rows("cpu", 1)
    assert [row["model"] for row in rows] == ["vfimamba-s", "vfimamba"]
    assert rows[0]["published"] == 1.0
    assert 0 < rows[0]["gflop"] < rows[1]["gflop"]
    clips = lingen_rows("cpu", 1, TOY, {"short": (2, 4, 4), "long": (4, 4, 4)})
    assert [row["tokens"] for row in clips] == [8, 16]
    report = {"interpolation": rows, "lingen": clips, "lingen config": TOY}
    report["machine"] = {"name": "a machine", "threads": 1, "torch": ""}
    text = bench_linear_video.markdown(report)
    assert "times the floor" in text and "flop ratio" in text
