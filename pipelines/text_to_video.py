"""A sentence, a story or a class in, moving pictures out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..generators.autoregressive.larp_ar import LARPGenerator
from ..generators.conditioning.clip import TextImageCLIP
from ..generators.conditioning.t5 import TextT5
from ..generators.conditioning.text import text_prefix
from ..generators.next_block.nbp import NBP, ucf_text
from ..modalities.errors import InputError
from ..modalities.text import clean_prompt
from ..modalities.video_datasets import MOTIONS
from ..tokenizers.base import Tokenizer
from ..weights.registry import PUBLISHED
from .class_names import find_class
from .seeds import seed_generators
from .text_to_image import TextToImagePipeline
from .video_generation import (
    Run,
    Start,
    VideoGenerationPipeline,
    VideoPartial,
    VideoPipelineOutput,
    item_seeds,
)
from .video_writers import VideoGenerator

Story = Sequence[tuple[str, float]]


def check_text_tower(generator: VideoGenerator, clip: TextImageCLIP | TextT5 | None) -> None:
    """Raise InputError unless the tower reads texts as the generator wants them."""
    name = type(generator).__name__
    if clip is None:
        raise InputError(f"{name} reads texts: pass its text tower, clip=.")
    if clip.text_dim != generator.config.text_dim:
        raise InputError(
            f"{name} reads text features of width {generator.config.text_dim}, the text tower makes "
            f"{clip.text_dim}: they do not fit."
        )


def text_condition(
    generator: VideoGenerator, clip: TextImageCLIP | TextT5, texts: Sequence[str]
) -> dict[str, Tensor]:
    """Arguments of the generator's ``stream``."""
    if isinstance(generator, NBP):
        return {"condition": text_prefix(clip, texts, generator.config.text_length)}
    features, mask = clip.text_features(texts)
    return {"text_features": features, "text_mask": mask}


