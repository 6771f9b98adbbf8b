from __future__ import annotations

import io
import json
import random
import tarfile

import pytest
import torch

from tessera.modalities.audio import save_audio
from tessera.modalities.audio_datasets import (
    AudioTextFolder,
    AudioWebDataset,
    SoundPack,
    SpeechPack,
    load_sounds,
    load_utterances,
    open_audio_dataset,
    read_crop,
    read_mono,
)
from tessera.modalities.errors import InputError


def encoded(tmp_path, level, seconds=0.2, rate=8000, suffix=".wav", channels=1):
    path = tmp_path / f"sound{suffix}"
    save_audio(torch.full((channels, round(seconds * rate)), level), rate, path)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture
def speech(tmp_path):
    """Six utterances of two voices; each one's samples all have its own value."""
    folder = tmp_path / "speech"
    folder.mkdir()
    rows, files = [], {"kathleen.bin": b"", "digits.bin": b""}
    for number, (voice, split, last, cost) in enumerate(
        [
            ("kathleen", "train", False, 0.1),
            ("kathleen", "train", True, 0.1),
            ("kathleen", "train", True, 0.9),
            ("kathleen", "test", True, 0.1),
            ("digits", "train", True, 0.0),
        ]
    ):
        data = encoded(tmp_path, number / 10, suffix=".flac")
        file = f"{voice}.bin"
        row = {
            "id": f"{voice}/{number}",
            "voice": voice,
            "text": f"Sentence {number}.",
            "sr": 8000,
            "seconds": 0.2,
            "split": split,
            "last_take": last,
            "align_cost": cost,
            "phones": ["pau", "ax"],
            "ends": [0.1, 0.2],
            "licence": "CC0-1.0",
            "file": file,
            "offset": len(files[file]),
            "length": len(data),
        }
        rows.append(json.dumps(row))
        files[file] += data
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "transcripts.jsonl").write_text("\n".join(rows))
    return folder


def texts(dataset):
    return [dataset.text(i) for i in range(len(dataset))]


def test_speech_pack(speech):
    pack = SpeechPack(speech)
    assert texts(pack) == ["Sentence 0.", "Sentence 1.", "Sentence 2."]
    for i in range(3):
        audio, rate = pack.audio(i)
        assert rate == 8000 and audio.shape == (1, 1600)
        assert audio.mean() == pytest.approx(i / 10, abs=1e-3)
    assert pack.rows[0].phones == ("pau", "ax") and pack.rows[0].ends == (0.1, 0.2)
    assert texts(SpeechPack(speech, last_takes=True, max_align_cost=0.5)) == ["Sentence 1."]
    assert texts(SpeechPack(speech, split="test")) == ["Sentence 3."]
    assert texts(SpeechPack(speech, voices=("digits",))) == ["Sentence 4."]
    assert isinstance(open_audio_dataset(speech, voices=("kathleen",)), SpeechPack)
    assert len(SpeechPack(speech, split=None)) == 4
    data = {"root": speech, "options": {"voices": ["kathleen"], "split": "test"}}
    (utterance,) = load_utterances(data, 4000)
    assert utterance.audio.shape == (800,) and utterance.speaker == "kathleen"
    assert utterance.text == "Sentence 3." and utterance.phones == ("pau", "ax")
    (sound,) = load_sounds(data, 4000)
    assert torch.equal(sound, utterance.audio)
    assert sound.float().mean() == pytest.approx(0.3, abs=0.01)
    with pytest.raises(InputError, match="Unknown split"):
        SpeechPack(speech, split="val")
    with pytest.raises(InputError, match="Unknown voice"):
        SpeechPack(speech, voices=("nobody",))
    with pytest.raises(InputError, match="missing"):
        SpeechPack(speech.parent)
    with pytest.raises(InputError, match="cannot take"):
        open_audio_dataset(speech, kinds=("note",))
    (speech / "transcripts.jsonl").write_text('{"id": "a"}')
    with pytest.raises(InputError, match="Line 1"):
        SpeechPack(speech)


def test_sound_pack(tmp_path):
    data = encoded(tmp_path, 0.5)
    row = {"id": "a", "caption": "a long D note", "label": "piano", "kind": "note", "sr": 8000,
           "seconds": 0.2, "split": "train", "file": "sounds.bin", "offset": 2, "length": len(data)}  # fmt: skip
    (tmp_path / "sounds.bin").write_bytes(b"--" + data)
    (tmp_path / "sounds.jsonl").write_text(json.dumps(row))
    pack = open_audio_dataset(tmp_path)
    assert isinstance(pack, SoundPack) and texts(pack) == ["a long D note"]
    assert pack.audio(0)[0].mean() == pytest.approx(0.5, abs=1e-3)
    assert len(SoundPack(tmp_path, split="test")) == 0
    with pytest.raises(InputError, match="kind of sound"):
        SoundPack(tmp_path, kinds=("drum",))


def test_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("dog_bark-2.wav", "sub/a.flac", "b.wav", "c.wav"):
        suffix = name[name.rindex(".") :]
        (tmp_path / name).write_bytes(encoded(tmp_path, 0.1, suffix=suffix, channels=2))
    (tmp_path / "sub" / "a.txt").write_text("Hello\nthere\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.wav", "text": "From the table"}')
    (tmp_path / "metadata.csv").write_text('c|It said "5"|It said five\n')
    dataset = open_audio_dataset(tmp_path)
    assert isinstance(dataset, AudioTextFolder)
    by_name = {path.name: dataset.text(i) for i, path in enumerate(dataset.files)}
    assert by_name == {
        "dog_bark-2.wav": "dog bark 2",
        "a.flac": "Hello there",
        "b.wav": "From the table",
        "c.wav": "It said five",
    }
    assert dataset.audio(0)[0].shape == (2, 1600)
    assert read_mono(dataset, 0, 4000).shape == (1, 800)
    assert read_crop(dataset, 0, 8000, 100, random.Random(0)).shape == (1, 100)
    assert read_crop(dataset, 0, 8000, 5000, random.Random(0)).shape == (1, 5000)

    (tmp_path / "metadata.csv").write_text("nobody|text\n")
    with pytest.raises(InputError, match="Line 1"):
        AudioTextFolder(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../b.wav", "text": "x"}')
    with pytest.raises(InputError, match="Line 1"):
        AudioTextFolder(tmp_path)
    with pytest.raises(InputError, match="No recordings"):
        (tmp_path / "empty").mkdir()
        AudioTextFolder(tmp_path / "empty")
    with pytest.raises(InputError, match="no recordings at"):
        open_audio_dataset(tmp_path / "nothing")


def test_webdataset(tmp_path):
    members = {
        "one.wav": encoded(tmp_path, 0.25),
        "one.txt": b"A bell",
        "two.flac": encoded(tmp_path, 0.5, suffix=".flac"),
        "two.json": b'{"caption": ["A drum"]}',
        "three.txt": b"no sound",
        "four.wav": encoded(tmp_path, 0.5),
    }
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    dataset = open_audio_dataset(tmp_path / "shard-0.tar")
    assert isinstance(dataset, AudioWebDataset) and len(dataset) == 3
    assert [dataset.text(i) for i in range(2)] == ["A bell", "A drum"]
    assert dataset.audio(1)[0].mean() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(InputError, match="no caption"):
        dataset.text(2)
    assert isinstance(open_audio_dataset(tmp_path), AudioWebDataset)
