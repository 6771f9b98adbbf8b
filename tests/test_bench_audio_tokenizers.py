from __future__ import annotations

import pytest
import torch

from tessera.benchmarks import bench_audio_tokenizers as bench
from tessera.benchmarks.measure import count_flop
from tessera.tests.tiny import tiny_codec
from tessera.weights.registry import model_info


def test_every_measured_tokenizer_is_registered():
    for name in bench.PUBLISHED:
        assert model_info(name).task == "audio-tokenizer"


def test_lstms_are_counted():
    lstm = torch.nn.LSTM(8, 16, 2).eval()
    with torch.no_grad():
        flop = count_flop(lambda: lstm(torch.zeros(5, 3, 8)))
    assert flop == 2 * 5 * 3 * 4 * 16 * ((8 + 16) + (16 + 16))


def test_report():
    rows = bench.measure(tiny_codec(), 0.5, rate=1e9, repeats=1)
    for row in rows.values():
        assert row["floor_cpu_seconds"] == pytest.approx(row["gflop"])
        assert row["cpu_seconds"] > 0 and row["seconds"] > 0
    report = {
        "machine": {"processor": "a CPU", "threads": 1, "dtype": "float32", "torch": "2"},
        "seconds": 0.5,
        "gflop_per_cpu_second": 1.0,
        "rows": [
            {"tokenizer": "tiny", "stage": stage, **row, "published_cpu_seconds": 1.0}
            for stage, row in rows.items()
        ],
    }
    table = bench.markdown(report)
    assert "| tiny | encode |" in table and "| tiny | decode |" in table
