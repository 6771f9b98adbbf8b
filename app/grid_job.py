"""A grid of pictures over two settings, cell by cell."""

from __future__ import annotations

from typing import Any

from .jobs import StudioJob
from .studio import Studio
from .xy_grid import Axis, Grid


class GridJob(StudioJob):
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
        super().__init__(studio, owner)
        self.prompt, self.seed, self.model = prompt, seed, model
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
                self.source = self.show(grid.picture())
            self.touch()
            if self.cancel.is_set():
                break
        if grid.pictures:
            path = self.studio.outputs(self.owner).save(grid.picture(), grid.record())
            self.name, self.source = f"{path.parent.name}/{path.name}", str(path)

    def saved(self) -> list[str]:
        return [self.name] if self.name else []

    def view(self) -> dict[str, Any]:
        return {
            **super().view(),
            "prompt": self.prompt if self.model is None else f"{self.prompt} · {self.model}",
            "seed": self.seed,
            "cells": self.cells,
            "done": self.done,
            "part": self.part,
            "source": self.source,
            "name": self.name,
        }
