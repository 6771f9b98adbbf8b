"""Frames between frames: twice, or any number of times as many, from file to file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..generators.linear_video.vfimamba import VFIMamba
from ..modalities.errors import InputError
from ..modalities.image import load_image, to_pil, to_tensor
from ..modalities.video import (
    ANIMATION_SUFFIXES,
    SAVE_SUFFIXES,
    Source,
    Video,
    VideoReader,
    check_memory,
    composite,
    load_video,
    save_video,
)
from ..weights.loading import find_files, licence_notice, load_folder, load_published
from ..weights.registry import find_model, import_class, list_models
from . import loading
from .video_generation import read_frames

TASK = "frame-interpolation"
_CLASSES = {"VFIMamba": "generators.linear_video.vfimamba:VFIMamba"}
# Frames of more pixels are refined in tiles of this side.
TILE, TILE_FROM = 512, 1280 * 720


@dataclass
class InterpolationOutput(BaseOutput):
    """A clip: frames float ``[3, T, H, W]`` in [-1, 1] for "pt", PIL for "pil"; its rate."""

    frames: list[Image.Image] | Tensor
    frame_rate: float


class FrameInterpolationPipeline(DiffusionPipeline):
    """Clips to clips of more frames.

    Example:
        >>> pipe = FrameInterpolationPipeline.from_pretrained("vfimamba-s")
        >>> pipe.convert("walk.mp4", "smooth.mp4", factor=2)

    Args:
        generator: the model.
    """

    def __init__(self, generator: VFIMamba):
        super().__init__()
        self.register_modules(generator=generator)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, files: str | Path | None = None, **options: Any
    ) -> FrameInterpolationPipeline:
        """Load a model by name.

        Args:
            name: a shipped or published model by its name or hub id ("vfimamba-s"), or a folder of
                ``save_pretrained``, of a pipeline or of the model alone.
            files: folder with the published files; default: the hub's cache, then a download.
            options: of diffusers' ``from_pretrained``.

        Raises:
            InputError: nothing of that name, another kind of model, or damaged files.
        """
        info, folder = find_model(str(name), TASK), Path(name)
        saved = folder.is_dir() and not (info is not None and info.shipped) and files is None
        if not saved and info is None and "/" not in str(name):
            raise InputError(
                f'There is no model "{name}" here that makes frames between frames: give a folder, a '
                f"hub id, or one of {', '.join(list_models(task=TASK))}."
            )
        if not saved and info is not None and info.task != TASK:
            raise InputError(
                f'"{info.name}" is a {info.task} model: it makes no frames in between.'
            )
        if saved and not (folder / "model_index.json").is_file():
            pipeline = cls(load_folder(folder, "generator", _CLASSES, options))
        elif not saved and info is not None and not info.shipped:
            notice = licence_notice(info)
            if notice is not None:
                warnings.warn(notice, stacklevel=2)
            pipeline = cls(load_published(info, find_files(info, files)))
        else:
            for path in _CLASSES.values():
                import_class(path)
            pipeline = loading.load_folder(cls, super().from_pretrained, name, **options)
        pipeline.name = str(name)
        return pipeline

    @torch.no_grad()
    def stream(
        self,
        frames: Iterable[Tensor],
        factor: int = 2,
        tile: int | None = None,
        **settings: Any,
    ) -> Iterator[Tensor]:
        """Yield the frames of the longer clip ``[3, H, W]`` in [-1, 1] as they are made.

        N frames become ``1 + factor (N - 1)``. Only two of them and what lies between are held.

        Args:
            frames: ``[3, H, W]`` each, all of one size; any size.
            factor: 2 or more.
            tile: side of the squares that large frames are refined in; 0: never; default 512 for
                frames of more than 1280 x 720 pixels.
            settings: ``flow_scale``, ``tta``, ``overlap`` of `VFIMamba.interpolate`.

        Raises:
            InputError: a factor below 2, fewer than two frames, or ones of several sizes.
        """

        frames = iter(frames)
        first = next(frames, None)
        if first is None:
            raise InputError("Interpolation needs a clip of two frames or more.")

        def checked() -> Iterator[Tensor]:
            for frame in chain([first], frames):
                if frame.ndim != 3 or frame.shape[0] != 3:
                    raise InputError(
                        f"Frames have the shape [3, height, width], got {list(frame.shape)}."
                    )
                if frame.shape != first.shape:
                    sizes = [f"{each.shape[2]}x{each.shape[1]}" for each in (first, frame)]
                    raise InputError(f"Frames must have one size, got {' and '.join(sizes)}.")
                yield frame[None].to(self.device, torch.float32)

        if tile is None and first[0].numel() > TILE_FROM:
            tile = TILE
        for frame in self.generator.stream(checked(), factor, tile=tile or None, **settings):
            yield frame[0].clamp(-1, 1).cpu()

    @torch.no_grad()
    def __call__(
        self,
        video: Video | Tensor | Source | Sequence[Image.Image],
        factor: int = 2,
        frame_rate: float | None = None,
        callback: Callable[[int, int], None] | None = None,
        output_type: str = "pil",
        **options: Any,
    ) -> InterpolationOutput:
        """Interpolate a clip that fits into memory; see `convert` for files.

        Args:
            video: a `Video`, frames ``[3, T, H, W]`` in [-1, 1], a file, or PIL pictures.
            factor, options: see `stream`.
            frame_rate: of the result; default: that of the clip times the factor (8 for a clip that
                has none).
            callback: ``(frames made, frames in all)``; what it raises ends the work.
            output_type: "pil" or "pt".

        Raises:
            InputError: see `stream`; or a result that would not fit into memory.
        """
        if output_type not in ("pil", "pt"):
            raise InputError(f'Unknown output_type "{output_type}": choose "pil" or "pt".')
        rate = None
        if isinstance(video, Tensor):
            frames = video
        else:
            if isinstance(video, str | Path | bytes):
                video = load_video(video)
            rate = video.frame_rate if isinstance(video, Video) else None
            frames = composite(read_frames(video))
        if frames.ndim != 4:
            raise InputError(
                f"A clip has the shape [3, frames, height, width], got {list(frames.shape)}."
            )
        total = 1 + factor * (frames.shape[1] - 1)
        check_memory((3, max(total, 1), *frames.shape[2:]))
        made = []
        for frame in self.stream(frames.unbind(1), factor, **options):
            made.append(frame if output_type == "pt" else to_pil(frame[None])[0])
            if callback is not None:
                callback(len(made), total)
        return InterpolationOutput(
            frames=torch.stack(made, dim=1) if output_type == "pt" else made,
            frame_rate=frame_rate or (rate or 8.0) * factor,
        )

    def convert(
        self,
        source: str | Path | Sequence[str | Path],
        out: str | Path,
        factor: int = 2,
        frame_rate: float | None = None,
        input_frame_rate: float | None = None,
        record: dict[str, Any] | None = None,
        overwrite: bool = True,
        callback: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> tuple[int, float]:
        """Interpolate a file (or pictures in their order) into another.

        An MP4 or WebM is read, made and written frame by frame: memory does not grow with the clip.
        Animated WebP, GIF and PNG hold their frames until they are written. Sound is left out.

        Args:
            source: a video or animation, or two pictures or more of one size.
            out: see `save_video`.
            factor, options: see `stream`.
            frame_rate: of the result; default: that of the source times the factor, which lasts as long.
            input_frame_rate: read the source at this rate; needed where its own is variable. Of
                pictures: 8.
            record: how the clip was made, see `metadata`.
            overwrite: replace a file that is there.
            callback: ``(frames made, frames in all)``; what it raises ends the work, and nothing is
                left behind.

        Returns:
            frames written, and their rate.

        Raises:
            InputError: no video in the source, one frame only, a variable rate, or what `stream` and
                `save_video` refuse.
        """
        suffix = Path(out).suffix.lower()
        if suffix not in SAVE_SUFFIXES:
            raise InputError(
                f'Could not write "{out}": its name must end in {", ".join(SAVE_SUFFIXES)}.'
            )
        if factor < 2:
            raise InputError(f"The factor must be 2 or more, got {factor}.")
        with ExitStack() as stack:
            if isinstance(source, str | Path):
                reader = stack.enter_context(VideoReader(source))
                indices, rate = even_frames(reader, input_frame_rate)
                pixels = reader.frames(indices)
                frames = (_tensor(frame) for frame in pixels)
                count, size = len(indices), (reader.height, reader.width)
            else:
                pictures = [load_image(each) for each in source]
                count, rate = len(pictures), input_frame_rate or 8.0
                if count < 2:
                    raise InputError("Give a clip, or two pictures or more.")
                frames = (to_tensor([picture])[0] for picture in pictures)
                size = pictures[0].height, pictures[0].width
            total = 1 + factor * (count - 1)
            if suffix in ANIMATION_SUFFIXES:
                check_memory((3, total, *size), name=f'"{out}"')
            rate = frame_rate or rate * factor
            if rate > 240:
                raise InputError(
                    f"The result would have {rate:g} frames a second, at most 240 can be written: "
                    "lower the factor, or name a rate."
                )

            def counted() -> Iterator[Tensor]:
                for number, frame in enumerate(self.stream(frames, factor, **options), start=1):
                    yield frame
                    if callback is not None:
                        callback(number, total)

            save_video(counted(), out, rate, record, overwrite=overwrite)
        return total, rate


def makes_frames_between(name: str | Path) -> bool:
    """Whether `FrameInterpolationPipeline` would load that model, without loading it."""
    info, folder = find_model(str(name), TASK), Path(name)
    if info is not None and (info.shipped or not folder.is_dir()):
        return info.task == TASK
    if loading.pipeline_class(name) == FrameInterpolationPipeline.__name__:
        return True
    try:
        config = json.loads((folder / "config.json").read_text("utf8"))
        return config.get("_class_name") in _CLASSES
    except (OSError, ValueError, AttributeError):
        return False


def even_frames(reader: VideoReader, frame_rate: float | None = None) -> tuple[np.ndarray, float]:
    """Indices of the frames of a file at an even rate, and the rate.

    Args:
        frame_rate: default: the file's own.

    Raises:
        InputError: one frame only, or a file whose own rate is variable.
    """
    if reader.num_frames < 2:
        raise InputError(
            f"Could not use {reader.name}: it has one frame, give a clip of at least two."
        )
    if frame_rate is None:
        spans = np.diff(reader.times)
        steps = spans * reader.frame_rate
        # Rounded time stamps (10 ms in a GIF) are even; so are equal neighbours shown as one frame.
        if np.mean(np.abs(steps - np.rint(steps)) > 0.25) > 0.1:
            slow, fast = 1 / spans.max(), 1 / spans[spans > 0].min()
            raise InputError(
                f"{reader.name} has a variable frame rate, {slow:.1f} to {fast:.1f} a second: say "
                f"at which even rate to read it, for example {1 / np.median(spans):.0f}."
            )
    return reader.plan(frame_rate=frame_rate)


def _tensor(pixels: np.ndarray) -> Tensor:
    """uint8 ``[H, W, 3]`` -> ``[3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1
