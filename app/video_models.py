"""The models of video that are on this computer, each loaded when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..modalities.errors import InputError
from ..weights.registry import VIDEO_TASKS, list_models, model_info

if TYPE_CHECKING:
    from ..pipelines.frame_interpolation import FrameInterpolationPipeline
    from ..pipelines.video_generation import VideoGenerationPipeline

# The task of models that make frames between frames.
BETWEEN = "frame-interpolation"


class VideoModels:
    """
    Args:
        clips: folders of models that make clips, beside those of the registry.
        between: the same of models that make frames between frames.
    """

    def __init__(self, clips: Sequence[str | Path] = (), between: Sequence[str | Path] = ()):
        self._clips, self._between = _by_name(clips), _by_name(between)
        self._loaded: dict[str, VideoGenerationPipeline] = {}
        self._loaded_between: dict[str, FrameInterpolationPipeline] = {}
        self._loading = threading.Lock()

    def clip_names(self) -> list[str]:
        """Models that make clips without a download: those given, then those that ship."""
        found = [name for task in VIDEO_TASKS for name in list_models(task=task)]
        return [*self._clips, *(name for name in found if _here(name, self._clips))]

    def between_names(self) -> list[str]:
        """The same of those that make frames between frames."""
        found = list_models(task=BETWEEN)
        return [*self._between, *(name for name in found if _here(name, self._between))]

    def clips(self, name: str, moving_picture: bool = False) -> VideoGenerationPipeline:
        """One of `clip_names`; the last one used is kept.

        Args:
            moving_picture: as a pipeline that begins with a picture.

        Raises:
            InputError: another name, it could not be loaded, or it cannot begin with a picture.
        """
        from ..pipelines.image_to_video import ImageToVideoPipeline
        from .commands_video import load_video

        self._check(name, self.clip_names())
        with self._loading:
            if name not in self._loaded:
                self._loaded.clear()
                self._loaded[name] = load_video(self._clips.get(name, name))
            pipeline = self._loaded[name]
        if not moving_picture or pipeline.condition == "frames":
            return pipeline
        if pipeline.condition == "class":
            raise InputError(f'"{name}" draws classes and moves no pictures: choose another model.')
        return ImageToVideoPipeline.from_text_pipeline(pipeline)

    def condition(self, name: str) -> str:
        """What one of `clip_names` draws from, "text", "class" or "frames", without loading it."""
        from ..pipelines.video_generation import condition_of

        self._check(name, self.clip_names())
        return condition_of(self._clips.get(name, name))

    def between(self, name: str) -> FrameInterpolationPipeline:
        """One of `between_names`; the last one used is kept.

        Raises:
            InputError: another name, or it could not be loaded.
        """
        from .commands_video import load_interpolation

        self._check(name, self.between_names())
        with self._loading:
            if name not in self._loaded_between:
                self._loaded_between.clear()
                self._loaded_between[name] = load_interpolation(self._between.get(name, name))
            return self._loaded_between[name]

    def _check(self, name: str, names: list[str]) -> None:
        if name not in names:
            raise InputError(f'"{name[:80]}" is not on this computer: see the Models tab.')


def _by_name(folders: Sequence[str | Path]) -> dict[str, str]:
    return {Path(folder).name: str(folder) for folder in folders}


def _here(name: str, given: dict[str, str]) -> bool:
    """Whether all of a registered model is on this computer, under a name of its own."""
    from .studio import availability

    info = model_info(name)
    parts = [info] if info.tokenizer is None else [info, model_info(info.tokenizer)]
    return name not in given and all(availability(part) != "needs download" for part in parts)
