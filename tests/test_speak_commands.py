"""tessera speak and tessera sound, over tiny models in place of the shipped ones."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tessera.app import commands_audio
from tessera.app.audio_records import one_line, spoken_text
from tessera.app.commands import cli
from tessera.modalities import audio as audio_files
from tessera.modalities.audio import load_audio, read_record, save_audio
from tessera.modalities.metadata import MAX_TEXT_CHARACTERS
from tessera.pipelines.text_to_speech import TextToSpeechPipeline
from tessera.tests.tiny import tiny_pipeline, tiny_sound, tiny_voice
from tessera.tokenizers.auto import AutoTokenizer, tokenizer_class
from tessera.weights import registry

TEXT = "The kettle is boiling. Pour it!"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder of shipped models: "voice" and "sound"."""
    folder = tmp_path_factory.mktemp("shipped")
    for name, pipeline, task in (
        ("voice", tiny_voice(), "text-to-speech"),
        ("sound", tiny_sound(), "text-to-sound"),
    ):
        pipeline.save_pretrained(folder / name)
        kind = type(pipeline).__name__
        module = task.replace("-", "_")
        row = {"title": f"Tiny {name}", "task": task, "model": f"pipelines.{module}:{kind}"}
        row |= {"license_weights": "CC0-1.0"}
        (folder / name / "tessera.json").write_text(json.dumps(row))
    return folder


