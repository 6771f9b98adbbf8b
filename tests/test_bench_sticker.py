from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from tessera.benchmarks import bench_sticker, measure
from tessera.kernels.linear import linear
from tessera.modalities.errors import InputError
from tessera.tests.tiny import tiny_pipeline


def test_count_flop_of_known_operations():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert measure.count_flop(lambda: a @ b) == 2 * 3 * 5 * 7
    query, mask = torch.randn(2, 4, 1, 8), torch.ones(2, 1, 1, 16, dtype=torch.bool)
    keys = torch.randn(2, 4, 16, 8)
    attention = measure.count_flop(
        lambda: F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask)
    )
    assert attention == 2 * (2 * 2 * 4 * 16 * 8)  # Scores and sums over 16 keys.


def test_count_flop_of_large_linear_layers():
    x, weight = torch.randn(64, 256), torch.randn(512, 256)
    with torch.no_grad():
        assert measure.count_flop(lambda: linear(x, weight)) == 2 * 64 * 256 * 512
        strided = weight.T.contiguous().T
        assert torch.allclose(linear(x, strided), x @ weight.T, atol=1e-3)


def test_generator_bytes_by_hand():
    pipeline = tiny_pipeline()
    # Two blocks at width 32: three norms, two per-head norms of 16 in each attention, qkv + out,
    # q + out of the cross-attention, the gated MLP; then the last norm and a head of 512 ids.
    block = 3 * 2 * 32 + 2 * 2 * 2 * 16 + 4 * 32 * 32 + 2 * 32 * 32 + 3 * 32 * 64
    step = 2 * block + 2 * 32 + 32 * 512
    text = 2 * (2 * 32 * 32) + 2 * 32 * 32
    assert bench_sticker.generator_bytes(pipeline) == 4 * (text + step * 8)


def test_stages_and_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "best_seconds", lambda function: 1e-3)
    monkeypatch.setattr(
        bench_sticker.TextToImagePipeline, "from_pretrained", lambda name: tiny_pipeline()
    )
    processes = {
        "cold_first_seconds": 4.0,
        "cold_seconds": 3.0,
        "cold_peak_mb": 700.0,
        "import_seconds": 0.01,
    }
    monkeypatch.setattr(bench_sticker, "measure_processes", lambda model: processes)
    out = tmp_path / "speed.json"
    bench_sticker.main(out=out, model="tiny", threads=torch.get_num_threads(), repeats=1)
    report = json.loads(out.read_text("utf8"))
    stages = {(row["stage"], row["batch"]): row for row in report["stages"]}
    assert len(stages) == 4 * 2
    for (_, batch), row in stages.items():
        assert row["times_the_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        assert row["floor_flop_seconds"] == pytest.approx(
            row["gflop"] * 1e9 / report["rates"]["flop_per_s"]
        )
        assert row["floor_seconds"] >= max(row["floor_flop_seconds"], row["floor_bytes_seconds"])
        assert batch in (1, 8)
    for batch in (1, 8):
        parts = [row for key, row in stages.items() if key[1] == batch and key[0] != "whole"]
        whole = stages["whole", batch]
        assert whole["floor_seconds"] >= sum(row["floor_seconds"] for row in parts) - 1e-12
        assert whole["gflop"] > sum(row["gflop"] for row in parts)
    # Eight pictures need eight times the arithmetic and the same weights.
    one, eight = stages["flow decoder, 2 steps", 1], stages["flow decoder, 2 steps", 8]
    assert 7 * one["gflop"] < eight["gflop"] <= 8 * one["gflop"]  # Modulations serve the batch.
    assert eight["weight_mb"] == one["weight_mb"]
    table = (tmp_path / "speed.md").read_text("utf8")
    assert "| generator, guided | 8 |" in table
    assert "| peak memory | 700 MB |" in table


def test_run_process_measures_the_peak_of_that_process():
    small = bench_sticker.run_process(["-c", "pass"])
    large = bench_sticker.run_process(["-c", "x = b'1' * 200_000_000"])
    assert 180 < large["peak_mb"] - small["peak_mb"] < 300
    with pytest.raises(InputError, match="no such model"):
        bench_sticker.run_process(["-c", "import sys; sys.exit('no such model')"])


def test_bad_model_exits_with_2(monkeypatch, tmp_path, capsys):
    def fail(model):
        raise InputError(f'There is no model "{model}".')

    monkeypatch.setattr(bench_sticker, "measure_processes", fail)
    with pytest.raises(bench_sticker.typer.Exit) as stop:
        bench_sticker.main(out=tmp_path / "speed.json", model="nothing", threads=1, repeats=1)
    assert stop.value.exit_code == 2
    assert 'Error: There is no model "nothing".' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
