"""The tables of `bench_animated` over tiny models; no time is asserted."""

from __future__ import annotations

import json

import pytest

from tessera.benchmarks import bench_animated
from tessera.modalities.errors import InputError
from tessera.tests.tiny_video import tiny_block_pipeline, tiny_interpolation


def test_rows_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_animated, "flop_rate", lambda *_: 1e9)
    monkeypatch.setattr(bench_animated, "read_rate", lambda *_: 1e6)
    monkeypatch.setattr(bench_animated, "PROMPTS", ("red ring",))
    video, smooth = str(tmp_path / "video"), str(tmp_path / "smooth")
    tiny_block_pipeline().save_pretrained(video)
    tiny_interpolation().save_pretrained(smooth)
    out = tmp_path / "animated.json"
    bench_animated.main(out, video, smooth, frames="3", threads=1, repeats=1)
    report = json.loads(out.read_text("utf8"))
    (row,) = report["clips"]
    assert row["frames"] == 9 and 0 < row["first_preview"] < row["seconds"]
    floor = report["floor"]
    assert floor["seconds"] == max(floor["gflop"], floor["weights_read_gb"] * 1e3)
    assert [row["what"] for row in report["memory"]] == [video, smooth]
    assert all(row["peak_mb"] > 100 for row in report["memory"])
    assert f"| {smooth} | 3 |" in out.with_suffix(".md").read_text("utf8")


@pytest.mark.parametrize("text", ["sixteen", "1", "4096", "16.5"])
def test_bad_lengths(text):
    with pytest.raises(InputError, match=r"frames|lengths"):
        bench_animated.parse_frames(text)
