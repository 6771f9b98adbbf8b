"""The benchmark of all kernels, rehearsed: every table of the GPU's part, scans interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_rehearsal(tmp_path):
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "tessera.benchmarks.bench_kernels", "--out", str(out)]
    command += ["--device", "rehearsal", "--repeats", "1"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    report = json.loads(out.read_text(encoding="utf8"))
    assert all(row["error"] < 1e-2 for row in report["scans"]["scans"])
    assert {"share of bandwidth", "forward and backward"} <= report["scans"]["scans"][0].keys()
    assert report["scans"]["blocks"][0]["ratio with mlp"] > 0
    for part in ("rows", "blocks", "models"):
        assert report["tokens"][part]
    tables = out.with_suffix(".md").read_text(encoding="utf8")
    assert "transformer of 2 blocks of 64" in tables and "mate" in tables
