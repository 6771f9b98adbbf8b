"""A benchmark's report: the machine it ran on, and its files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from .measure import processor

DEVICES = ("cpu", "cuda", "rehearsal")


def machine(device: str) -> dict[str, Any]:
    """Names and versions that figures depend on.

    Args:
        device: "cpu", "cuda", or "rehearsal" (the GPU's part on a CPU).
    """
    if device == "rehearsal" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            "Set TRITON_INTERPRET=1 for a rehearsal: Triton decides when it is imported whether its "
            "kernels are interpreted."
        )
    if device not in DEVICES:
        raise InputError(f'The device "{device}" is none of {", ".join(DEVICES)}.')
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_report(
    out: Path, measure: Callable[[], dict[str, Any]], markdown: Callable[[dict[str, Any]], str]
) -> None:
    """Measure, write ``out`` (JSON) and the tables beside it (``.md``), and print the tables.

    The files are opened first: a folder that is missing costs no measurement.
    """
    with atomic_path(out) as json_path, atomic_path(out.with_suffix(".md")) as table_path:
        report = measure()
        json_path.write_text(json.dumps(report, indent=2) + "\n", "utf8")
        table_path.write_text(markdown(report), "utf8")
    typer.echo(markdown(report))
