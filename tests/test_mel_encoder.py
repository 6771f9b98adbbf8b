"""WavTokenizer over log-mel spectra: as many tokens as samples ask for, none of them about the phase."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tessera.modalities.errors import InputError
from tessera.tokenizers.audio.wavtokenizer import ISTFTHead, MelEncoder, WavTokenizer

HOP, RATE = 64, 4000
WINDOWS = {"windows": [128, 512], "n_mels": 32, "dim": 24, "intermediate_dim": 32, "num_layers": 2}


@pytest.fixture(scope="module")
def codec() -> WavTokenizer:
    torch.manual_seed(0)
    codec = WavTokenizer(
        RATE,
        strides=(4, 4, 4),
        latent_dim=8,
        vocab_size=256,
        dim=64,
        intermediate_dim=32,
        num_layers=1,
        mel_encoder=WINDOWS,
        running_phase=True,
    )
    codec.init_weights()
    codec.quantizer.embed.normal_(std=0.05)
    return codec.eval()


def tone(hertz: float, samples: int, phase: float = 0.0) -> torch.Tensor:
    time = torch.arange(samples) / RATE
    return 0.3 * torch.sin(2 * torch.pi * hertz * time + phase)[None, None]


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 4000])
def test_one_token_a_hop(codec, samples):
    tokens = codec.encode(torch.randn(2, 1, samples))
    assert tokens.shape == (2, 1, -(-samples // HOP))
    assert codec.decode(tokens).shape == (2, 1, tokens.shape[-1] * HOP)


def test_a_mirrored_sound_is_the_same(codec):
    audio = torch.randn(1, 1, 2000) * torch.linspace(0, 1, 2000)
    latents = codec.encode_latents(audio).detach()
    assert float(latents.std(-1).mean()) > 0.01
    assert torch.equal(codec.encode_latents(-audio), latents)


def test_frames_of_a_steady_tone_are_alike_whatever_its_phase(codec):
    low, moved, high = (
        codec.encode_latents(sound)[0, :, 20:-20].detach()
        for sound in (tone(440, 8000), tone(440, 8000, phase=1.0), tone(1200, 8000))
    )
    center = low.mean(-1, keepdim=True)
    between = float((high.mean(-1, keepdim=True) - center).norm())
    for latents in (low, moved):
        assert float((latents - center).norm(dim=0).max()) < 0.3 * between


def test_frames_are_where_the_sound_is(codec):
    """A click in the middle of frame t is loudest in frame t of the short window."""
    for frame in (0, 7, 30):
        audio = torch.zeros(1, 1, 31 * HOP)
        audio[..., frame * HOP + HOP // 2] = 1.0
        short = codec.encoder.features(audio)[0, : codec.encoder.bands[128]]
        assert int(short.mean(0).argmax()) == frame


def test_a_sound_a_hop_later_has_its_frames_a_hop_later(codec):
    audio = torch.randn(1, 1, 40 * HOP)
    later = torch.cat([torch.zeros(1, 1, HOP), audio], -1)
    moved = codec.encoder.features(later)[..., 1:]
    torch.testing.assert_close(moved, codec.encoder.features(audio), rtol=0, atol=1e-4)


def test_features_that_stay_the_same_are_a_steady_tone():
    """With energy in one bin, at its frequency or the next one's; without running phases a buzz."""
    bin_, bins, frames = 21, 2 * HOP + 1, 60
    loud = torch.full((1, frames, bins), -20.0)
    loud[..., bin_] = 2.0

    def strongest(running: bool, pace: float = 0.0) -> tuple[float, float]:
        head = ISTFTHead(4, HOP, running)
        change = [torch.full_like(loud, pace)] * running
        layers = torch.cat([loud, torch.zeros_like(loud), *change], -1)
        head.out = nn.Identity()
        audio = head(layers)[0, 10 * HOP : -10 * HOP]
        spectrum = torch.fft.rfft(audio * torch.hann_window(len(audio))).abs().square()
        return float(spectrum.argmax()) * 4 * HOP / len(audio), float(
            spectrum.max() / spectrum.sum()
        )

    place, share = strongest(True)
    assert abs(place - bin_) < 0.1 and share > 0.3
    assert abs(strongest(True, pace=math.atanh(0.5))[0] - (bin_ + 0.5)) < 0.1
    assert abs(strongest(False)[0] - bin_) > 0.5


def test_saved_and_loaded(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    again = WavTokenizer.from_pretrained(tmp_path).eval()
    assert isinstance(again.encoder, MelEncoder)
    audio = torch.randn(1, 1, 1000)
    assert torch.equal(again.encode(audio), codec.encode(audio))


def test_windows_that_are_no_multiples_of_the_hop_are_refused():
    with pytest.raises(InputError, match=r"multiples of the hop of 64 samples, got \[100\]"):
        MelEncoder(RATE, HOP, 8, windows=[100])
