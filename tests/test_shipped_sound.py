"""The shipped sounds: the same sound for the same seed, heard as what was asked for, well formed."""

from __future__ import annotations

import pytest
import torch

from tessera.evaluation.sound import strongest_note
from tessera.modalities.audio import log_mel
from tessera.pipelines.seeds import seed_generators
from tessera.pipelines.text_to_sound import TextToSoundPipeline


@pytest.fixture(scope="module")
def pipe() -> TextToSoundPipeline:
    return TextToSoundPipeline.from_pretrained("sound")


def make(pipe: TextToSoundPipeline, prompt: str, count: int = 4, **options) -> list[torch.Tensor]:
    generator = seed_generators(0, count)
    return pipe(prompt, num_sounds_per_prompt=count, generator=generator, **options).sounds


def spectrum(sound: torch.Tensor, rate: int) -> torch.Tensor:
    """Share of each of 40 mel bands ``[40]`` of the energy."""
    mel = log_mel(sound[0], rate, n_fft=1024, hop_length=256, n_mels=40).exp().square().mean(-1)
    return mel / mel.sum()


def test_sounds_are_neither_silent_nor_clipped(pipe):
    for prompt in ("a plucked guitar playing a C major chord", "click interface sound"):
        for sound in make(pipe, prompt):
            assert 0.05 < sound.shape[-1] / pipe.sample_rate <= pipe.max_seconds
            assert bool(sound.isfinite().all())
            assert 0.02 < float(sound.abs().max()) <= 1.0


def test_a_click_is_shorter_than_music_and_a_bass_lower_than_a_piccolo(pipe):
    click, music = (
        sum(sound.shape[-1] for sound in make(pipe, prompt))
        for prompt in ("click interface sound", "cheerful classical music with piano, fast tempo")
    )
    assert click < 0.5 * music
    bands = torch.arange(40.0)
    low, high = (
        sum(float((spectrum(sound, pipe.sample_rate) * bands).sum()) for sound in made) / len(made)
        for made in (
            make(pipe, "acoustic bass playing a long C note"),
            make(pipe, "piccolo playing a long C note"),
        )
    )
    assert low + 5 < high


def test_notes_are_those_asked_for(pipe):
    wanted = {
        "acoustic grand piano playing a long D note": "D",
        "church organ playing a long F note": "F",
        "flute playing a long G note": "G",
        "violin playing a long A note": "A",
        "trumpet playing a long B flat note": "B flat",
        "vibraphone playing a long C note": "C",
    }
    heard = [
        [strongest_note(sound, pipe.sample_rate) == note for sound in make(pipe, prompt, 2)]
        for prompt, note in wanted.items()
    ]
    assert sum(map(sum, heard)) >= 7  # Of twelve; one by chance.


def test_one_and_two_threads_and_any_batch_sound_the_same(pipe):
    threads, prompt = torch.get_num_threads(), "xylophone playing a short C note"
    try:
        torch.set_num_threads(1)
        one = make(pipe, prompt, 2)
        torch.set_num_threads(2)
        two = make(pipe, prompt, 2)
    finally:
        torch.set_num_threads(threads)
    alone = make(pipe, prompt, 1)
    for a, b in ((one[0], two[0]), (one[1], two[1]), (one[0], alone[0])):
        assert a.shape == b.shape and float((a - b).abs().max()) < 1e-2
