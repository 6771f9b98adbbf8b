"""A prompt becomes pictures: tokens one by one, coarse previews, pictures, files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..modalities.image import image_grid, save_image
from ..modalities.metadata import make_record
from ..pipelines.seeds import MAX_SEED, seed_generators
from .jobs import Job
from .studio import Studio

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines.text_to_image import TextToImagePipeline

# Share of a run that coarse pictures may take.
PREVIEW_BUDGET = 0.1


@dataclass(frozen=True)
class PictureRequest:
    """What to make; None leaves the choice to the model.

    Attributes:
        prompt: cleaned, one alternative of the braces.
        count: pictures, of the seeds ``seed``, ``seed + 1``, ...
    """

    prompt: str
    seed: int
    count: int = 1
    style: str | None = None
    num_tokens: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None


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


class PictureJob(Job):
    kind = "picture"

    def __init__(self, studio: Studio, owner: str, request: PictureRequest):
        super().__init__(owner)
        self.studio, self.request = studio, request
        self.warning = studio.prompt_warning(request.prompt)
        self.step, self.total = 0, request.num_tokens or 0
        self.items = [Item((request.seed + i) % (MAX_SEED + 1)) for i in range(request.count)]
        self._finals: list[Image.Image] = []
        self._previews = 0

    def run(self) -> None:
        pipeline = self.studio.wait()
        request = self.request
        self.warning = self.studio.prompt_warning(request.prompt)
        start, previewing = time.perf_counter(), 0.0
        partials = pipeline.stream(
            request.prompt,
            num_tokens=request.num_tokens,
            guidance_scale=request.guidance_scale,
            temperature=request.temperature,
            style=request.style,
            num_images_per_prompt=request.count,
            generator=seed_generators(request.seed, request.count),
            output_type="tokens",
        )
        for partial in partials:
            self.step, self.total = partial.step, partial.total
            for item, ids in zip(self.items, partial.tokens.tolist(), strict=True):
                item.tokens = ids
            self.touch()
            if self.cancel.is_set():
                break
            spent = time.perf_counter()
            if self._preview_fits(previewing, spent - start):
                self._preview(pipeline, partial)
                self.studio.speed.preview = time.perf_counter() - spent
                previewing += self.studio.speed.preview
        drawn = time.perf_counter()
        if not self.cancel.is_set():
            self.studio.speed.token = (drawn - start - previewing) / (self.total * request.count)
        self._decode(pipeline, partial.tokens)

    def afterwards(self) -> Iterator[None]:
        """Decode prefixes of each picture for the slider."""
        if not self._finals:
            return
        pipeline = self.studio.wait()
        import torch

        for item, final in zip(self.items, self._finals, strict=False):
            lengths = prefix_lengths(len(item.tokens))
            pictures = []
            for length in lengths:
                tokens = torch.tensor([item.tokens[:length]], device=pipeline.device)
                steps = pipeline.config.preview_steps
                pictures += pipeline.decode_tokens(tokens, [item.seed], steps)
                yield
            item.sheet = self._show(image_grid([*pictures, final], columns=1, padding=0), item)
            item.lengths = [*lengths, len(item.tokens)]
        self._finals = []

    def expected_seconds(self) -> float:
        pipeline, speed = self.studio.pipeline, self.studio.speed
        if pipeline is None:
            return 0.0
        tokens = (self.total or pipeline.default_num_tokens) - self.step
        pictures = self.request.count - len(self._finals)
        return tokens * speed.token * self.request.count + pictures * speed.decode

    def dispose(self) -> None:
        shutil.rmtree(self.studio.scratch / self.id, ignore_errors=True)
        if self.studio.shared:
            for item in self.items:
                if item.name:
                    (self.studio.outputs(self.owner).folder / item.name).unlink(missing_ok=True)

    def view(self) -> dict[str, Any]:
        request = self.request
        return {
            "id": self.id,
            "state": self.state,
            "stopping": self.pending and self.cancel.is_set(),
            "prompt": request.prompt,
            "style": request.style or "",
            "step": self.step,
            "total": self.total,
            "note": self.studio.queue_note(self) if self.state == "queued" else "",
            "warning": self.warning,
            "error": self.error,
            "seconds": 0 if self.pending else round(self.seconds, 1),
            "items": [vars(item).copy() for item in self.items],
        }

    def _preview_fits(self, spent: float, elapsed: float) -> bool:
        speed = self.studio.speed
        whole = max(elapsed, self.request.count * speed.picture(self.total))
        earned = PREVIEW_BUDGET * whole * self.step / self.total
        return self.step < self.total and spent + speed.preview <= earned

    def _preview(self, pipeline: TextToImagePipeline, partial: Any) -> None:
        """Show the next picture as far as it is."""
        k = self._previews % len(self.items)
        self._previews += 1
        item = self.items[k]
        tokens, steps = partial.tokens[k : k + 1], pipeline.config.preview_steps
        item.source = self._show(pipeline.decode_tokens(tokens, [item.seed], steps)[0], item)
        self.touch()

    def _decode(self, pipeline: TextToImagePipeline, tokens: Any) -> None:
        """Tokens -> pictures -> files, one after the other; the rest in few steps once stopped."""
        outputs = self.studio.outputs(self.owner)
        failure = None
        for k, item in enumerate(self.items):
            stopped = self.cancel.is_set()
            steps = (
                pipeline.config.preview_steps
                if stopped
                else pipeline.tokenizer.config.num_inference_steps
            )
            start = time.perf_counter()
            (image,) = pipeline.decode_tokens(tokens[k : k + 1], [item.seed], steps)
            if not stopped:
                self.studio.speed.decode = time.perf_counter() - start
            self._finals.append(image)
            # First to a place that is sure: a full disk must not cost the picture on the page.
            item.source = self._show(image, item)
            try:
                path = outputs.save(image, self._record(pipeline, item, tokens[k], steps))
                item.name = f"{path.parent.name}/{path.name}"
                item.source = str(path)
            except OSError as error:
                failure = error
            self.touch()
        if failure is not None:
            raise failure

    def _record(
        self, pipeline: TextToImagePipeline, item: Item, tokens: Any, steps: int
    ) -> dict[str, Any]:
        """Each picture is recorded as a run of its own, which makes it again."""
        request, default = self.request, pipeline.config
        settings = {
            "num_tokens": len(item.tokens),
            "num_inference_steps": steps,
            "guidance_scale": _or(request.guidance_scale, default.guidance_scale),
            "temperature": _or(request.temperature, default.temperature),
            "top_k": default.top_k,
            "top_p": default.top_p,
            "style": request.style,
            "width": pipeline.image_size,
            "height": pipeline.image_size,
            "num_images_per_prompt": 1,
        }
        return make_record(
            type(pipeline).__name__,
            pipeline.name,
            request.prompt,
            item.seed,
            0,
            {key: value for key, value in settings.items() if value is not None},
            tokens,
            pipeline.name,
            sha256=self.studio.sha256,
            device=pipeline.device,
            dtype=pipeline.dtype,
        )

    def _show(self, image: Image.Image, item: Item) -> str:
        """Write a picture where only the page finds it."""
        folder = self.studio.scratch / self.id
        folder.mkdir(exist_ok=True)
        path = folder / f"{item.seed}-{time.monotonic_ns()}.webp"
        save_image(image, path)
        return str(path)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
