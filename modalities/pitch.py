"""Pitches of sounds and of their captions, moved together: more keys from the same recordings."""

from __future__ import annotations

import re
from fractions import Fraction

from torch import Tensor

from .audio import resample

NOTES = ["C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B"]
# "a long C note", "a A flat major chord", "a scale in F sharp minor".
NAMED = re.compile(rf"\b({'|'.join(NOTES)})(?= (note|major|minor)\b)")


def transposed(audio: Tensor, semitones: int) -> Tensor:
    """Sound ``[..., T]``, higher by so many semitones (within 2 hundredths of one) and as much shorter,
    as a tape played faster; for negative ones lower and longer."""
    speed = Fraction(2 ** (semitones / 12)).limit_denominator(64)
    return resample(audio, 1000 * speed.numerator, 1000 * speed.denominator)


def transposed_caption(caption: str, semitones: int) -> str:
    """The caption with the notes and keys that it names moved; others, such as "E sharp", stay."""
    return NAMED.sub(lambda found: NOTES[(NOTES.index(found[1]) + semitones) % len(NOTES)], caption)


def named_note(caption: str) -> str | None:
    """The note that a caption asks for, of `NOTES`, whatever its octave; None for chords and keys."""
    return next((found[1] for found in NAMED.finditer(caption) if found[2] == "note"), None)
