"""One door to every pipeline that makes pictures, and one to every that makes video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..modalities.errors import InputError
from ..weights.registry import find_model, generator_classes, import_class, resolve_model
from .class_to_image import ClassToImagePipeline
from .image_generation import ImageGenerationPipeline
from .image_to_video import ImageToVideoPipeline
from .text_to_image import TextToImagePipeline
from .text_to_video import ClassToVideoPipeline, TextToVideoPipeline
from .video_generation import VideoGenerationPipeline, condition_of

PIPELINES = {"text": TextToImagePipeline, "class": ClassToImagePipeline}
VIDEO_PIPELINES = {
    "text": TextToVideoPipeline,
    "class": ClassToVideoPipeline,
    "frames": ImageToVideoPipeline,
}


def load_image_pipeline(name: str | Path, **options: Any) -> ImageGenerationPipeline:
    """The pipeline of a model, whether it draws from a text or from a class.

    Args:
        name, options: see `ImageGenerationPipeline.from_pretrained`.

    Raises:
        InputError: nothing of that name, or a model that makes no pictures.
    """
    return PIPELINES[_condition(name)].from_pretrained(name, **options)


def load_video_pipeline(name: str | Path, **options: Any) -> VideoGenerationPipeline:
    """The pipeline of a model, whether it draws from a text, from a class or from frames.

    Args:
        name, options: see `VideoGenerationPipeline.from_pretrained`.

    Raises:
        InputError: nothing of that name, or a model that makes no video.
    """
    return VIDEO_PIPELINES[condition_of(name)].from_pretrained(name, **options)


def _condition(name: str | Path) -> str:
    """ "text" or "class": from the registry, or from the configuration in a folder or on the hub."""
    folder, info = Path(name), find_model(str(name), "-to-image")
    if info is not None and (info.shipped or not folder.is_dir()):
        if not info.task.endswith("-to-image"):
            raise InputError(
                f'"{info.name}" is a {info.task} model and makes no pictures from text or a class.'
            )
        return info.task.removesuffix("-to-image")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf8"))["_class_name"]
            return import_class(generator_classes()[found]).condition
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'"{name}" could not be loaded: it holds no model that makes pictures.'
            ) from error
    try:
        found = DiffusionPipeline.load_config(resolve_model(name))["_class_name"]
        return {kind.__name__: condition for condition, kind in PIPELINES.items()}[found]
    except InputError:
        raise
    except Exception as error:  # A damaged file, no network, or another library's pipeline.
        raise InputError(
            f'"{name}" could not be loaded: it holds no model that makes pictures.'
        ) from error
