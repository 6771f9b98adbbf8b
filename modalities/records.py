"""The generation record of a file, whatever its medium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import audio, image, video


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record in a picture, sound or video file, chosen by its suffix; None where there is none.

    Raises:
        InputError: no such file, or it does not hold what its name says.
    """
    suffix = Path(path).suffix.lower()
    if suffix in audio.AUDIO_SUFFIXES:
        return audio.read_record(path)
    if suffix in video.VIDEO_SUFFIXES:
        return video.read_record(path)
    return image.read_record(path)
