"""A picture in, a clip out that begins with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from ..generators.conditioning.clip import TextImageCLIP
from ..generators.conditioning.t5 import TextT5
from ..modalities.errors import InputError
from ..modalities.text import clean_prompt
from ..tokenizers.base import Tokenizer
from .text_to_video import TextToVideoPipeline, check_text_tower, text_condition
from .video_generation import (
    Start,
    VideoGenerationPipeline,
    VideoPartial,
    VideoPipelineOutput,
    condition_of,
    item_seeds,
)
from .video_writers import VideoGenerator, video_writer


class ImageToVideoPipeline(VideoGenerationPipeline):
    """Moves a picture: by a model that makes clips of texts, or by one that goes on from frames alone.

    Example:
        >>> pipe = ImageToVideoPipeline.from_pretrained("animated-sticker")
        >>> clip = pipe("fox.png", "a fox spinning", seed=7)

    Args:
        tokenizer, generator: the models.
        clip: the text tower; None for a generator that reads no text.
        num_frames: of a clip where the call names none; default: the tokenizer's.
        frame_rate: frames a second that the model was trained on.
    """

    condition = "frames"
    model_cpu_offload_seq = "clip->generator->tokenizer"
    _optional_components: ClassVar[list[str]] = ["clip"]

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: VideoGenerator,
        clip: TextImageCLIP | TextT5 | None = None,
        num_frames: int | None = None,
        frame_rate: float = 8.0,
    ):
        super().__init__()
        writer = video_writer(tokenizer, generator)
        if not writer.continues:
            raise InputError(
                f"This {type(generator).__name__} writes whole clips and cannot go on from a "
                "picture: choose another model."
            )
        if "frames" in writer.conditions:
            clip = None
        else:
            check_text_tower(generator, clip)
        self.register_modules(tokenizer=tokenizer, generator=generator, clip=clip)
        self.register_to_config(num_frames=num_frames, frame_rate=frame_rate)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, files: str | Path | None = None, **options: Any
    ) -> ImageToVideoPipeline:
        """See `VideoGenerationPipeline.from_pretrained`; models of `TextToVideoPipeline` load too."""
        if condition_of(name) != "text":
            return super().from_pretrained(name, files, **options)
        return cls.from_text_pipeline(TextToVideoPipeline.from_pretrained(name, files, **options))

    @classmethod
    def from_text_pipeline(cls, other: TextToVideoPipeline) -> ImageToVideoPipeline:
        """The same models, behind a picture.

        Raises:
            InputError: its generator cannot go on from a picture.
        """
        pipeline = cls(
            **other.components,
            num_frames=other.config.num_frames,
            frame_rate=other.config.frame_rate,
        )
        pipeline.name = other.name
        return pipeline

    @torch.no_grad()
    def stream(
        self,
        image: Start | Image.Image,
        prompt: str | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        *,
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        prime_frames: int = 5,
        max_frames: int | None = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> Iterator[VideoPartial]:
        """Yield a `VideoPartial` after each step of the generator; closing the iterator cancels.

        Args:
            image: a picture (file or PIL), or frames as the ``start`` of `TextToVideoPipeline.stream`.
                Its middle square, as the tokenizer keeps it, begins the clip; white is put behind
                transparency.
            prompt: what it does; a generator without text takes none.
            num_frames: of each clip, the picture included.
            num_videos_per_prompt: clips.
            frame_rate, seed, prime_frames, max_frames, output_type, settings: see
                `TextToVideoPipeline.stream`.

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        if num_videos_per_prompt < 1:
            raise InputError(f"Ask for at least 1 clip, got {num_videos_per_prompt}.")
        condition = {}
        if self.clip is not None:
            if prompt is None:
                raise InputError('Say what the picture does, for example "a fox spinning".')
            texts = [clean_prompt(prompt)] * num_videos_per_prompt
            condition = text_condition(self.generator, self.clip, texts)
        elif prompt is not None:
            raise InputError(
                f"{type(self.generator).__name__} reads no text: leave the prompt out."
            )
        run = self._prepare(
            [condition],
            None,
            num_frames,
            frame_rate,
            image,
            True,
            item_seeds(seed, num_videos_per_prompt),
            prime_frames,
            max_frames,
            output_type,
            settings,
        )
        yield from self._stream(run)

    @torch.no_grad()
    def __call__(
        self,
        image: Start | Image.Image,
        prompt: str | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        callback: Callable[[VideoPartial], bool | None] | None = None,
        **options: Any,
    ) -> VideoPipelineOutput:
        """Make clips.

        Args:
            image, prompt, num_frames, frame_rate, options: see `stream`.
            callback: is given a `VideoPartial` after each step; if it returns False the work ends
                with the frames that are there.

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        partials = self.stream(image, prompt, num_frames, frame_rate, **options)
        return self._collect(partials, callback)
