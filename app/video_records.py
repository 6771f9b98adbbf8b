"""From a call that made a clip to the record in its file, and back; stories as people write them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..modalities.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.frame_interpolation import FrameInterpolationPipeline
    from ..pipelines.video_generation import VideoGenerationPipeline, VideoPipelineOutput

# More tokens than this are too long for the record in a file.
MAX_RECORD_TOKENS = 10_000
# How a record writes the scenes of a story, and where the next begins.
_SCENE = re.compile(r"(?:^| \| )(\d+(?:\.\d+)?) s: ")


def clip_record(
    pipeline: VideoGenerationPipeline,
    output: VideoPipelineOutput,
    what: str,
    settings: dict[str, Any],
    sha256: str | None,
    begins_with: str | None = None,
    story: bool = False,
    stopped_at: int | None = None,
) -> dict[str, Any]:
    """The record of the one clip of a call.

    Args:
        what: the prompt or class as it was asked for, or a story of `told`.
        settings: of the pipeline's ``stream``, each with its value.
        begins_with: name of the file that it moves or goes on from.
        stopped_at: step after which it was stopped; then ``num_frames`` are those asked for.
    """
    from ..modalities.metadata import make_record

    kept = {key: value for key, value in settings.items() if value is not None}
    if stopped_at is None:
        kept["num_frames"] = output.frames.shape[2]
    else:
        kept["stopped_at"] = stopped_at
        kept.setdefault("num_frames", pipeline.default_num_frames)
    if pipeline.condition == "class":
        kept["class_label"] = pipeline.class_label(what)
        what = pipeline.class_name(kept["class_label"])
    if begins_with is not None:
        kept["begins_with"] = begins_with
    elif pipeline.config.get("first_frame") is not None and kept["num_frames"] > 1:
        kept["first_frame"] = pipeline.config.first_frame
        if pipeline.config.first_frame_style is not None:
            kept["first_frame_style"] = pipeline.config.first_frame_style
    if story:
        kept["story"] = 1
    return make_record(
        type(pipeline).__name__,
        pipeline.name,
        what,
        output.seeds[0],
        0,
        kept,
        one_round(output),
        pipeline.name,
        sha256=sha256,
        device=pipeline.device,
        dtype=pipeline.dtype,
    )


def smooth_record(
    pipeline: FrameInterpolationPipeline, settings: dict[str, Any], sha256: str | None
) -> dict[str, Any]:
    """The record of a clip with frames made in between.

    Args:
        settings: of the pipeline's ``convert``.
    """
    from ..modalities.metadata import make_record

    return make_record(
        type(pipeline).__name__,
        pipeline.name,
        "",
        0,
        settings={name: value for name, value in settings.items() if value is not None},
        sha256=sha256,
        device=pipeline.device,
        dtype=pipeline.dtype,
    )


def told(scenes: list[tuple[str, float]]) -> str:
    """A story as one line, as its record keeps it: ``"2 s: a seed falls | 3 s: it grows"``."""
    from ..modalities.metadata import MAX_TEXT_CHARACTERS

    text = " | ".join(f"{seconds:g} s: {prompt}" for prompt, seconds in scenes)
    if len(text) > MAX_TEXT_CHARACTERS:
        raise InputError(
            f"The story has {len(text):,} characters, the limit is {MAX_TEXT_CHARACTERS:,}: "
            "shorten it."
        )
    return text


def scenes_told(text: str) -> list[tuple[str, float]]:
    """Undoes `told`."""
    _, *parts = _SCENE.split(text)
    return list(zip(parts[1::2], map(float, parts[::2]), strict=True))


def story_scenes(text: str) -> list[tuple[str, float]]:
    """The scenes of a story of one line each, ``"2: a seed falls"``.

    Raises:
        InputError: no line, or one that is no scene.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError('A story needs a line for each scene, for example "2: a seed falls".')
    return [read_scene(line) for line in lines]


def read_scene(text: str) -> tuple[str, float]:
    """``"2: a seed falls"`` -> its prompt and seconds."""
    from ..modalities.text import clean_prompt

    start, _, prompt = text.partition(":")
    try:
        seconds = float(start.strip().removesuffix("s"))
    except ValueError as error:
        raise InputError(
            f'"{text[:60]}" is no scene: write how long it lasts and what happens, for example '
            '"2: a seed falls".'
        ) from error
    return clean_prompt(prompt), seconds


def one_round(output: VideoPipelineOutput) -> Tensor | None:
    """The tokens of a clip that was written in one round, if a record holds them."""
    return recordable(output.tokens[0][0].cpu()) if len(output.tokens) == 1 else None


def recordable(tokens: Tensor) -> Tensor | None:
    fits = not tokens.dtype.is_floating_point and len(tokens) <= MAX_RECORD_TOKENS
    return tokens if fits else None