@pytest.fixture(autouse=True)
def workplace(shipped, tmp_path, monkeypatch):
    """An empty current folder; the tiny models are the shipped ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "SHIPPED", shipped)
    registry._models.cache_clear()
    yield tmp_path
    registry._models.cache_clear()


def tessera(*arguments, code=0, text=None):
    result = CliRunner().invoke(cli, [str(each) for each in arguments], input=text)
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None)
    if code == 2:
        assert result.stderr.splitlines()[-1].startswith("Error: ")
    return result


def test_speak(workplace):
    result = tessera("speak", TEXT, "-o", "kettle.wav", "--seed", 5, "--words", "words.json")
    assert result.stdout == "kettle.wav\n" and "seed 5" in result.stderr
    audio, rate = load_audio("kettle.wav")
    speech = TextToSpeechPipeline.from_pretrained("voice")(TEXT, seed=5)
    assert rate == 8000 and torch.allclose(audio, speech.audio, atol=1e-4)

    record = read_record("kettle.wav")
    assert record["prompt"] == TEXT and record["seed"] == 5 and record["model"] == "voice"
    assert record["pipeline"] == "TextToSpeechPipeline" and len(record["sha256"]) == 64
    assert record["settings"]["voice"] == "kathleen" and record["settings"]["speed"] == 1.0

    marks = json.loads(Path("words.json").read_text())
    assert [word["word"] for word in marks["words"]] == TEXT.replace(".", "").strip("!").split()
    assert marks["seconds"] == pytest.approx(audio.shape[-1] / rate, abs=1e-3)
    assert marks["words"][-1]["end"] <= marks["seconds"]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus"])
def test_a_file_of_each_format_is_made_again(workplace, suffix):
    tessera("speak", "A bell.\n\nBy Bob", "--voice", "bob", "--speed", 1.5, "-o", f"a.{suffix}")
    assert "identical" in tessera("info", f"a.{suffix}", "--rerun").stdout
    tessera("sound", "a bell", "--seconds", 0.5, "-o", f"b.{suffix}")
    assert "identical" in tessera("info", f"b.{suffix}", "--rerun").stdout


def test_a_changed_file_differs(workplace):
    tessera("speak", "A bell.", "--seed", 1, "-o", "a.wav")
    audio, rate = load_audio("a.wav")
    save_audio(audio * 0.5, rate, "quiet.wav", read_record("a.wav"))
    assert "differs: by up to" in tessera("info", "quiet.wav", "--rerun", code=1).stdout
    save_audio(audio[:, :-100], rate, "short.wav", read_record("a.wav"))
    assert "s became" in tessera("info", "short.wav", "--rerun", code=1).stdout


def test_reconstructions_are_made_again(workplace):
    tessera("speak", "A bell.", "-o", "a.wav")
    tessera("reconstruct", "a.wav", "--tokenizer", "voice", "-o", "b.wav")
    assert "identical" in tessera("info", "b.wav", "--rerun").stdout
    assert tokenizer_class("voice").__name__ == "WavTokenizer"
    assert AutoTokenizer.from_pretrained("voice").sample_rate == 8000


def test_text_comes_from_stdin_or_a_file(workplace):
    Path("text.txt").write_text(TEXT)
    tessera("speak", "--file", "text.txt", "--seed", 5, "-o", "a.wav")
    tessera("speak", "-", "--seed", 5, "-o", "b.wav", text=TEXT)
    assert torch.equal(load_audio("a.wav")[0], load_audio("b.wav")[0])
    shown = json.loads(tessera("speak", TEXT, "--seed", 5, "-o", "out/", "--json").stdout)
    assert shown["path"] == "out/the-kettle-is-boiling-pour-it_5.wav" and shown["seed"] == 5
    assert Path(shown["path"]).is_file()


def test_stream_writes_the_samples_as_they_are_made(workplace, monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=pipe, flush=lambda: None))
    options = {"voice": None, "speed": 1.0, "seed": 5, "model": "voice", "stream": True}
    commands_audio.speak(TEXT, out="a.wav", **options)
    samples = torch.frombuffer(bytearray(pipe.getvalue()), dtype=torch.int16)
    written = load_audio("a.wav")[0][0] * 32768
    assert (written - samples).abs().max() <= 1.5


def test_the_file_is_written_piece_by_piece(workplace, monkeypatch):
    sizes = []
    write = audio_files.AudioWriter.write
    monkeypatch.setattr(
        audio_files.AudioWriter, "write", lambda w, a: (sizes.append(a.shape[-1]), write(w, a))
    )
    tessera("speak", TEXT * 8, "-o", "a.wav")
    assert sum(sizes) == load_audio("a.wav")[0].shape[-1]
    assert len(sizes) > 16 and max(sizes) <= 0.5 * 8000


def test_what_was_spoken_before_a_stop_is_kept(workplace, monkeypatch):
    stream = TextToSpeechPipeline.stream

    def stopped(self, *arguments, **options):
        for chunk in stream(self, *arguments, **options):
            yield chunk
            if chunk.sentence == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(TextToSpeechPipeline, "stream", stopped)
    result = tessera("speak", TEXT, "-o", "a.wav", "--words", "w.json", code=130)
    assert result.stdout == "a.wav\n"
    seconds = load_audio("a.wav")[0].shape[-1] / 8000
    marks = json.loads(Path("w.json").read_text())
    assert marks["words"] and all(word["start"] < seconds for word in marks["words"])


def test_a_long_text_is_spoken_and_its_record_holds_its_beginning(workplace):
    text = "word " * (MAX_TEXT_CHARACTERS // 5 + 5)
    line = one_line(text)
    tessera("speak", "--file", "long.txt", code=2)
    Path("long.txt").write_text("Oh. " + text)
    tessera("speak", "--file", "long.txt", "--speed", 4, "-o", "long.flac")
    record = read_record("long.flac")
    assert record["prompt"].endswith("…") and record["settings"]["characters"] == len(line) + 4
    assert "only the beginning" in tessera("info", "long.flac", "--rerun", code=2).stderr


def test_sound(workplace):
    result = tessera("sound", "a bell", "--seconds", 0.5, "-n", 10, "--seed", 3, "-o", "bells/")
    paths = result.stdout.split()
    assert paths == [f"bells/a-bell_{seed}.wav" for seed in range(3, 13)]
    tessera("sound", "a bell", "--seconds", 0.5, "--seed", 4, "-o", "one.wav")
    one, rate = load_audio("one.wav")
    assert rate == 8000 and one.shape == (1, 4000)
    assert torch.allclose(load_audio(paths[1])[0], one, atol=1e-3)
    record = read_record(paths[9])
    assert record["index"] == 1 and record["settings"]["num_sounds_per_prompt"] == 2
    assert "identical" in tessera("info", paths[9], "--rerun").stdout
    shown = json.loads(tessera("sound", "drum", "-o", "d.ogg", "--json", "--no-metadata").stdout)
    assert [each["path"] for each in shown["sounds"]] == ["d.ogg"]
    assert read_record("d.ogg") is None


def test_lines_of_a_record_are_heard_as_the_text():
    text = "A title\n\nIt rains\nand  pours.\r\n\r\nThe end"
    line = one_line(text)
    assert "\n" not in line and one_line(spoken_text(line)) == line
    assert spoken_text(line) == "A title\n\nIt rains and pours.\n\nThe end"


REFUSED = {
    ("speak",): "Give a text",
    ("speak", "Hi.", "--file", "x.txt"): "Give a text",
    ("speak", "--file", "none.txt"): "check the path",
    ("speak", ""): "nothing to speak",
    ("speak", "... !? --"): "nothing to speak",
    ("speak", "\N{GRINNING FACE} \N{PARTY POPPER}"): "nothing to speak",
    ("speak", "Привет, мир."): "cannot be spoken",
    ("speak", "你好"): "cannot be spoken",
    ("speak", "Hi.", "--voice", "eve"): 'no voice "eve"',
    ("speak", "Hi.", "--speed", "9"): "speed must lie",
    ("speak", "Hi.", "--speed", "nan"): "speed must lie",
    ("speak", "Hi.", "--seed", "-1"): "Seed must be",
    ("speak", "Hi.", "--temperature", "nan"): "emperature",
    ("speak", "Hi.", "-o", "a.mp3"): "must end in",
    ("speak", "Hi.", "-o", "none/a.wav"): "does not exist",
    ("speak", "Hi.", "--words", "none/w.json"): "does not exist",
    ("speak", "Hi.", "-o", "there.wav"): "exists already",
    ("speak", "Hi.", "--stream", "--json"): "leave one of them out",
    ("speak", "Hi.", "--model", "nothing"): "Unknown model",
    ("speak", "Hi.", "--model", "sound"): "TextToSpeechPipeline",
    ("speak", "Hi.", "--model", "stickers"): "TextToSpeechPipeline",
    ("sound", ""): "empty",
    ("sound", "\u200b"): "empty",
    ("sound", "x" * 100_000): "at most 2,000",
    ("sound", "a bell", "--seconds", "60"): "up to 2 seconds",
    ("sound", "a bell", "--seconds", "nan"): "up to 2 seconds",
    ("sound", "a bell", "--seed", "4294967296"): "Seed must be",
    ("sound", "a bell", "-n", "2", "-o", "a.wav"): "names one file",
    ("sound", "a bell", "-o", "a.png"): "must end in",
    ("sound", "a bell", "--model", "voice"): "TextToSoundPipeline",
}


def test_refusals(workplace):
    save_audio(torch.zeros(1, 100), 8000, "there.wav")
    tiny_pipeline().save_pretrained("stickers")
    for arguments, reason in REFUSED.items():
        result = tessera(*arguments, code=2)
        assert reason in result.stderr, (arguments, result.stderr)
    files = [path for path in Path().rglob("*.*") if path.parts[0] != "stickers"]
    assert files == [Path("there.wav")]


def test_any_caption_in_any_language_makes_a_sound(workplace):
    for number, caption in enumerate(["!?", "\N{GUITAR}", "гитара"]):
        tessera("sound", caption, "--seconds", 0.1, "-o", f"{number}.wav")
        assert load_audio(f"{number}.wav")[0].shape[-1] == 800


def test_bad_text_files(workplace):
    Path("latin.txt").write_bytes(b"caf\xe9")
    assert "UTF-8" in tessera("speak", "--file", "latin.txt", code=2).stderr
    Path("huge.txt").write_text("a " * 600_000)
    assert "split it" in tessera("speak", "--file", "huge.txt", code=2).stderr
    assert "nothing to speak" in tessera("speak", "-", code=2, text="").stderr


def recordings(folder):
    """Recordings of all kinds by file name, and the sentence where one is refused."""
    noise = torch.rand(8, 96_000, generator=torch.Generator().manual_seed(0)) - 0.5
    save_audio(torch.zeros(1, 8000), 8000, folder / "silence.wav")
    save_audio(torch.ones(1, 1) / 2, 8000, folder / "one.wav")
    save_audio(noise, 192_000, folder / "eight.wav")
    import soundfile

    soundfile.write(folder / "none.wav", noise[0, :0].numpy(), 8000)
    nan = noise[0].clone()
    nan[5] = float("nan")
    soundfile.write(folder / "nan.wav", nan.numpy(), 8000, subtype="FLOAT")
    (folder / "picture.wav").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    refused = {"none": "no samples", "nan": "not finite", "picture": "not a WAV"}
    return {name: refused.get(name) for name in ("silence", "one", "eight", *refused)}


@pytest.mark.parametrize("verb", ["reconstruct", "encode"])
def test_recordings_of_all_kinds(workplace, verb):
    for name, reason in recordings(workplace).items():
        out = f"{name}-out.wav" if verb == "reconstruct" else f"{name}.tok"
        arguments = (verb, f"{name}.wav", "--tokenizer", "voice", "-o", out)
        if reason:
            assert reason in tessera(*arguments, code=2).stderr
            assert not Path(out).exists()
        else:
            tessera(*arguments)
            assert Path(out).is_file()
    if verb == "reconstruct":
        assert load_audio("eight-out.wav")[0].shape == (1, 4000)
        assert load_audio("one-out.wav")[0].shape == (1, 1)
        assert "no Tessera settings" in tessera("info", "silence.wav", code=2).stderr
        assert "not a recording" in tessera("info", "picture.wav", code=2).stderr
