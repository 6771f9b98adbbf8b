"""The Sound tab through its jobs and through gradio_client, over tiny models."""

from __future__ import annotations

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from tessera.app.sound_job import SoundJob
from tessera.app.sound_models import SoundModels
from tessera.app.tabs import sound as tab
from tessera.modalities.audio import load_audio, read_record, save_audio
from tessera.modalities.errors import InputError
from tessera.tests.app_server import tiny_studio, wait_for
from tessera.tests.test_speak_commands import recordings

OWNER = "0" * 32
TEXT = "The kettle is boiling. Pour it!"


@pytest.fixture
def studio(server):
    return server.studio


def run(studio, job):
    studio.jobs.submit(job)
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert job.state == "done", job.error
    return job.view()


def test_speech_is_there_in_pieces_and_as_a_file(studio):
    job = tab.speech_job(studio, OWNER, TEXT, "bob", 1.5, 7)
    view = run(studio, job)
    (item,) = view["items"]
    audio, rate = load_audio(item["files"]["wav"])
    pieces = b"".join(
        (studio.scratch / job.id / f"{i}.pcm").read_bytes() for i in range(view["pieces"])
    )
    heard = torch.frombuffer(bytearray(pieces), dtype=torch.int16)
    assert view["pieces"] > 2 and rate == view["rate"] == 8000
    assert (heard - audio[0] * 32768).abs().max() <= 1.5
    assert [word for word, _, _ in view["words"]] == TEXT.replace(".", "").strip("!").split()
    assert view["spoken"] == item["seconds"] == pytest.approx(audio.shape[-1] / rate, abs=0.01)
    record = read_record(item["files"]["wav"])
    assert (record["prompt"], record["seed"], record["settings"]["voice"]) == (TEXT, 7, "bob")
    for kind in ("flac", "ogg"):
        assert load_audio(item["files"][kind])[0].shape == audio.shape
        assert read_record(item["files"][kind]) == record
    assert {file.suffix for file in studio.folder.rglob("*kettle*")} == {".wav"}
    folder = studio.scratch / job.id
    job.dispose()
    assert not folder.exists()


def test_a_stopped_speech_keeps_what_was_spoken(studio):
    job = tab.speech_job(studio, OWNER, "One. Two. Three. Four.", seed=1)
    hear = job._hear

    def stop(chunk):
        hear(chunk)
        if chunk.sentence == 1:
            job.cancel.set()

    job._hear = stop
    studio.jobs.submit(job)
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert job.state == "stopped" and (job.step, job.total) == (2, 4)
    assert job.items[0].seconds == pytest.approx(job.spoken, abs=0.01) and job.items[0].name


def test_sounds_and_a_stop(studio):
    view = run(studio, tab.sound_job(studio, OWNER, "a  bell", 0.3, 2, 5))
    assert [item["seed"] for item in view["items"]] == [5, 6] and view["title"] == "a bell"
    assert view["step"] == view["total"] == 30
    for item in view["items"]:
        assert item["seconds"] == 0.3 and set(item["files"]) == {"wav", "flac", "ogg"}
    assert read_record(view["items"][1]["files"]["wav"])["index"] == 1

    job = SoundJob(studio, OWNER, "drum", 1)
    job.cancel.set()
    studio.jobs.submit(job)
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert job.state == "stopped" and not job.items[0].name


def test_codecs_side_by_side(studio, tmp_path, monkeypatch):
    assert studio.sounds.codec_names()[:2] == ["tiny-voice", "tiny-sound"]
    names = ["tiny-voice", "tiny-sound", "gone"]
    monkeypatch.setattr(studio.sounds, "codec_names", lambda: names[:2])
    for name, reason in recordings(tmp_path).items():
        path = str(tmp_path / f"{name}.wav")
        if reason:
            with pytest.raises(InputError, match=f'"{name}.wav": .*{reason}'):
                tab.codec_job(studio, OWNER, path, names)
            continue
        view = run(studio, tab.codec_job(studio, OWNER, path, names))
        first, _, gone = view["rows"]
        assert first["state"] == "done" and first["bitrate"] == 500 and first["rate"] == 8000
        assert (first["si_snr"] is None) == (name == "silence")
        assert first["encode"] > 0 and load_audio(first["source"])[1] == 8000
        assert gone["state"] == "failed" and "not on this computer" in gone["error"]
        assert load_audio(view["original"]["source"])[0].shape[0] == 1
    save_audio(torch.zeros(1, 61_000), 1000, tmp_path / "long.wav")
    with pytest.raises(InputError, match="longer than 60 seconds"):
        tab.codec_job(studio, OWNER, str(tmp_path / "long.wav"), names)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        ("speech_job", {"text": "..."}, "nothing to speak"),
        ("speech_job", {"text": "\N{PARTY POPPER}"}, "nothing to speak"),
        ("speech_job", {"text": "Привет"}, "cannot be spoken"),
        ("speech_job", {"text": "a" * 100_000}, "at most 5,000"),
        ("speech_job", {"text": "Hi.", "voice": "eve"}, 'no voice "eve"'),
        ("speech_job", {"text": "Hi.", "speed": float("nan")}, "speed must lie"),
        ("speech_job", {"text": "Hi.", "seed": -1}, "Seed must be"),
        ("sound_job", {"caption": " "}, "empty"),
        ("sound_job", {"caption": "x" * 100_000}, "at most 2,000"),
        ("sound_job", {"caption": "a bell", "seconds": 99.0}, "up to 2 seconds"),
        ("sound_job", {"caption": "a bell", "count": 9}, "1 to 4 sounds"),
        ("codec_job", {"path": None, "codecs": ["tiny-voice"]}, "Record something"),
        ("codec_job", {"path": "x.wav", "codecs": []}, "Choose 1 to 8"),
    ],
)
def test_refusals(studio, make, values, message):
    with pytest.raises(InputError, match=message):
        getattr(tab, make)(studio, OWNER, **values)


def test_models_that_are_not_there(studio):
    nothing = SoundModels("no-such-voice", "no-such-sound")
    assert not nothing.found("voice") and not nothing.found("sound")
    with pytest.raises(InputError, match="Unknown model"):
        nothing.voice()


def test_client(server, tmp_path):
    client = Client(server.url, verbose=False, download_files=str(tmp_path))
    job = client.submit(TEXT, "bob", 1.0, 7, api_name="/speech")
    last = job.result(timeout=120)
    states = job.outputs()
    assert last["state"] == "done" and last["seeds"] == [7]
    assert states[0]["sounds"] == [] and len(states) > 2
    assert load_audio(last["sounds"][0])[0].shape[-1] / 8000 == pytest.approx(
        last["seconds"][0], abs=0.01
    )
    made = client.submit("a bell", 0.2, 2, 3, api_name="/sound").result(timeout=120)
    assert made["seconds"] == [0.2, 0.2] and len(made["sounds"]) == 2
    with pytest.raises(AppError, match="nothing to speak"):
        client.submit("...", api_name="/speech").result(timeout=120)
    with pytest.raises(AppError, match="up to 2 seconds"):
        client.submit("a bell", 60.0, api_name="/sound").result(timeout=120)


def test_a_page_without_models_of_sound(tmp_path):
    from tessera.app.main import build

    with tiny_studio(tmp_path) as server:
        server.studio.sounds = SoundModels("no-such-voice", "no-such-sound")
        demo = build(server.studio)
        shown = [str(block.value) for block in demo.blocks.values() if hasattr(block, "value")]
        assert any("No model of a voice is on this computer" in each for each in shown)
