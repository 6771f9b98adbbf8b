"""Published systems compute what their published code computed."""

from __future__ import annotations

import sys

import torch

cases = sys.modules["tessera_parity_cases"]


def test_parity(parity_case):
    folder, system, name = parity_case
    runner = cases.find_runner(system, name)
    assert runner is not None, f"nothing here computes {system} {name}"
    fixture = cases.open_fixture(folder, system)
    with torch.no_grad():
        results = runner(fixture.case(name))
    fixture.check(name, results)
