"""Every benchmark of the kernels: scans, video blocks, token merging and selection.

    python -m tessera.benchmarks.bench_kernels --out kernels.json [--device cuda]

writes ``kernels.json`` and the same as tables, ``kernels.md``: what bench_scans.py and
bench_token_reduction.py measure, in one run. ``TRITON_INTERPRET=1 ... --device rehearsal`` goes through
the GPU's part on a CPU, the scans in Triton's interpreter, at sizes that mean nothing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bench_scans, bench_token_reduction
from .report import write_report

PARTS = {"scans": bench_scans, "tokens": bench_token_reduction}


def report_on(device: str, repeats: int) -> dict[str, Any]:
    """The report of each part."""
    return {name: part.report_on(device, repeats) for name, part in PARTS.items()}


def markdown(report: dict[str, Any]) -> str:
    return "\n".join(part.markdown(report[name]) for name, part in PARTS.items())


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the tables go beside it.")],
    device: Annotated[str, typer.Option(help="cpu, cuda, or rehearsal.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each form.")] = 5,
) -> None:
    """Measure all kernels on this machine."""
    write_report(out, partial(report_on, device, repeats), markdown)


if __name__ == "__main__":
    typer.run(main)