class TextToVideoPipeline(VideoGenerationPipeline):
    """Text to clips, by next-block prediction, Phenaki or LinGen.

    Example:
        >>> pipe = TextToVideoPipeline.from_pretrained("animated-sticker")
        >>> clip = pipe("a butterfly flapping", seed=7, output_type="pt")
        >>> save_video(clip.frames[0], "butterfly.webp", clip.frame_rate)

    Args:
        tokenizer, generator: the models.
        clip: the text tower that the generator was trained with, a CLIP or a T5.
        num_frames: of a clip where the call names none; default: the tokenizer's.
        frame_rate: frames a second that the model was trained on.
        first_frame: name or folder of a text-to-image model that draws the first frame of a clip, which
            the generator then moves; None: the generator draws it too.
        first_frame_style: one of that model's ``styles``.
    """

    condition = "text"
    model_cpu_offload_seq = "clip->generator->tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: VideoGenerator,
        clip: TextImageCLIP | TextT5,
        num_frames: int | None = None,
        frame_rate: float = 8.0,
        first_frame: str | None = None,
        first_frame_style: str | None = None,
    ):
        super().__init__()
        self.set_up(tokenizer, generator)
        check_text_tower(generator, clip)
        if first_frame is not None and not self.writer.continues:
            raise InputError(
                f"{type(generator).__name__} writes whole clips and cannot go on from a picture: "
                "leave first_frame out."
            )
        self.register_modules(clip=clip)
        self.register_to_config(
            num_frames=num_frames,
            frame_rate=frame_rate,
            first_frame=first_frame,
            first_frame_style=first_frame_style,
        )

    @cached_property
    def painter(self) -> TextToImagePipeline:
        """The model ``first_frame``."""
        return TextToImagePipeline.from_pretrained(self.config.first_frame, dtype=self.dtype)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        *,
        story: Story | None = None,
        start: Start | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        prime_frames: int = 5,
        max_frames: int | None = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> Iterator[VideoPartial]:
        """Yield a `VideoPartial` after each step of the models; closing the iterator cancels.

        Args:
            prompt: one or several, in place of a story.
            num_frames: of each clip. What is longer than the model's window is written in rounds,
                each going on from the last frames of the one before.
            frame_rate: frames a second that the clip is meant for; default the model's.
            story: (prompt, seconds) of each scene; a scene ends at the step nearest to its time.
            start: frames to go on from: a file, a `Video`, PIL pictures or a tensor ``[3, T, H, W]``
                in [-1, 1]. They are no part of the result.
            num_videos_per_prompt: clips of each prompt, or of the story.
            seed: of the first clip; the next ones count up. Default: random.
            prime_frames: that a round goes on from, at most.
            max_frames: most frames in all; default 1024 on a CPU, on a GPU what fits into 4 GB.
            output_type: "pil", "np" or "pt".
            settings: of the generator, see `settings`; None is the model's own.

        Raises:
            InputError: an argument out of range, one that this model does not take, or more frames
                than this machine should be asked for.
        """
        texts, seconds = scenes_of(prompt, story)
        if num_videos_per_prompt < 1:
            raise InputError(f"Ask for at least 1 clip a prompt, got {num_videos_per_prompt}.")
        texts = [[text for text in scene for _ in range(num_videos_per_prompt)] for scene in texts]
        count = len(texts[0])
        painted = self.config.first_frame is not None and start is None and num_frames != 1
        if painted:  # Everything is checked before the picture is there.
            start = torch.zeros(count, 3, 1, self.image_size, self.image_size)
        run = self._prepare(
            [text_condition(self.generator, self.clip, scene) for scene in texts],
            seconds,
            num_frames,
            frame_rate,
            start,
            painted,
            item_seeds(seed, count),
            prime_frames,
            max_frames,
            output_type,
            settings,
        )
        steps_before = 0
        if painted:
            for partial in self._paint(texts[0], run):
                steps_before = partial.step
                yield partial
        yield from self._stream(run, steps_before)

    def _paint(self, texts: Sequence[str], run: Run) -> Iterator[VideoPartial]:
        """Draw the first frames and put them into the run."""
        total, frames = self._num_steps(run), run.start[:, :, :0].cpu()
        streams = [seed_generators(seed, 1)[0] for seed in run.seeds]
        painter = self.painter.to(self.device)
        stills = [still_prompt(text, painter.clip.count_tokens) for text in texts]
        style = self.config.first_frame_style
        for partial in painter.stream(stills, style=style, generator=streams, output_type="pt"):
            if partial.images is not None:
                run.start = self._start(partial.images[:, :, None], len(texts))
                frames = run.start.float().cpu()

            def shown(frames: Tensor = frames) -> Tensor:
                return frames

            def finish(frames: Tensor = frames) -> VideoPipelineOutput:
                return self._output(frames, [], run)

            yield VideoPartial(partial.step, partial.total + total, 0, shown, finish)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        callback: Callable[[VideoPartial], bool | None] | None = None,
        **options: Any,
    ) -> VideoPipelineOutput:
        """Make clips.

        Args:
            prompt, num_frames, frame_rate, options: see `stream`.
            callback: is given a `VideoPartial` after each step; if it returns False the work ends
                with the frames that are there.

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        return self._collect(self.stream(prompt, num_frames, frame_rate, **options), callback)


def scenes_of(
    prompt: str | Sequence[str] | None, story: Story | None
) -> tuple[list[list[str]], list[float] | None]:
    """The texts of each scene, one a clip, and the seconds of each scene of a story.

    Raises:
        InputError: neither or both, nothing visible, or a story that is no list of pairs.
    """
    if (prompt is None) == (story is None):
        raise InputError('Give either a prompt, for example "a butterfly flapping", or a story.')
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            raise InputError("The list of prompts is empty: give at least one.")
        return [[clean_prompt(text) for text in texts]], None
    try:
        pairs = [(str(text), float(seconds)) for text, seconds in story]
    except (TypeError, ValueError) as error:
        raise InputError(
            'A story is a list like [("a seed falls", 2), ("it grows", 3)].'
        ) from error
    if not pairs:
        raise InputError("A story needs at least one scene.")
    return [[clean_prompt(text)] for text, _ in pairs], [seconds for _, seconds in pairs]


def still_prompt(prompt: str, count_tokens: Callable[[str], int]) -> str:
    """What a picture of a clip shows: "rocket rising up" -> "rocket".

    Left out are the motions of `video_datasets` at either end, and all that follows a word in -ing that
    the picture's text tower has no entry for ("a butterfly flapping", not "cloud with lightning"):
    in its pictures nothing does that.

    Args:
        count_tokens: of a text in that tower, start and end included.
    """
    motions = "|".join(sorted(MOTIONS, key=len, reverse=True))
    text = re.sub(rf"^raining | (?:{motions})$|, animated$", "", prompt, flags=re.IGNORECASE)
    words = text.split()
    for place, word in enumerate(words):
        if place and word.lower().endswith("ing") and count_tokens(word) > 3:
            return " ".join(words[:place])
    return text or prompt


class ClassToVideoPipeline(VideoGenerationPipeline):
    """Classes to clips, by LARP's generator or by next-block prediction.

    Example:
        >>> pipe = ClassToVideoPipeline.from_pretrained("larp-l-long-ar")
        >>> clip = pipe("horse riding", seed=7)

    Args:
        tokenizer, generator: the models.
        class_names: name of each class; default those of UCF-101, if there are 101 classes.
        frame_rate: frames a second of the clips.
    """

    condition = "class"
    model_cpu_offload_seq = "generator->tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: NBP | LARPGenerator,
        class_names: Sequence[str] | None = None,
        frame_rate: float = 8.0,
    ):
        super().__init__()
        self.set_up(tokenizer, generator)
        self.register_to_config(
            class_names=None if class_names is None else list(class_names), frame_rate=frame_rate
        )

    @cached_property
    def _ucf(self) -> dict[str, list]:
        """The 101 classes of UCF-101 in the order of their labels: "ApplyEyeMakeup" -> its text."""
        path = PUBLISHED / "nbp_ucf_text_ids.json"
        return json.loads(path.read_text(encoding="utf8"))["classes"]

    @property
    def num_classes(self) -> int:
        if isinstance(self.generator, NBP):
            return len(self._ucf)
        return self.generator.config.num_classes

    @cached_property
    def class_names(self) -> list[str]:
        """Name of each class; empty where they have none."""
        if self.config.class_names is not None:
            return list(self.config.class_names)
        if self.num_classes != len(self._ucf):
            return []
        return [text for text, _ in self._ucf.values()]

    def class_label(self, condition: int | str) -> int:
        """The number of a class by its number, its name, or a part of the name that no other has.

        Raises:
            InputError: no such class, or several.
        """
        return find_class(condition, self.num_classes, self.class_names)

    def class_name(self, label: int) -> str:
        """What a class is called; "class 7" where it has no name."""
        return self.class_names[label] if self.class_names else f"class {label}"

    @torch.no_grad()
    def stream(
        self,
        class_labels: int | str | Sequence[int | str],
        num_frames: int | None = None,
        frame_rate: float | None = None,
        *,
        start: Start | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        prime_frames: int = 5,
        max_frames: int | None = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> Iterator[VideoPartial]:
        """Yield a `VideoPartial` after each step of the generator; closing the iterator cancels.

        Args:
            class_labels: one or several classes, each a number or a name ("horse riding").
            num_frames, frame_rate, start, seed, prime_frames, max_frames, output_type, settings: see
                `TextToVideoPipeline.stream`. LARP's generator of classes makes clips of one length and
                goes on from no frames.
            num_videos_per_prompt: clips of each class.

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        one = isinstance(class_labels, int | str)
        given = [class_labels] if one else list(class_labels)
        if not given or num_videos_per_prompt < 1:
            raise InputError(
                f"Ask for at least 1 clip of at least 1 class, got {num_videos_per_prompt} of "
                f"{len(given)}."
            )
        labels = [self.class_label(c) for c in given for _ in range(num_videos_per_prompt)]
        if isinstance(self.generator, NBP):
            names = list(self._ucf)
            condition = ucf_text([names[label] for label in labels])
        else:
            condition = torch.tensor(labels)
        run = self._prepare(
            [{"condition": condition.to(self.device)}],
            None,
            num_frames,
            frame_rate,
            start,
            False,
            item_seeds(seed, len(labels)),
            prime_frames,
            max_frames,
            output_type,
            settings,
        )
        yield from self._stream(run)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_frames: int | None = None,
        frame_rate: float | None = None,
        callback: Callable[[VideoPartial], bool | None] | None = None,
        **options: Any,
    ) -> VideoPipelineOutput:
        """Make clips.

        Args:
            class_labels, num_frames, frame_rate, options: see `stream`.
            callback: is given a `VideoPartial` after each step; if it returns False the work ends
                with the frames that are there.

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        partials = self.stream(class_labels, num_frames, frame_rate, **options)
        return self._collect(partials, callback)
