"""Evaluation of voices and of models of sound, over tiny ones; their benchmark."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tessera.app.commands import cli
from tessera.benchmarks import bench_voice as bench
from tessera.evaluation import voice as evaluation
from tessera.evaluation.sound import (
    FRAMES,
    MELS,
    evaluate_sound,
    features,
    strongest_note,
)
from tessera.evaluation.voice import Spoken, evaluate_voice, long_text, phone_count
from tessera.modalities.audio import save_audio
from tessera.modalities.errors import InputError
from tessera.modalities.pitch import NOTES
from tessera.tests.tiny import tiny_sound, tiny_voice

SPEECH = Path(__file__).parent / "data" / "kathleen_a0521.opus"
SENTENCE = "Without them he could not run his empire."


@pytest.fixture(scope="module")
def voice():
    return tiny_voice()


@pytest.fixture
def speech_pack(tmp_path):
    """Two held-out sentences and one for training, all with the same recording."""
    folder = tmp_path / "speech"
    folder.mkdir()
    data = SPEECH.read_bytes()
    (folder / "kathleen.bin").write_bytes(data)
    row = {"voice": "kathleen", "sr": 24_000, "seconds": 2.3, "last_take": True,
           "file": "kathleen.bin", "offset": 0, "length": len(data)}  # fmt: skip
    texts = [(SENTENCE, "test"), ("He ran.", "test"), ("He sat.", "train")]
    rows = [
        json.dumps({"id": f"kathleen/{i}", "text": text, "split": split, **row})
        for i, (text, split) in enumerate(texts)
    ]
    (folder / "transcripts.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def sound_pack(tmp_path):
    """Tones of three heights: six each for training, two for the test; one label is too rare."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    rows, data = [], b""
    generator = torch.Generator().manual_seed(0)
    wanted = [("low", 300, 8), ("middle", 1200, 8), ("high", 4000, 8), ("rare", 2000, 3)]
    # Of the two labels that name a note, one is right.
    notes = {"low": " playing a long E flat note", "middle": " playing a C note"}
    for label, pitch, count in wanted:
        for number in range(count):
            time = torch.arange(8000) / 16_000
            noise = torch.rand(8000, generator=generator) - 0.5
            tone = (
                0.5 * torch.sin(2 * torch.pi * pitch * (1 + 0.02 * (number % 4)) * time)
                + 0.1 * noise
            )
            save_audio(tone[None], 16_000, tmp_path / "tone.wav")
            encoded = (tmp_path / "tone.wav").read_bytes()
            rows.append(
                {"id": f"{label}{number}", "caption": f"a {label} bell{notes.get(label, '')}",
                 "label": label,
                 "kind": "note", "sr": 16_000, "seconds": 0.5, "file": "sounds.bin",
                 "split": "train" if number < count - 2 else "test", "offset": len(data),
                 "length": len(encoded)}
            )  # fmt: skip
            data += encoded
    (folder / "sounds.bin").write_bytes(data)
    (folder / "sounds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_evaluate_voice(voice, speech_pack, tmp_path, monkeypatch):
    made = []

    class Ear:
        def __init__(self, sentences=None):
            made.append(sentences)

        def __call__(self, audio, rate):
            return "without them he could not run his empire" if rate == 8000 else ""

    monkeypatch.setattr(evaluation, "Recogniser", Ear)
    console = Console(file=io.StringIO(), width=100)
    report = evaluate_voice(
        voice, speech_pack, 2, 3, minutes=0.05, out=tmp_path / "voice.json", console=console
    )
    assert report == json.loads((tmp_path / "voice.json").read_text())
    assert report["voice"] == "kathleen" and report["codec"]["recordings"] == 2
    assert made[0] is None and sorted(made[1]) == ["He ran.", SENTENCE]
    for rates in report["word_error_rate"].values():
        assert set(rates) == {"recordings", "reconstructions", "generated"}
        # Of "He ran." one word is heard as another, and six more are heard; all others are right.
        assert rates["generated"] == pytest.approx(7 / 10)
    sentences = report["sentences"]
    assert sentences["count"] == 3 and sentences["empty"] + sentences["endless"] <= 3
    assert sentences["seconds_a_phone"]["recordings"] > 0
    assert 0 < report["speed"]["first_audio"] <= report["speed"]["first_audio_worst"]
    assert report["long_text"]["seconds"] > 0
    assert "word error rate (free), generated" in console.file.getvalue()
    with pytest.raises(InputError, match="at least 1"):
        evaluate_voice(voice, speech_pack, 0)


def test_empty_and_endless_outputs(voice):
    def outcome(audio, expected):
        seconds = audio.shape[-1] / 8000
        return evaluation._outcome(voice, Spoken(audio, seconds, 0, 0, 0), expected)

    loud = 0.1 * torch.ones(1, 16_000)
    assert outcome(loud, 2.0) == "fine"
    assert outcome(loud, 6.5) == "empty" and outcome(loud, 0.5) == "endless"
    assert outcome(1e-3 * loud, 2.0) == "empty"


def test_long_text_lasts_as_long_as_asked():
    texts = ["It rains.", SENTENCE]
    text = long_text(texts, 0.1, 30)
    assert 30 <= 0.1 * phone_count(text) <= 34
    assert set(text.split("\n\n")) == set(texts)


def test_features_do_not_depend_on_loudness_or_length():
    noise = torch.rand(1, 24_000, generator=torch.Generator().manual_seed(0)) - 0.5
    assert features(noise, 24_000).shape == (MELS, FRAMES)
    assert torch.allclose(features(noise, 24_000), features(noise / 8, 24_000), atol=1e-4)
    assert features(noise.repeat(1, 9), 24_000).shape == (MELS, FRAMES)
    assert features(torch.zeros(1, 1), 24_000).isfinite().all()


def test_the_strongest_note_is_that_of_the_first_harmonics():
    time = torch.arange(24_000) / 24_000
    for hertz, note in ((110.0, "A"), (261.6, "C"), (277.2, "C sharp"), (466.2, "B flat")):
        sound = sum(torch.sin(2 * torch.pi * hertz * k * time) / k for k in (1, 2, 3, 4))
        assert strongest_note(0.1 * sound[None], 24_000) == note
    assert strongest_note(torch.zeros(1, 10), 24_000) in NOTES


def test_evaluate_sound(sound_pack, tmp_path):
    console = Console(file=io.StringIO(), width=100)
    report = evaluate_sound(
        tiny_sound(), sound_pack, 2, epochs=100, out=tmp_path / "sound.json", console=console
    )
    assert report == json.loads((tmp_path / "sound.json").read_text())
    assert (report["labels"], report["training_sounds"], report["test_sounds"]) == (3, 18, 6)
    assert report["made_sounds"] == 12
    assert report["accuracy"]["recordings"]["top1"] == 1
    assert report["accuracy"]["generated"]["top1"] < 1
    assert report["notes"]["recordings"] == 0.5 and report["test_notes"] == 4
    assert report["notes"]["generated"] < 1
    assert "right note" in console.file.getvalue() and "generated" in console.file.getvalue()
    with pytest.raises(InputError, match="at least 1"):
        evaluate_sound(tiny_sound(), sound_pack, 0)


def test_the_command_knows_what_a_folder_holds(voice, speech_pack, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "has_package", lambda package: False)
    voice.save_pretrained(tmp_path / "voice")
    tiny_sound().save_pretrained(tmp_path / "sound")

    def run(*arguments):
        return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])

    options = ("--recordings", 1, "--sentences", 1, "--minutes", 0, "--json")
    result = run(tmp_path / "voice", "--data", speech_pack, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["word_error_rate"] == {} and report["long_text"] is None
    result = run(tmp_path / "sound", "--data", speech_pack)
    assert result.exit_code == 2 and "no sound pack" in result.stderr
    result = run(tmp_path / "voice", "--data", tmp_path / "none")
    assert result.exit_code == 2 and "no recordings" in result.stderr


def test_benchmark(voice, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TEXTS", ("It rains.", "He ran."))
    monkeypatch.setattr(bench, "flop_rate", lambda *_, **__: 1e12)
    monkeypatch.setattr(bench, "read_rate", lambda *_, **__: 1e9)
    voice.save_pretrained(tmp_path / "voice")
    texts = bench.measure_speed(voice, 1)
    floor = bench.measure_floor(voice, 1)
    assert floor["gflop"] > 0 and floor["weights_read_gb"] > 0
    assert floor["real_time_factor"] == pytest.approx(
        max(floor["gflop"] / 1000, floor["weights_read_gb"])
    )
    report = {
        "model": "tiny",
        "machine": {"name": "a CPU", "threads": 1, "torch": "2", "python": "3"},
        "load_seconds": 1.0,
        "texts": texts,
        "floor": floor,
        "memory": [{"minutes": 1.0, "spoken": 61.0, "seconds": 9.0, "peak_mb": 500.0}],
    }
    table = bench.markdown(report)
    assert "| It rains. |" in table and "| 1 | 61 | 9 | 500 |" in table
    assert bench.parse_minutes("1, 2.5") == [1.0, 2.5] and bench.parse_minutes("") == []
    for text in ("x", "0", "99"):
        with pytest.raises(InputError, match="inutes"):
            bench.parse_minutes(text)
