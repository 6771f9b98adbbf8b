"""A grid of pictures over the values of one or two settings, with the values beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from ..modalities.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.image_generation import ImageGenerationPipeline, Partial

MAX_CELLS = 64
# What people call the settings.
NAMES = {
    "tokens": "num_tokens",
    "steps": "num_steps",
    "decoder steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "seed": "seed",
}
WHOLE = ("num_tokens", "num_steps", "num_inference_steps", "top_k", "seed")


@dataclass(frozen=True)
class Axis:
    """One setting and its values; ``name`` is a value of `NAMES`."""

    name: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """``"guidance=1,3,6"`` -> an axis.

        Raises:
            InputError: another form, an unknown setting, or values that are no numbers.
        """
        label, _, values = text.partition("=")
        return cls.of(label, values)

    @classmethod
    def of(cls, label: str, values: str) -> Axis:
        """The same from a name and ``"1, 3, 6"``."""
        name = NAMES.get(label.strip())
        if name is None:
            raise InputError(f'A grid goes over {", ".join(NAMES)}, got "{label.strip()[:40]}".')
        kind = int if name in WHOLE else float
        try:
            found = tuple(
                kind(value) for value in values.replace("\n", ",").split(",") if value.strip()
            )
        except ValueError as error:
            raise InputError(
                f'"{values[:60]}" are not values of {label}: write for example {label}=1,2,4.'
            ) from error
        if not found:
            raise InputError(
                f"{label.capitalize()} has no values: write for example {label}=1,2,4."
            )
        return cls(name, found)

    @property
    def label(self) -> str:
        return next(label for label, name in NAMES.items() if name == self.name)


@dataclass
class Grid:
    """Pictures of one condition and seed.

    Attributes:
        pictures: of the cells that are done, row by row.

    Raises:
        InputError: too many cells, twice the same setting, or one that the model does not take.
    """

    pipeline: ImageGenerationPipeline
    condition: Any
    seed: int
    x: Axis
    y: Axis | None = None
    pictures: list[Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.y is not None and self.x.name == self.y.name:
            raise InputError(f"Both axes are {self.x.label}: choose another for one of them.")
        if len(self.cells) > MAX_CELLS:
            raise InputError(f"A grid has at most {MAX_CELLS} cells, got {len(self.cells)}.")
        for values in self.cells:
            self.pipeline.check_settings({k: v for k, v in values.items() if k != "seed"})

    @property
    def cells(self) -> list[dict[str, float]]:
        """The settings of each cell, row by row."""
        rows = [{}] if self.y is None else [{self.y.name: value} for value in self.y.values]
        return [{self.x.name: value, **row} for row, value in product(rows, self.x.values)]

    def draw(self) -> Iterator[Partial]:
        """Draw cell by cell, yielding each step; `pictures` grows. Closing it stops."""
        from ..pipelines.seeds import seed_generators

        for values in self.cells:
            settings = dict(values)
            seed = settings.pop("seed", self.seed)
            for partial in self.pipeline.stream(
                self.condition, generator=seed_generators(int(seed), 1), **settings
            ):
                if partial.output is not None:
                    self.pictures += partial.output.images
                yield partial

    def picture(self) -> Image:
        """The cells that are done, each row and column under its value."""
        from PIL import Image, ImageDraw, ImageFont

        size = max(self.pipeline.image_size, 128)
        font = ImageFont.load_default(max(size // 10, 11))
        head, gap = 2 * max(size // 10, 11), 4
        rows = [""] if self.y is None else [f"{self.y.label} {v:g}" for v in self.y.values]
        columns = [f"{self.x.label} {v:g}" for v in self.x.values]
        side = (
            0 if self.y is None else gap + round(max(font.getlength(text) for text in rows)) + gap
        )
        width = side + len(columns) * (size + gap) + gap
        sheet = Image.new("RGB", (width, head + len(rows) * (size + gap)), "white")
        pen = ImageDraw.Draw(sheet)
        for column, text in enumerate(columns):
            left = side + gap + column * (size + gap) + size // 2
            pen.text((left, head // 2), text, "black", font, anchor="mm")
        for row, text in enumerate(rows):
            pen.text((gap, head + row * (size + gap) + size // 2), text, "black", font, anchor="lm")
        for i, picture in enumerate(self.pictures):
            row, column = divmod(i, len(columns))
            place = (side + gap + column * (size + gap), head + row * (size + gap))
            sheet.paste(picture.resize((size, size)), place)
        return sheet

    def record(self) -> dict[str, Any]:
        """How the sheet was made."""
        from ..modalities.metadata import make_record

        pipeline = self.pipeline
        settings = {k: v for k, v in pipeline.settings.items() if v is not None}
        for axis, name in ((self.x, "x"), (self.y, "y")):
            if axis is not None:
                settings.pop(axis.name, None)
                settings[name] = f"{axis.label}={','.join(f'{v:g}' for v in axis.values)}"
        prompt = self.condition
        if pipeline.condition == "class":
            settings["class_label"] = pipeline.class_label(prompt)
            prompt = pipeline.class_name(settings["class_label"])
        return make_record(
            "Grid",
            pipeline.name,
            prompt,
            self.seed,
            settings=settings,
            device=pipeline.device,
            dtype=pipeline.dtype,
        )
