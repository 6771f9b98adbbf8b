"""``--fixture-dir DIR`` runs the parity tests over another folder of fixtures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "tessera_parity_cases", Path(__file__).with_name("cases.py")
)
cases = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cases
spec.loader.exec_module(cases)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fixture-dir",
        type=Path,
        default=None,
        help="folder of parity fixtures (default: tests/parity/fixtures without pending cases)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "parity_case" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("fixture_dir")
    chosen = cases.collect(folder or cases.FIXTURES)
    if folder is None:
        waiting = cases.pending()
        chosen = [c for c in chosen if c not in waiting and (c[0], "*") not in waiting]
    elif not chosen:
        raise pytest.UsageError(f"no fixtures in {folder}")
    folder = (folder or cases.FIXTURES).resolve()
    metafunc.parametrize(
        "parity_case", [(folder, *c) for c in chosen], ids=[f"{s}-{c}" for s, c in chosen]
    )
