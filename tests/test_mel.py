"""Log-mel tokens: frames, the way back, saving."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.tokenizers.audio.mel import LogMel
from tessera.tokenizers.auto import AutoTokenizer


def test_frames_and_the_way_back():
    tokenizer = LogMel()
    t = torch.arange(10_000) / 24_000
    audio = (0.3 * torch.sin(2 * math.pi * 440 * t) * torch.exp(-3 * t))[None, None]
    frames = tokenizer.encode(audio)
    assert frames.shape == (1, 40, 100) and tokenizer.frame_rate == 93.75
    decoded = tokenizer.decode(frames)
    assert decoded.shape == (1, 1, 10_240)
    assert (tokenizer.encode(decoded) - frames).abs().mean() < 0.5
    spectrum = torch.fft.rfft(decoded[0, 0, :9600]).abs()
    assert spectrum.argmax() * 2.5 == pytest.approx(440, abs=6)
    assert torch.equal(decoded, tokenizer.decode(frames))


@pytest.mark.parametrize("samples", [1, 256, 700, 1500])
def test_short_sounds(samples):
    tokenizer = LogMel()
    frames = tokenizer.encode(torch.zeros(2, 1, samples))
    assert frames.shape == (2, -(-samples // 256), 100)
    decoded = tokenizer.decode(frames)
    assert decoded.shape == (2, 1, frames.shape[1] * 256) and decoded.abs().max() < 1e-3


def test_saved_and_refused(tmp_path):
    LogMel(sample_rate=16000, n_mels=40, n_fft=512, hop=128).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.hop, again.latent_dim, again.vocab_size) == (128, 40, None)
    with pytest.raises(InputError, match="1 or more, 40"):
        again.decode(torch.zeros(1, 3, 100))
