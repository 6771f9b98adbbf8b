"""The shipped voice: the same speech for the same seed, understood by a recogniser, well formed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera.evaluation.audio import Recogniser, stoi
from tessera.modalities.audio import load_audio, normalize_peak
from tessera.pipelines.text_to_speech import TextToSpeechPipeline

RECORDING = Path(__file__).parent / "data" / "kathleen_a0521.opus"
SENTENCES = [
    "The kettle is boiling.",
    "We walked along the river until the rain began.",
    "Her brother bought a small boat last summer.",
    "Please bring two bags of flour from the store.",
]


@pytest.fixture(scope="module")
def voice() -> TextToSpeechPipeline:
    return TextToSpeechPipeline.from_pretrained("voice")


def test_the_codec_keeps_a_held_out_recording(voice):
    audio, rate = load_audio(RECORDING, voice.sample_rate, mono=True)
    audio = normalize_peak(audio, -3.0)
    codec = voice.codec
    decoded = codec.decode(codec.encode(audio[None]))[..., : audio.shape[-1]]
    assert float(stoi(decoded, audio[None], rate)) > 0.75


@pytest.mark.parametrize("name", ["kathleen", "slt"])
def test_each_voice_is_told_apart_from_other_sentences(voice, name):
    hear = Recogniser(SENTENCES)
    right = 0
    for number, sentence in enumerate(SENTENCES):
        speech = voice(sentence, voice=name, seed=number)
        heard = hear(speech.audio, speech.sample_rate).lower().split()
        right += heard[:3] == sentence.lower().rstrip(".").split()[:3]
    assert right >= 3


def test_one_and_two_threads_speak_the_same(voice):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = voice(SENTENCES[0], seed=11).audio
        torch.set_num_threads(2)
        two = voice(SENTENCES[0], seed=11).audio
    finally:
        torch.set_num_threads(threads)
    assert one.shape == two.shape
    assert float((one - two).abs().max()) < 1e-2


def test_speech_is_neither_silent_nor_clipped(voice):
    for seed in range(4):
        audio = voice("I have never seen such a beautiful garden.", seed=seed).audio
        assert 1.0 < audio.shape[-1] / voice.sample_rate < 6.0
        assert 0.1 < float(audio.abs().max()) <= 1.0
        assert float((audio.abs() >= 1.0).float().mean()) < 1e-3


def test_a_faster_voice_is_shorter(voice):
    slow, fast = (voice(SENTENCES[1], speed=s, seed=0).audio.shape[-1] for s in (0.8, 1.6))
    assert slow == pytest.approx(2 * fast, rel=0.1)
