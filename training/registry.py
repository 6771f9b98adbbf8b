"""What recipes may name under ``task``."""

from __future__ import annotations

from .audio_tasks import CodecTask, SoundTask, SpectrumCodecTask, SpeechTask
from .generator_tasks import GeneratorTask
from .sound_tasks import ARDiTTask, SaShiMiTask
from .tasks import (
    AutoencoderTask,
    CLIPTask,
    FlexARTask,
    FlexTokDecoderTask,
    FlexTokTask,
    Task,
    TiTokTask,
)
from .video_tasks import InterpolationTask, LinGenTask, NBPTask, VideoTokenizerTask

TASKS: dict[str, type[Task]] = {
    "autoencoder": AutoencoderTask,
    "flextok": FlexTokTask,
    "flextok_decoder": FlexTokDecoderTask,
    "titok": TiTokTask,
    "clip": CLIPTask,
    "flexar": FlexARTask,
    "generator": GeneratorTask,
    "codec": CodecTask,
    "spectrum-codec": SpectrumCodecTask,
    "speech": SpeechTask,
    "sound": SoundTask,
    "sashimi": SaShiMiTask,
    "ardit": ARDiTTask,
    "video-tokenizer": VideoTokenizerTask,
    "nbp": NBPTask,
    "lingen": LinGenTask,
    "interpolation": InterpolationTask,
}
