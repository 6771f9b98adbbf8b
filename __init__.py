"""Tessera: token-based generation of pictures, video and sound.

Public names load on first use (PEP 562), so that ``import tessera`` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "TextToImagePipeline": ".pipelines.text_to_image",
    "ClassToImagePipeline": ".pipelines.class_to_image",
    "load_image_pipeline": ".pipelines.auto",
    "TextToSpeechPipeline": ".pipelines.text_to_speech",
    "TextToSoundPipeline": ".pipelines.text_to_sound",
    "TextToSongPipeline": ".pipelines.text_to_song",
    "TextToVideoPipeline": ".pipelines.text_to_video",
    "ClassToVideoPipeline": ".pipelines.text_to_video",
    "ImageToVideoPipeline": ".pipelines.image_to_video",
    "FrameInterpolationPipeline": ".pipelines.frame_interpolation",
    "load_video_pipeline": ".pipelines.auto",
    "ReconstructionPipeline": ".pipelines.reconstruction",
    "AutoGenerator": ".generators.auto",
    "AutoTokenizer": ".tokenizers.auto",
    "list_models": ".weights.registry",
    "model_info": ".weights.registry",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tessera' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
