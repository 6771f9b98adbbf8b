"""A prompt becomes pictures: tokens one by one, coarse previews, pictures, files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..modalities.image import image_grid
from ..pipelines.seeds import MAX_SEED, seed_generators
from .jobs import StudioJob
from .records import picture_record
from .studio import Speed, Studio

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines.image_generation import ImageGenerationPipeline

# Share of a run that coarse pictures may take.
PREVIEW_BUDGET = 0.1


@dataclass(frozen=True)
class PictureRequest:
    """What to make; None leaves the choice to the model.

    Attributes:
        prompt: cleaned, one alternative of the braces.
        count: pictures, of the seeds ``seed``, ``seed + 1``, ...
        model: one of `Studio.image_models`; None is the app's own.
        given, keep: ids of a picture, and how many of the first ones stay.
    """

    prompt: str
    seed: int
    count: int = 1
    style: str | None = None
    num_tokens: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    num_steps: int | None = None
    model: str | None = None
    given: tuple[int, ...] = ()
    keep: int = 0


@dataclass
class Item:
    """One picture in the making.

    Attributes:
        source: the file to show, a preview at first.
        name: of the saved picture in the outputs folder, empty while there is none.
        sheet: file with the pictures of ``lengths`` token prefixes below each other.
    """

    seed: int
    tokens: list[int] = field(default_factory=list)
    source: str = ""
    name: str = ""
    lengths: list[int] = field(default_factory=list)
    sheet: str = ""


def prefix_lengths(count: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... below ``count``: where the eye sees a difference."""
    lengths = {
        min(step * 2**power, count) for power in range(count.bit_length()) for step in (2, 3)
    }
    return sorted((lengths | {1}) - {count})


def prefixes(pipeline: ImageGenerationPipeline, count: int) -> list[int]:
    """Numbers of tokens below ``count`` at which the picture is worth a look; of tokens without an
    order there are none."""
    if not pipeline.tokenizer.ordered:
        return []
    if pipeline.generator.unit == "scale":
        ends = accumulate(side * side for side in pipeline.generator.config.patch_nums)
        return [end for end in ends if end < count]
    return prefix_lengths(count)


