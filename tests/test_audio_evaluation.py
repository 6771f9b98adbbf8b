from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tessera.evaluation import audio as evaluation
from tessera.evaluation.audio import (
    Recogniser,
    codebook_use,
    evaluate_audio,
    log_mel_distance,
    pesq,
    si_snr,
    spoken_words,
    stoi,
    word_error_rate,
)
from tessera.modalities.audio import load_audio
from tessera.modalities.errors import InputError
from tessera.tests.tiny import tiny_codec, tiny_tokenizer

SPEECH = Path(__file__).parent / "data" / "kathleen_a0521.opus"
SENTENCE = "Without them he could not run his empire."


@pytest.fixture(scope="module")
def speech():
    audio, rate = load_audio(SPEECH, 16_000)
    return audio[None], rate


def with_noise(audio, decibels, seed=0):
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(seed))
    noise *= audio.square().mean().sqrt() / noise.square().mean().sqrt() * 10 ** (-decibels / 20)
    return audio + noise


def test_si_snr_is_that_of_the_noise(speech):
    audio, _ = speech
    for decibels in (0.0, 20.0):
        assert si_snr(3 * with_noise(audio, decibels), audio).item() == pytest.approx(
            decibels, abs=0.3
        )
    assert si_snr(audio.repeat(2, 1, 1), audio.repeat(2, 1, 1)).shape == (2,)


def test_log_mel_distance(speech):
    audio, rate = speech
    assert log_mel_distance(audio, audio, rate).tolist() == [0.0]
    # Twice the amplitude is log 2 everywhere, but for what lies below the floor.
    assert log_mel_distance(2 * audio, audio, rate).item() == pytest.approx(math.log(2), abs=0.02)
    near, far = (log_mel_distance(with_noise(audio, d), audio, rate).item() for d in (30, 0))
    assert 0 < near < far
    assert log_mel_distance(audio[..., :1], audio[..., :1], rate).tolist() == [0.0]


def test_stoi(speech):
    pytest.importorskip("pystoi")
    audio, rate = speech
    assert stoi(audio, audio, rate).item() == pytest.approx(1.0, abs=1e-4)
    good, bad = (stoi(with_noise(audio, d), audio, rate).item() for d in (20, -10))
    assert good > 0.9 and bad < 0.75
    assert stoi(audio[..., :1000], audio[..., :1000], rate).isnan().all()
    assert stoi(torch.zeros(1, 1, rate), torch.zeros(1, 1, rate), rate).isnan().all()


def test_pesq(speech):
    pytest.importorskip("pesq")
    audio, rate = speech
    assert pesq(audio, audio, rate).item() > 4.5
    assert pesq(with_noise(audio, 0), audio, rate).item() < 2
    assert pesq(torch.zeros(1, 1, rate), torch.zeros(1, 1, rate), rate).isnan().all()


def test_codebook_use():
    even = torch.arange(8).repeat(2, 1)[:, None]
    use = codebook_use([even], 8)
    assert (
        use["perplexity"] == pytest.approx(8)
        and use["used"] == 1
        and use["bits"] == pytest.approx(3)
    )
    one = torch.zeros(1, 1, 5, dtype=torch.long)
    assert codebook_use([one], 8) == {"perplexity": 1.0, "used": 1 / 8, "bits": 0.0}
    # Two codebooks, one even and one constant, in two pieces.
    both = [torch.cat([even[:1, :, :5], one], 1), torch.cat([even[:1, :, 5:], one[..., :3]], 1)]
    assert codebook_use(both, 8)["perplexity"] == pytest.approx(4.5)
    with pytest.raises(InputError, match="no tokens"):
        codebook_use([], 8)


def test_word_error_rate():
    assert spoken_words("Dr. Lee owes $5 -- isn't it?") == [
        "doctor", "lee", "owes", "five", "dollars", "isn't", "it",
    ]  # fmt: skip
    assert word_error_rate(["doctor lee"], ["Dr. Lee."]) == 0
    assert word_error_rate(["red dog", ""], ["Red dog ran!", "Away."]) == 0.5
    with pytest.raises(InputError, match="2 transcripts"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(InputError, match="no words"):
        word_error_rate(["a"], ["..."])


def test_recogniser(speech):
    pytest.importorskip("pocketsphinx")
    audio, rate = speech
    free = Recogniser()
    assert free(torch.zeros(1, rate), rate) == ""
    heard = free(audio[0], rate)
    assert word_error_rate([heard], [SENTENCE]) <= 0.5
    assert free(audio[0], rate) == heard  # What it heard before does not matter.

    # "Zvuvle" is in no dictionary.
    given = Recogniser(["The kettle is boiling, Zvuvle.", SENTENCE, "He will call at five."])
    assert given(audio[0], rate) == "without them he could not run his empire"
    with pytest.raises(InputError, match="each with a word"):
        Recogniser(["hello", "..."])


def test_without_the_optional_packages(speech, monkeypatch):
    monkeypatch.setattr(evaluation, "has_package", lambda package: False)
    audio, rate = speech
    for call, package in (
        (lambda: stoi(audio, audio, rate), "pystoi"),
        (lambda: pesq(audio, audio, rate), "pesq"),
        (Recogniser, "pocketsphinx"),
    ):
        with pytest.raises(InputError, match=f"pip install {package}"):
            call()


@pytest.fixture
def pack(tmp_path):
    """A speech pack of one sentence, twice."""
    data = SPEECH.read_bytes()
    row = {"voice": "kathleen", "text": SENTENCE, "sr": 24_000, "seconds": 2.3, "split": "test",
           "last_take": True, "file": "kathleen.bin", "offset": 0, "length": len(data)}  # fmt: skip
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "kathleen.bin").write_bytes(data)
    rows = [json.dumps({"id": f"kathleen/{i}", **row}) for i in range(2)]
    (folder / "transcripts.jsonl").write_text("\n".join(rows))
    return folder


def test_evaluate(pack, tmp_path, monkeypatch):
    listened = []

    class Deaf:
        def __call__(self, audio, rate):
            listened.append(audio.shape)
            return "without them" if len(listened) % 2 else ""

    monkeypatch.setattr(evaluation, "Recogniser", Deaf)
    monkeypatch.setattr(evaluation, "has_package", lambda package: package == "pocketsphinx")
    console = Console(file=io.StringIO(), width=100)
    report = evaluate_audio(
        tiny_codec(), pack, recordings=5, out=tmp_path / "report.json", console=console
    )
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["recordings"] == 2 and report["model"] == "WavTokenizer"
    assert report["seconds"] == pytest.approx(2 * 2.318, abs=0.1)
    assert report["frame_rate"] == 100 and report["bitrate"] == 500
    assert report["log_mel"] > 0 and math.isfinite(report["si_snr"]) and "stoi" not in report
    assert 1 <= report["codebooks"]["perplexity"] <= 32
    assert report["real_time_factor"]["encode"] > 0
    assert len(listened) == 4
    assert report["word_error_rate"] == {"recordings": 6 / 8, "reconstructions": 1.0}
    shown = console.file.getvalue()
    assert "0.50 kbit/s" in shown and "word error rate" in shown

    with pytest.raises(InputError, match="at least 1"):
        evaluate_audio(tiny_codec(), pack, recordings=0)
    with pytest.raises(InputError, match="no audio tokenizer"):
        evaluate_audio(tiny_tokenizer(), pack, console=console)
    with pytest.raises(InputError, match="no test recordings"):
        evaluate_audio(tiny_codec(), pack, voices=["slt"], console=console)
