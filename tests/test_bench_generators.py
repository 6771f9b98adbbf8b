"""The benchmark of image generators: what it counts, its rows and tables, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from tessera.benchmarks import bench_image_generators as bench
from tessera.benchmarks import measure
from tessera.kernels.linear import Linear
from tessera.modalities.errors import InputError
from tessera.tests.tiny_generators import tiny_generator
from tessera.weights.registry import model_info


@torch.no_grad()
def test_weights_count_as_often_as_they_are_read():
    small, large = Linear(8, 16), Linear(256, 512, bias=False)
    model = torch.nn.ModuleList([small, large])
    x, y = torch.randn(1, 8), torch.randn(64, 256)

    def work():
        for _ in range(3):
            small(x)
        large(y)  # By another operator than the small one.
        x @ torch.randn(8, 4)  # No weight of the model.

    flop, read = measure.count_work(work, model)
    assert read == 4 * (3 * 8 * 16 + 256 * 512)
    assert flop == 3 * 2 * 8 * 16 + 2 * 64 * 256 * 512 + 2 * 8 * 4


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_and_table(monkeypatch, tmp_path, compiled):
    """Miniatures in place of the published sizes."""
    names = {"rar-b": "rar", "flexar-113m-t2i": "flexar", "maskgen-kl-l": "maskgen-kl"}
    monkeypatch.setattr(bench, "SYSTEMS", {name: {} for name in names})
    monkeypatch.setattr(bench, "model_info", lambda name: name)
    build = lambda name, device, dtype: tiny_generator(names[name]).model.to(device, dtype)  # noqa: E731
    monkeypatch.setattr(bench, "build", build)
    monkeypatch.setattr(bench, "flop_rate", lambda *args, **kwargs: 1e9)
    monkeypatch.setattr(bench, "read_rate", lambda *args, **kwargs: 1e9)
    seen = []
    monkeypatch.setattr(bench, "compile_blocks", lambda model, device: seen.append(device))
    out = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    bench.main(out, "rar*,*-l,flex*", "cpu", "float32", 2, 1, compiled)
    torch.set_num_threads(threads)
    rows = {row["system"]: row for row in json.loads(out.read_text("utf8"))["rows"]}
    assert set(rows) == set(names) and len(seen) == 3 * compiled
    rar = rows["rar-b"]
    # Twelve steps read the weights of both blocks and of the head once each.
    block = 32 * 96 + 32 * 32 + 2 * 32 * 48
    steps = 12 * (2 * block + 32 * 24)
    modulations = 2 * 32 * 192 + 32 * 64
    assert rar["weights_read_gb"] * 1e9 == pytest.approx(4 * (steps + modulations), rel=1e-6)
    for row in rows.values():
        floors = row["gflop"], row["weights_read_gb"]
        assert row["bound_seconds"] == pytest.approx(max(floors))
        assert row["fraction_of_bound"] == pytest.approx(row["bound_seconds"] / row["cpu_seconds"])
        assert row["published_cpu_seconds"] is None  # Of batch 1 alone.
    table = out.with_suffix(".md").read_text("utf8")
    assert table.count("\n| ") == 5 and ("compiled" in table) == compiled


def test_the_published_models_are_in_the_registry():
    for name in (*bench.SYSTEMS, *bench.DECODED.values()):
        assert model_info(name).model_class()
    assert set(bench.PUBLISHED) <= set(bench.SYSTEMS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"systems": "gan*"}, 'No system matches "gan\\*"'),
        ({"dtype": "int8"}, 'Unknown dtype "int8"'),
        ({"device": "tpu"}, 'Unknown device "tpu"'),
    ],
)
def test_wrong_options_are_refused(tmp_path, change, words):
    options = {"systems": "*", "device": "cpu", "dtype": "float32", "batch": 1, "threads": 1}
    with pytest.raises(InputError, match=words):
        bench.main(out=tmp_path / "speed.json", **options | change, compiled=False)
    assert list(tmp_path.iterdir()) == []


def test_compiled_blocks_draw_the_same():
    """The decode loop of compiled blocks, in which nothing but rounding may change."""
    tiny = tiny_generator("rar")
    settings = {"temperature": 0.0, "guidance_scale": 1.0}
    expected = tiny.generate(**settings)
    torch.compiler.set_stance("force_eager")  # What is compiled is tested by torch.
    bench.compile_blocks(tiny.model, "cpu")
    assert torch.equal(tiny.generate(**settings), expected)
    torch.compiler.set_stance("default")
    assert all(block._compiled_call_impl is not None for block in tiny.model.blocks)