class PictureJob(StudioJob):
    kind = "picture"

    def __init__(self, studio: Studio, owner: str, request: PictureRequest):
        super().__init__(studio, owner)
        self.request = request
        self.warning = studio.prompt_warning(request.prompt)
        self.step, self.total = 0, request.num_tokens or 0
        self.unit = "token"
        self.settings: dict[str, Any] = {}
        self.edit: Any = None
        self.items = [Item((request.seed + i) % (MAX_SEED + 1)) for i in range(request.count)]
        self._finals: list[Image.Image] = []
        self._previews = 0

    def run(self) -> None:
        request = self.request
        pipeline = self.studio.load(request.model)
        self.unit = pipeline.generator.unit
        if pipeline is self.studio.pipeline:
            self.warning = self.studio.prompt_warning(request.prompt)
        wanted = {
            "num_tokens": request.num_tokens,
            "num_steps": request.num_steps,
            "guidance_scale": request.guidance_scale,
            "temperature": request.temperature,
        }
        # The page's sliders of another model do not count.
        wanted = {k: v for k, v in wanted.items() if v is not None and k in pipeline.settings}
        self.settings = {**pipeline.settings, **wanted}
        if request.style is not None:
            wanted["style"] = self.settings["style"] = request.style
        self.edit = self.make_edit(pipeline)
        start, previewing = time.perf_counter(), 0.0
        partials = pipeline.stream(
            request.prompt,
            num_images_per_prompt=request.count,
            generator=seed_generators(request.seed, request.count),
            edit=self.edit,
            output_type="tokens",
            **wanted,
        )
        for partial in partials:
            self.step, self.total = partial.step, partial.total
            if not partial.tokens.dtype.is_floating_point:
                for item, ids in zip(self.items, partial.tokens.tolist(), strict=True):
                    item.tokens = ids
            self.touch()
            if self.cancel.is_set():
                break
            spent = time.perf_counter()
            if self._preview_fits(previewing, spent - start):
                self._preview(pipeline, partial)
                self.speed.preview = time.perf_counter() - spent
                previewing += self.speed.preview
        drawn = time.perf_counter()
        if not self.cancel.is_set():
            self.speed.token = (drawn - start - previewing) / (self.total * request.count)
        self._decode(pipeline, partial)

    def make_edit(self, pipeline: ImageGenerationPipeline) -> Any:
        """What is kept of an earlier picture, if anything."""
        if not self.request.given:
            return None
        import torch

        return pipeline.variation(torch.tensor(self.request.given), self.request.keep)

    def afterwards(self) -> Iterator[None]:
        """Decode prefixes of each picture for the slider."""
        if not self._finals or (self.edit is not None and self.edit.picture is not None):
            return
        pipeline = self.studio.load(self.request.model)
        import torch

        for item, final in zip(self.items, self._finals, strict=False):
            lengths = prefixes(pipeline, len(item.tokens))
            pictures = []
            for length in lengths:
                tokens = torch.tensor([item.tokens[:length]], device=pipeline.device)
                pictures += pipeline.decode_tokens(tokens, [item.seed], pipeline.preview_steps)
                yield
            item.sheet = self.show(image_grid([*pictures, final], columns=1, padding=0))
            item.lengths = [*lengths, len(item.tokens)]
        self._finals = []

    @property
    def speed(self) -> Speed:
        return self.studio.speed_of(self.request.model)

    def expected_seconds(self) -> float:
        pipeline, speed = self.studio.pipeline, self.speed
        if pipeline is None:
            return 0.0
        tokens = (self.total or pipeline.default_num_tokens) - self.step
        pictures = self.request.count - len(self._finals)
        return tokens * speed.token * self.request.count + pictures * speed.decode

    def saved(self) -> list[str]:
        return [item.name for item in self.items if item.name]

    def view(self) -> dict[str, Any]:
        request = self.request
        return {
            **super().view(),
            "prompt": request.prompt,
            "style": request.style or "",
            "model": "" if self.request.model is None else self.request.model,
            "unit": self.unit,
            "keep": self.request.keep,
            "step": self.step,
            "total": self.total,
            "warning": self.warning,
            "items": [vars(item).copy() for item in self.items],
            **self._offers(),
        }

    def _offers(self) -> dict[str, bool]:
        """What can be made of these pictures: variations, or the rest of their tokens."""
        pipeline = (
            None if self.pending or not self.settings else self.studio.load(self.request.model)
        )
        if pipeline is None or not pipeline.tokenizer.ordered or self.kind != "picture":
            return {"variable": False, "finishable": False}
        short = "num_tokens" in self.settings and len(self.items[0].tokens) < pipeline.num_tokens
        return {"variable": True, "finishable": short}

    def _preview_fits(self, spent: float, elapsed: float) -> bool:
        speed = self.speed
        whole = max(elapsed, self.request.count * speed.picture(self.total))
        earned = PREVIEW_BUDGET * whole * self.step / self.total
        return self.step < self.total and spent + speed.preview <= earned

    def _preview(self, pipeline: ImageGenerationPipeline, partial: Any) -> None:
        """Show the next picture as far as it is."""
        k = self._previews % len(self.items)
        self._previews += 1
        item = self.items[k]
        item.source = self.show(partial.decode(slice(k, k + 1), pipeline.preview_steps)[0])
        self.touch()

    def _decode(self, pipeline: ImageGenerationPipeline, partial: Any) -> None:
        """Tokens -> pictures -> files, one after the other; the rest in few steps once stopped."""
        outputs = self.studio.outputs(self.owner)
        failure = None
        for k, item in enumerate(self.items):
            stopped = self.cancel.is_set()
            usual = self.settings.get("num_inference_steps")
            steps = pipeline.preview_steps if stopped else usual
            start = time.perf_counter()
            (image,) = partial.decode(slice(k, k + 1), steps)
            if not stopped:
                self.speed.decode = time.perf_counter() - start
            self._finals.append(image)
            # First to a place that is sure: a full disk must not cost the picture on the page.
            item.source = self.show(image)
            try:
                path = outputs.save(image, self._record(pipeline, item, partial.tokens[k], steps))
                item.name = f"{path.parent.name}/{path.name}"
                item.source = str(path)
            except OSError as error:
                failure = error
            self.touch()
        if failure is not None:
            raise failure

    def _record(
        self, pipeline: ImageGenerationPipeline, item: Item, tokens: Any, steps: int | None
    ) -> dict[str, Any]:
        """Each picture is recorded as a run of its own, which makes it again."""
        settings = {**self.settings, "num_inference_steps": steps}
        if self.step < self.total:
            if self.unit == "token":
                settings["num_tokens"] = len(tokens)
            else:
                settings["stopped_at"] = self.step
        sha256 = self.studio.sha256 if pipeline is self.studio.pipeline else None
        prompt = self.request.prompt
        return picture_record(
            pipeline, prompt, item.seed, 0, settings, 1, tokens, self.edit, sha256
        )
