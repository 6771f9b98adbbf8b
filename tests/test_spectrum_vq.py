"""SpectrumVQ: magnitudes as tokens, which hold no phase, and a sound from them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tessera.modalities.errors import InputError
from tessera.tests.tiny import tiny_spectrum_codec
from tessera.tokenizers.audio.spectrum_vq import SpectrumVQ
from tessera.tokenizers.auto import AutoTokenizer

HOP, RATE = 64, 4000


@pytest.fixture(scope="module")
def codec() -> SpectrumVQ:
    return tiny_spectrum_codec(RATE, HOP, 512)


def tone(hertz: float, samples: int, phase: float = 0.0) -> torch.Tensor:
    time = torch.arange(samples) / RATE
    return 0.3 * torch.sin(2 * torch.pi * hertz * time + phase)[None, None]


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 4000])
def test_one_token_of_each_codebook_a_hop(codec, samples):
    tokens = codec.encode(torch.randn(2, 1, samples))
    assert tokens.shape == (2, 2, -(-samples // HOP))
    decoded = codec.decode(tokens)
    assert decoded.shape == (2, 1, tokens.shape[-1] * HOP) and bool(decoded.isfinite().all())
    assert torch.equal(codec.decode(tokens), decoded)


def test_a_mirrored_sound_has_the_same_tokens(codec):
    audio = torch.randn(1, 1, 2000) * torch.linspace(0, 1, 2000)
    tokens = codec.encode(audio)
    assert len(tokens.unique()) > 3
    assert torch.equal(codec.encode(-audio), tokens)


def test_frames_of_a_steady_tone_are_alike_whatever_its_phase(codec):
    low, moved, high = (
        codec.spectrum(sound)[0, 20:-20]
        for sound in (tone(440, 8000), tone(440, 8000, phase=1.0), tone(1200, 8000))
    )
    for spectrum in (low, moved):
        assert float((spectrum - low.mean(0)).abs().mean()) < 0.05 * (high - low).abs().mean()


def test_the_spectrum_gives_the_sound_back(codec):
    """Phases are found anew: compared are magnitudes, at every time, the first and the last too."""
    sound = sum(tone(hertz, 6000) for hertz in (220, 447, 890)) * torch.linspace(1, 0.2, 6000)
    wanted = codec.spectrum(sound)
    made = codec.sound(wanted)
    assert made.shape[-1] == wanted.shape[1] * HOP
    found = codec.spectrum(made[..., :6000])
    # Of what is less than 50 dB below full scale.
    heard = wanted > (80 - 50) / 20 * math.log(10) / 4
    assert float((found - wanted)[heard].abs().mean()) * 4 < 0.5
    edges = torch.tensor([0, 1, -2, -1])
    assert float((found - wanted)[:, edges][heard[:, edges]].abs().mean()) * 4 < 1.0


def test_frames_are_where_the_sound_is(codec):
    for frame in (8, 30):
        audio = torch.zeros(1, 1, 60 * HOP)
        audio[..., frame * HOP : (frame + 1) * HOP] = torch.randn(HOP)
        energy = (4 * codec.spectrum(audio)[0]).exp().square().sum(-1)
        assert int(energy.argmax()) == frame
        made = codec.sound(codec.spectrum(audio))[0, 0].square()
        center = float((made * torch.arange(len(made))).sum() / made.sum()) / HOP
        assert abs(center - frame - 0.5) < 1.0


def test_silence_stays_silent(codec):
    silence = torch.zeros(1, 1, 3000)
    assert float(codec.sound(codec.spectrum(silence)).abs().max()) == 0.0


def test_tokens_of_tones_that_it_was_trained_on_decode_to_them():
    model = tiny_spectrum_codec(RATE, HOP, 512).train()
    for codebook in model.quantizer.codebooks:
        codebook.cluster_size.zero_()
    pitches = torch.tensor([300.0, 700.0, 1100.0, 1500.0])
    sounds = torch.cat([tone(float(hertz), 4096) for hertz in pitches])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(240):
        loss, parts = model(sounds, quantize=step >= 160)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = parts["distance"]
    assert parts["distance"] < 0.3 * first and parts["perplexity"] > 3
    made = model.eval().decode(model.encode(sounds))[:, 0]
    found = torch.fft.rfft(made * torch.hann_window(4096)).abs().argmax(-1) * (RATE / 4096)
    assert (found - pitches).abs().max() < 40


def test_saved_loaded_and_found_by_its_class(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    audio = torch.randn(1, 1, 1000)
    assert isinstance(again, SpectrumVQ) and torch.equal(again.encode(audio), codec.encode(audio))


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(1, 2, 100), "one channel"),
        (torch.zeros(1, 1, 0), "no samples"),
        (F.pad(torch.ones(1, 1, 99), (1, 0), value=float("nan")), "NaN"),
    ],
)
def test_sounds_that_cannot_be_encoded(codec, audio, message):
    with pytest.raises(InputError, match=message):
        codec.encode(audio)


def test_windows_must_fit_the_hop():
    with pytest.raises(InputError, match="multiple of 2 \\* hop = 128, got 100"):
        SpectrumVQ(RATE, HOP, 100)
