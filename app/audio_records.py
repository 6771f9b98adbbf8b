"""From a call that made sound to the record in its file, and back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..modalities.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.text_to_sound import TextToSoundPipeline
    from ..pipelines.text_to_speech import TextToSpeechPipeline

SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")
# Records hold no line ends; this stands for a blank line, which ends a sentence.
_PARAGRAPH = "\u2029"


def one_line(text: str) -> str:
    """A text as its record keeps it: paragraphs apart, all other white space as one space."""
    paragraphs = re.split(rf"\n\s*\n|{_PARAGRAPH}", text.replace("\r\n", "\n"))
    lines = [" ".join(printable(paragraph).split()) for paragraph in paragraphs]
    return _PARAGRAPH.join(line for line in lines if line)


def spoken_text(line: str) -> str:
    """Undoes `one_line`, as far as can be heard."""
    return line.replace(_PARAGRAPH, "\n\n")


def sampling_settings(
    pipeline: TextToSpeechPipeline | TextToSoundPipeline, given: dict[str, Any]
) -> dict[str, Any]:
    """Every setting of the token sampler with its value: the given one, else the model's."""
    return {
        name: getattr(pipeline.config, name) if given.get(name) is None else given[name]
        for name in SAMPLING
    }


def speech_record(
    pipeline: TextToSpeechPipeline,
    line: str,
    seed: int,
    settings: dict[str, Any],
    sha256: str | None,
) -> dict[str, Any]:
    """The record of a spoken text.

    Args:
        line: of `one_line`; of a text that is too long for a record only the beginning is kept,
            and the setting ``characters`` says how long it was.
        settings: of the pipeline's ``stream``, each with its value.
    """
    from ..modalities.metadata import MAX_TEXT_CHARACTERS, make_record

    kept = {key: value for key, value in settings.items() if value is not None}
    if len(line) > MAX_TEXT_CHARACTERS:
        kept["characters"] = len(line)
        line = line[: MAX_TEXT_CHARACTERS - 1] + "…"
    return make_record(
        type(pipeline).__name__,
        pipeline.name,
        line,
        seed,
        0,
        kept,
        tokenizer=pipeline.name,
        sha256=sha256,
        device=pipeline.device,
        dtype=pipeline.dtype,
    )


def sound_record(
    pipeline: TextToSoundPipeline,
    caption: str,
    seed: int,
    index: int,
    settings: dict[str, Any],
    count: int,
    tokens: Tensor,
    sha256: str | None,
) -> dict[str, Any]:
    """The record of one sound of a batch.

    Args:
        settings: of the pipeline's ``stream``, each with its value.
        count: sounds in the batch; their number decides how matrix products are rounded.
        tokens: of this sound, int64 ``[Q, T]``; the record has them frame by frame.
    """
    from ..modalities.metadata import make_record

    settings = {key: value for key, value in settings.items() if value is not None}
    return make_record(
        type(pipeline).__name__,
        pipeline.name,
        caption,
        seed,
        index,
        {**settings, "num_sounds_per_prompt": count},
        tokens.mT.flatten(),
        pipeline.name,
        sha256=sha256,
        device=pipeline.device,
        dtype=pipeline.dtype,
    )
