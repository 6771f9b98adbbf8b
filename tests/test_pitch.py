"""Sounds and their captions in other keys."""

from __future__ import annotations

import pytest
import torch

from tessera.modalities.pitch import named_note, transposed, transposed_caption


@pytest.mark.parametrize("semitones", [-12, -4, -1, 0, 1, 3, 7])
def test_a_tone_is_moved_by_semitones(semitones):
    rate = 16_000
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate)
    moved = transposed(tone, semitones)
    assert len(moved) == pytest.approx(rate / 2 ** (semitones / 12), rel=0.002)
    spectrum = torch.fft.rfft(moved * torch.hann_window(len(moved)), n=16 * rate).abs()
    found = 12 * torch.log2(spectrum.argmax() / 16 / 440)
    assert float(found) == pytest.approx(semitones, abs=0.03)


@pytest.mark.parametrize(
    ("caption", "semitones", "wanted"),
    [
        ("flute playing a long B note", 1, "flute playing a long C note"),
        ("flute playing a A flat major chord", 2, "flute playing a B flat major chord"),
        (
            "oboe playing a slow melody in F sharp minor",
            -3,
            "oboe playing a slow melody in E flat minor",
        ),
        ("a kick drum, A take", 5, "a kick drum, A take"),
        ("harp playing a E sharp note", 4, "harp playing a E sharp note"),
        ("C note", 12, "C note"),
    ],
)
def test_notes_of_captions_move_with_them(caption, semitones, wanted):
    assert transposed_caption(caption, semitones) == wanted


@pytest.mark.parametrize(
    ("caption", "note"),
    [
        ("flute playing a long C sharp note", "C sharp"),
        ("a kalimba playing a B note", "B"),
        ("kalimba playing a E flat major chord", None),
        ("a note of thanks", None),
    ],
)
def test_notes_are_named(caption, note):
    assert named_note(caption) == note
