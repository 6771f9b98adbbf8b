"""Fixtures of published systems: what is read, rebuilt and compared (one form for every system)."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"


def load_module(path: Path) -> ModuleType:
    """A module by its file, since these folders are no packages."""
    name = f"tessera_parity_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


fill = load_module(HERE / "fill.py")


@dataclass
class Case:
    """One computation of a published system.

    Attributes:
        config: constructor values of the tiny published model.
        args: numbers, strings, flags and lists that the call needs.
        inputs: arrays that it needs, those of other cases included, as tensors.
        noise: rows of ``(draw, role, part, step)`` in the order of use; empty where none is drawn.
        after: cases to run first on the same object.
        outputs: names of what must be returned.
    """

    system: str
    name: str
    config: dict[str, Any]
    args: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: list[str]
    fixture: Fixture
    noise: list[tuple[Tensor, str, int, int | None]] = field(default_factory=list)
    after: list[Case] = field(default_factory=list)

    def state(self, prefix: str = "", variant: str | None = None) -> dict[str, Tensor]:
        """The published state dict, of the entries with ``prefix``, without it."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.fixture.state(variant).items()
            if name.startswith(prefix)
        }


class Fixture:
    """``<system>.json`` and ``<system>.npz`` of a folder."""

    def __init__(self, folder: Path, system: str):
        self.json = json.loads((folder / f"{system}.json").read_text(encoding="utf8"))
        self.arrays = np.load(folder / f"{system}.npz", allow_pickle=False)
        self.system = system

    def state(self, variant: str | None = None) -> dict[str, Tensor]:
        arrays = fill.state_dict(self.json, self.arrays, variant)
        return {name: tensor(array) for name, array in arrays.items()}

    def case(self, name: str) -> Case:
        row = self.json["cases"][name]
        inputs = {key: self.array(f"{name}/in/{key}") for key in row["in"]}
        inputs |= {key: self.array(source) for key, source in row.get("uses", {}).items()}
        draws = row.get("noise", {}).get("draws", [])
        return Case(
            system=self.system,
            name=name,
            config=self.json["config"],
            args=row["args"],
            inputs=inputs,
            outputs=[key for key in row["out"] if key not in row.get("optional", [])],
            fixture=self,
            noise=[
                (tensor(fill.noise(k, tuple(shape), self.json["seed"])), role, part, step)
                for k, shape, role, part, step in draws
            ],
            after=[self.case(other) for other in row.get("after", [])],
        )

    def array(self, key: str) -> Tensor:
        return tensor(self.arrays[key])

    def tolerance(self, case: str, output: str) -> float:
        table = self.json["tolerance"]
        return table.get(f"{case}/{output}", table.get(case, table["default"]))

    def check(self, case: str, results: dict[str, Tensor]) -> None:
        """Assert that every output of the case is there and close enough (see the tolerance)."""
        row = self.json["cases"][case]
        for name in row["out"]:
            if name in row.get("optional", []) and name not in results:
                continue
            assert name in results, f"{self.system} {case}: output {name} was not returned"
            result = torch.as_tensor(results[name]).detach()
            for axis, index in enumerate(row.get("stored", {}).get(name, [])):
                if index is not None:
                    picked = torch.arange(result.shape[axis])[slice(*index)]
                    result = result.index_select(axis, picked)
            reference = self.array(f"{case}/out/{name}")
            where = f"{self.system} {case} {name}"
            assert result.shape == reference.shape, f"{where}: shape {list(result.shape)}"
            if not reference.dtype.is_floating_point:
                assert not result.dtype.is_floating_point, f"{where}: {result.dtype}"
                wrong = int((result != reference).sum())
                assert wrong == 0, f"{where}: {wrong} of {reference.numel()} differ"
                continue
            assert result.dtype.is_floating_point, f"{where}: {result.dtype}"
            if not reference.numel():
                continue
            difference = float((result.double() - reference.double()).abs().max())
            scale = max(1.0, float(reference.abs().max()))
            limit = self.tolerance(case, name) * scale
            assert difference <= limit, f"{where}: {difference:.3g} > {limit:.3g}"


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


@cache
def open_fixture(folder: Path, system: str) -> Fixture:
    return Fixture(folder, system)


def find_runner(system: str, case: str) -> Callable[[Case], dict[str, Tensor]] | None:
    """``RUNNERS[case]`` of ``runners/<system>.py`` ("*" serves every case), or None."""
    path = HERE / "runners" / f"{system}.py"
    if not path.is_file():
        return None
    runners = load_module(path).RUNNERS
    return runners.get(case, runners.get("*"))


def collect(folder: Path) -> list[tuple[str, str]]:
    """(system, case) of every fixture in a folder."""
    return [
        (path.stem, case)
        for path in sorted(folder.glob("*.json"))
        for case in json.loads(path.read_text(encoding="utf8"))["cases"]
    ]


def pending() -> set[tuple[str, str]]:
    """Cases of ``pending.txt``: lines of "system case", or "system" for all of its cases."""
    lines = (HERE / "pending.txt").read_text(encoding="utf8").splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return {(row[0], row[1] if len(row) > 1 else "*") for row in rows}
