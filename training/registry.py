"""What recipes may name under ``task``."""

from __future__ import annotations

from .generator_tasks import GeneratorTask
from .tasks import (
    AutoencoderTask,
    CLIPTask,
    FlexARTask,
    FlexTokDecoderTask,
    FlexTokTask,
    Task,
    TiTokTask,
)

TASKS: dict[str, type[Task]] = {
    "autoencoder": AutoencoderTask,
    "flextok": FlexTokTask,
    "flextok_decoder": FlexTokDecoderTask,
    "titok": TiTokTask,
    "clip": CLIPTask,
    "flexar": FlexARTask,
    "generator": GeneratorTask,
}
