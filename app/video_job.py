"""A prompt, a story or a picture becomes clips; a clip becomes smoother."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modalities.errors import InputError
from ..modalities.image import image_grid, save_image
from ..modalities.records import read_record
from ..modalities.video import Video, VideoReader, count_pictures, save_video
from ..pipelines.seeds import MAX_SEED
from .commands_image import weights_sha256
from .commands_video import stream
from .jobs import StudioJob
from .studio import Studio
from .video_records import clip_record, smooth_record, told

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..pipelines.frame_interpolation import FrameInterpolationPipeline
    from ..pipelines.video_generation import VideoGenerationPipeline, VideoPartial

# Formats beside the saved animated WebP that a page can download.
MORE_FORMATS = ("gif", "png", "mp4", "webm")
# Share of a run that previews of unfinished frames may take.
PREVIEW_BUDGET = 0.15
# A column of pictures: WebP is at most 16,383 pixels high.
SHEET_FRAMES, SHEET_PIXELS = 64, 16_000
END_FRAMES = 16
# Lossless WebP of a larger clip takes minutes.
MAX_WEBP_PIXELS = 20_000_000


@dataclass(frozen=True)
class ClipRequest:
    """What to make; None leaves the choice to the model.

    Attributes:
        model: one of `VideoModels.clip_names`.
        prompt: cleaned; None for a story, or where a picture alone is moved.
        scenes: (prompt, seconds) of a story.
        count: clips, of the seeds ``seed``, ``seed + 1``, ...
        image: a picture that the clips begin with.
        go_on: a clip whose last frames they go on from.
    """

    model: str
    seed: int
    prompt: str | None = None
    scenes: tuple[tuple[str, float], ...] | None = None
    count: int = 1
    seconds: float | None = None
    frame_rate: float | None = None
    guidance_scale: float | None = None
    image: Path | None = None
    go_on: Path | None = None


@dataclass
class Clip:
    """One clip in the making.

    Attributes:
        frames: that are there.
        sheets: files with frames below each other, and how many.
        name: of the saved WebP in the outputs folder, empty while there is none.
        files: format -> file.
    """

    seed: int
    frames: int = 0
    sheets: list[tuple[str, int]] = field(default_factory=list)
    name: str = ""
    files: dict[str, str] = field(default_factory=dict)


class ClipJob(StudioJob):
    """Clips of a prompt, or of a story, one after the other."""

    def __init__(self, studio: Studio, owner: str, request: ClipRequest):
        super().__init__(studio, owner)
        self.request = request
        self.kind = "clip" if request.scenes is None else "story"
        self.items = [Clip((request.seed + i) % (MAX_SEED + 1)) for i in range(request.count)]
        self.step, self.total, self.scene = 0, 0, 0
        self.rate = request.frame_rate or 0.0
        names = studio.videos.clip_names()
        self.model = request.model if len(names) > 1 else ""
        self.can_smooth = bool(studio.videos.between_names())
        self._sheets = 0
        self._shown: Tensor | None = None
        self._finals: list[tuple[Clip, Tensor, dict[str, Any] | None]] = []

    def run(self) -> None:
        request = self.request
        pipeline = self.studio.videos.clips(request.model, request.image is not None)
        self.rate = request.frame_rate or pipeline.config.frame_rate
        settings = {**pipeline.settings, "num_frames": None, "frame_rate": self.rate}
        if request.seconds is not None:
            settings["num_frames"] = max(1, round(request.seconds * self.rate))
        if request.guidance_scale is not None:
            settings["guidance_scale"] = request.guidance_scale
        for number, clip in enumerate(self.items):
            if self.cancel.is_set():
                return
            self._make(pipeline, clip, number, settings)

    def _make(
        self,
        pipeline: VideoGenerationPipeline,
        clip: Clip,
        number: int,
        settings: dict[str, Any],
    ) -> None:
        request, self._shown = self.request, None
        scenes = None if request.scenes is None else list(request.scenes)
        go_on = None if request.go_on is None else _end(request.go_on)
        in_order = pipeline.writer.in_order
        begin, previewing = time.perf_counter(), 0.0
        for partial in stream(
            pipeline, request.prompt, scenes, request.image, go_on, clip.seed, settings
        ):
            self.step = number * partial.total + partial.step
            self.total, self.scene = len(self.items) * partial.total, partial.scene
            if self.cancel.is_set():
                break
            start = time.perf_counter()
            # Finished frames are decoded once, and soon seen; others only while time is left.
            if in_order or previewing <= PREVIEW_BUDGET * (start - begin):
                self._show(clip, partial.frames())
                previewing += time.perf_counter() - start
            self.touch()
        self._finish(pipeline, clip, partial, settings)

    def _finish(
        self,
        pipeline: VideoGenerationPipeline,
        clip: Clip,
        partial: VideoPartial,
        settings: dict[str, Any],
    ) -> None:
        """Show and save a clip; of a stopped one the frames that are finished."""
        if partial.output is None and not pipeline.writer.in_order:
            return
        output = partial.output or partial.finish()
        frames = output.frames
        if partial.output is None and frames.shape[2] < 2:
            return
        self._shown, clip.sheets = None, []
        self._show(clip, frames)
        request, outputs = self.request, self.studio.outputs(self.owner)
        what = told(list(request.scenes)) if request.scenes else request.prompt or ""
        begins_with = request.image or request.go_on
        record = clip_record(
            pipeline,
            output,
            what,
            settings,
            weights_sha256(pipeline.name),
            None if begins_with is None else begins_with.name,
            request.scenes is not None,
            None if partial.output is not None else partial.step,
        )
        kept = record if outputs.metadata else None
        title = what or (begins_with or Path()).stem
        path = outputs.new_path(title, clip.seed, ".webp")
        save_video(frames[0], path, output.frame_rate, kept)
        clip.files = {"webp": str(path)}
        clip.name = f"{path.parent.name}/{path.name}"
        self._finals.append((clip, frames[0], kept))
        self.touch()

    def _show(self, clip: Clip, frames: Tensor) -> None:
        """Write the frames ``[1, 3, n, S, S]`` that are new or have changed where the page finds
        them."""
        from ..modalities.image import to_pil

        if not frames.numel():
            return
        frames = frames[0]
        same = 0
        if self._shown is not None:
            both = min(frames.shape[1], self._shown.shape[1])
            equal = (frames[:, :both] == self._shown[:, :both]).flatten(2).all(2).all(0)
            same = int(equal.long().cumprod(0).sum())
        sheets, kept = [], 0
        for sheet in clip.sheets:
            if kept + sheet[1] > same:
                break
            sheets.append(sheet)
            kept += sheet[1]
        most = max(1, min(SHEET_FRAMES, SHEET_PIXELS // frames.shape[2]))
        for first in range(kept, frames.shape[1], most):
            pictures = to_pil(frames[:, first : first + most].transpose(0, 1))
            self._sheets += 1
            path = self.scratch / f"sheet-{self._sheets}.webp"
            save_image(image_grid(pictures, columns=1, padding=0), path)
            sheets.append((str(path), len(pictures)))
        self._shown, clip.sheets, clip.frames = frames, sheets, frames.shape[1]

    def afterwards(self) -> Iterator[None]:
        """The other formats for downloads."""
        for clip, frames, record in self._finals:
            stem = Path(clip.files["webp"]).stem
            for suffix in MORE_FORMATS:
                path = self.scratch / f"{stem}.{suffix}"
                if suffix in ("gif", "png") and self.rate > 100:  # Faster than animations are.
                    continue
                _save(frames, path, self.rate, record)
                clip.files = {**clip.files, suffix: str(path)}
                yield
        self._finals = []

    def saved(self) -> list[str]:
        return [clip.name for clip in self.items if clip.name]

    def view(self) -> dict[str, Any]:
        request = self.request
        begins_with = request.image or request.go_on
        return {
            **super().view(),
            "title": request.prompt or ("" if begins_with is None else begins_with.name),
            "model": self.model,
            "can_smooth": self.can_smooth,
            "begins_with": "" if begins_with is None else begins_with.name,
            "scenes": list(request.scenes or ()),
            "scene": self.scene,
            "step": self.step,
            "total": self.total,
            "rate": self.rate,
            "items": [vars(item).copy() for item in self.items],
        }


@dataclass
class Side:
    """The clip before or after.

    Attributes:
        source: a file that a browser can play, empty while there is none.
    """

    frames: int
    rate: float
    source: str = ""


class _Stopped(Exception):
    """Ends the work of a job."""


class SmoothJob(StudioJob):
    """
    Args:
        path: the clip, checked.
        name: what people call it.
        indices, rate: its frames at an even rate, of `even_frames`.
        model: one of `VideoModels.between_names`.
        factor: times as many frames.
        frame_rate: of the result; None is so that it lasts as long.
        input_rate: at which the clip is read, where it is not its own.
    """

    kind = "smooth"

    def __init__(
        self,
        studio: Studio,
        owner: str,
        path: Path,
        name: str,
        indices: np.ndarray,
        rate: float,
        model: str,
        factor: int,
        frame_rate: float | None = None,
        input_rate: float | None = None,
    ):
        super().__init__(studio, owner)
        self.path, self.name, self.model = path, name, model
        self.indices, self.factor = indices, factor
        self.frame_rate, self.input_rate = frame_rate, input_rate
        self.done, self.total = 0, 1 + factor * (len(indices) - 1)
        self.before = Side(len(indices), rate)
        self.after = Side(self.total, frame_rate or rate * factor)
        self.output = ""
        self.files: dict[str, str] = {}

    def run(self) -> None:
        pipeline = self.studio.videos.between(self.model)
        try:
            self._run(pipeline)
        except _Stopped:
            return
        except InputError as error:  # The name on the server's disk is the uploaded one.
            raise InputError(str(error).replace(f"{self.path.parent}/", "")) from error

    def _run(self, pipeline: FrameInterpolationPipeline) -> None:
        moving_picture = count_pictures(self.path) > 1
        if moving_picture:
            self.before.source = str(self.path)
        else:  # In a form that every browser plays.
            self.before.source = str(self.scratch / "before.mp4")
            _copy(self.path, Path(self.before.source), self.indices, self.before.rate, self._check)
        self.touch()
        outputs = self.studio.outputs(self.owner)
        settings = {
            "factor": self.factor,
            "frame_rate": self.frame_rate,
            "input_frame_rate": self.input_rate,
        }
        record = smooth_record(pipeline, settings, weights_sha256(pipeline.name))
        suffix = ".webp" if moving_picture and self.after.rate <= 100 else ".mp4"
        path = outputs.new_path(f"{Path(self.name).stem} smooth", self.factor, suffix)

        def count(done: int, total: int) -> None:
            self._check()
            self.done, self.total = done, total
            self.touch()

        with warnings.catch_warnings(action="ignore", category=UserWarning):  # Of odd sizes.
            pipeline.convert(
                self.path,
                path,
                record=record if outputs.metadata else None,
                callback=count,
                **settings,
            )
        self.files, self.output = {suffix[1:]: str(path)}, f"{path.parent.name}/{path.name}"
        self.after.source = str(path)
        self.touch()

    def afterwards(self) -> Iterator[None]:
        """The other format for downloads."""
        if not self.output:
            return
        source = Path(self.after.source)
        suffix = ".mp4" if source.suffix == ".webp" else ".webp"
        with VideoReader(source) as reader:
            pixels = reader.num_frames * reader.width * reader.height
        if suffix == ".webp" and (pixels > MAX_WEBP_PIXELS or self.after.rate > 100):
            return
        path = self.scratch / f"{source.stem}{suffix}"
        _copy(source, path, range(self.total), self.after.rate, record=read_record(source))
        self.files = {**self.files, suffix[1:]: str(path)}
        yield

    def saved(self) -> list[str]:
        return [self.output] if self.output else []

    def view(self) -> dict[str, Any]:
        return {
            **super().view(),
            "title": self.name,
            "factor": self.factor,
            "done": self.done,
            "total": self.total,
            "before": vars(self.before).copy(),
            "after": vars(self.after).copy(),
            "files": dict(self.files),
        }

    def _check(self) -> None:
        if self.cancel.is_set():
            raise _Stopped


def _end(path: Path) -> Video:
    """The last frames of a clip, more than any round goes on from."""
    with VideoReader(path) as reader:
        indices, rate = reader.plan()
        return Video(reader.read(indices[-END_FRAMES:]), rate)


def _copy(
    source: Path,
    path: Path,
    indices: Any,
    rate: float,
    check: Any = lambda: None,
    record: dict[str, Any] | None = None,
) -> None:
    """Write frames of a clip into another file; ``check`` is called before each, to raise."""
    import torch

    with VideoReader(source) as reader:

        def frames() -> Iterator[Tensor]:
            for pixels in reader.frames(indices):
                check()
                yield torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1

        _save(frames(), path, rate, record)


def _save(frames: Any, path: Path, rate: float, record: dict[str, Any] | None) -> None:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # Of odd sizes in H.264.
        save_video(frames, path, rate, record)
