"""A grid of pictures over two settings, cell by cell."""

from __future__ import annotations

import shutil
import time
from typing import Any

from ..modalities.image import save_image
from .jobs import Job
from .studio import Studio
from .xy_grid import Axis, Grid


class GridJob(Job):
    """
    Args:
        prompt: a text, or a class by name or number.
        model: one of `Studio.image_models`.
    """

    kind = "grid"

    def __init__(
        self,
        studio: Studio,
        owner: str,
        prompt: str,
        seed: int,
        x: Axis,
        y: Axis | None,
        model: str | None = None,
    ):
        super().__init__(owner)
        self.studio, self.prompt, self.seed, self.model = studio, prompt, seed, model
        self.x, self.y = x, y
        self.cells = len(x.values) * (1 if y is None else len(y.values))
        self.done, self.part = 0, 0.0
        self.source = self.name = ""

    def run(self) -> None:
        grid = Grid(self.studio.load(self.model), self.prompt, self.seed, self.x, self.y)
        for partial in grid.draw():
            self.part = partial.step / partial.total
            if len(grid.pictures) > self.done:
                self.done, self.part = len(grid.pictures), 0.0
                self.source = self._show(grid)
            self.touch()
            if self.cancel.is_set():
                break
        if grid.pictures:
            path = self.studio.outputs(self.owner).save(grid.picture(), grid.record())
            self.name, self.source = f"{path.parent.name}/{path.name}", str(path)

    def dispose(self) -> None:
        shutil.rmtree(self.studio.scratch / self.id, ignore_errors=True)
        if self.studio.shared and self.name:
            (self.studio.outputs(self.owner).folder / self.name).unlink(missing_ok=True)

    def view(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "state": self.state,
            "stopping": self.pending and self.cancel.is_set(),
            "prompt": self.prompt if self.model is None else f"{self.prompt} · {self.model}",
            "note": self.studio.queue_note(self) if self.state == "queued" else "",
            "error": self.error,
            "seed": self.seed,
            "cells": self.cells,
            "done": self.done,
            "part": self.part,
            "source": self.source,
            "name": self.name,
            "seconds": 0 if self.pending else round(self.seconds, 1),
        }

    def _show(self, grid: Grid) -> str:
        """Write the cells so far where only the page finds them."""
        folder = self.studio.scratch / self.id
        folder.mkdir(exist_ok=True)
        path = folder / f"{time.monotonic_ns()}.webp"
        save_image(grid.picture(), path)
        return str(path)
