"""Recordings through the command line and the pipeline, over a tiny codec with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tessera.app.commands import cli
from tessera.evaluation import audio as evaluation
from tessera.evaluation.evaluate import evaluate
from tessera.modalities.audio import load_audio, read_record, save_audio
from tessera.modalities.errors import InputError
from tessera.modalities.token_file import read_tokens
from tessera.pipelines.reconstruction import ReconstructionPipeline
from tessera.tests.tiny import tiny_codec, tiny_pack, tiny_tokenizer
from tessera.tokenizers.audio.wavtokenizer import WavTokenizer
from tessera.tokenizers.auto import AutoTokenizer, tokenizer_class
from tessera.weights import registry
from tessera.weights.registry import ModelInfo

CODEC = "tiny-codec"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder; "tiny-codec" is a registered name that stands for a folder of it."""
    monkeypatch.chdir(tmp_path)
    tiny_codec().save_pretrained(tmp_path / "codec")
    save_audio(tone(), 8000, "in.wav")
    info = ModelInfo(
        name=CODEC, system="wavtokenizer", task="audio-tokenizer", title="A tiny codec",
        model="tokenizers.audio.wavtokenizer:WavTokenizer", license_code="MIT",
        license_weights="MIT", hub_id="nobody/tiny-codec",
    )  # fmt: skip
    models = {**registry._models(), CODEC: info}
    monkeypatch.setattr(registry, "_models", lambda: models)
    return tmp_path


def tone(seconds=0.5, rate=8000):
    return 0.5 * torch.sin(2 * math.pi * 300 * torch.arange(round(seconds * rate)) / rate)[None]


def tessera(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(each) for each in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None)
    if code == 2:
        assert result.stderr.splitlines()[-1].startswith("Error: ")
    return result


def test_reconstruct(workplace):
    result = tessera("reconstruct", "in.wav", "--tokenizer", "codec")
    assert result.stdout == "in_tokens.wav\n"
    assert "kbit/s" in result.stderr and "Real-time factor" in result.stderr
    audio, rate = load_audio("in_tokens.wav")
    assert rate == 1000 and audio.shape == (1, 500)
    record = read_record("in_tokens.wav")
    assert record["pipeline"] == "ReconstructionPipeline" and record["tokenizer"] == "codec"
    assert record["settings"] == {"frames": 50}

    shown = json.loads(
        tessera("reconstruct", "in.wav", "--tokenizer", "codec", "-o", "b.flac", "--json").stdout
    )
    assert shown["bitrate"] == pytest.approx(100 * 5) and shown["frames"] == 50
    assert shown["codebooks"] == 1 and shown["seconds"] == 0.5 and not shown["approximate"]
    assert set(shown["real_time_factor"]) == {"encode", "decode"}
    tessera("reconstruct", "in.wav", "--tokenizer", "codec", "-o", "c.ogg", "--no-metadata")
    assert read_record("c.ogg") is None


def test_encode_and_decode(workplace):
    tessera("encode", "in.wav", "--tokenizer", "codec")
    content = read_tokens("in.tok")
    assert content.tokenizer == "codec" and content.bits == 5
    assert content.tokens.shape == (50,)
    assert "exists already" in tessera("decode", "in.tok", "--tokenizer", "codec", code=2).stderr
    tessera("decode", "in.tok", "--tokenizer", "codec", "-o", "out.wav")
    codec = AutoTokenizer.from_pretrained("codec")
    expected = codec.decode(content.tokens[None, None])[0].clamp(-1, 1)
    assert torch.allclose(load_audio("out.wav")[0], expected, atol=1e-4)
    assert read_record("out.wav")["tokens"]


def test_what_is_refused(workplace):
    Path("picture.wav").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    refusals = {
        ("reconstruct", "picture.wav", "--tokenizer", "codec"): "not a WAV",
        ("reconstruct", "none.wav", "--tokenizer", "codec"): "no such file",
        ("reconstruct", "in.wav", "--tokenizer", "codec", "-o", "out.mp3"): "must end in",
        ("reconstruct", "in.wav", "--tokenizer", "codec", "--tokens", "4"): "of pictures",
        ("reconstruct", "in.wav", "--tokenizer", "codec", "-o", "in.wav"): "exists already",
        ("reconstruct", "in.wav", "--tokenizer", "nothing"): "Unknown tokenizer",
        ("encode", "in.wav", "--tokenizer", "codec", "-o", "in.png"): "must end in .tok",
    }
    for arguments, reason in refusals.items():
        assert reason in tessera(*arguments, code=2).stderr
    tiny_tokenizer().save_pretrained("pictures")
    shown = tessera("reconstruct", "in.wav", "--tokenizer", "pictures", code=2).stderr
    assert "tokenizer of pictures" in shown
    tessera("encode", "in.wav", "--tokenizer", "codec")
    assert "leave --tokens out" in (
        tessera(
            "decode", "in.tok", "--tokenizer", "codec", "--tokens", 3, "-o", "o.wav", code=2
        ).stderr
    )
    assert (
        "must end in"
        in tessera("decode", "in.tok", "--tokenizer", "codec", "-o", "o.png", code=2).stderr
    )


def test_evaluate(workplace, monkeypatch):
    monkeypatch.setattr(evaluation, "has_package", lambda package: False)
    Path("sounds").mkdir()
    Path("in.wav").rename("sounds/in.wav")
    result = tessera("evaluate", "codec", "--data", "sounds", "-o", "report.json")
    assert result.stdout == "report.json\n"
    report = json.loads(Path("report.json").read_text())
    assert report["recordings"] == 1 and report["bitrate"] == 500
    shown = tessera("evaluate", "codec", "--data", "sounds", "--voices", "kathleen", code=2)
    assert "no speech pack" in shown.stderr
    with pytest.raises(InputError, match="evaluate_audio"):
        evaluate("codec", tiny_pack(workplace / "pack"))


def test_the_class_of_a_tokenizer_is_known_before_it_loads(workplace):
    assert tokenizer_class("codec") is WavTokenizer
    assert tokenizer_class(CODEC) is WavTokenizer
    assert tokenizer_class("nothing") is None
    tiny_tokenizer().save_pretrained("pictures")
    assert tokenizer_class("pictures").__name__ == "FlexTok"


def test_pipeline():
    codec = tiny_codec()
    pipeline = ReconstructionPipeline(codec)
    audio = torch.cat([tone(0.5, 1000), tone(0.5, 1000)])
    calls = []
    out = pipeline([(audio, 1000), (tone(0.2, 2000), 2000)], callback=lambda *n: calls.append(n))
    assert [a.shape for a in out.audios] == [(1, 500), (1, 200)] and calls == [(1, 2), (2, 2)]
    whole = codec.decode(codec.encode(out.originals[0][None]))[0].clamp(-1, 1)
    assert torch.allclose(out.audios[0], whole, atol=1e-6)
    assert out.tokens[1].shape == (1, 20) and out.sampling_rate == 1000
    assert all(math.isfinite(value) for value in out.si_snr)
    with pytest.raises(InputError, match="num_tokens"):
        pipeline((audio, 1000), num_tokens=[4])
    with pytest.raises(InputError, match="channels, samples"):
        pipeline((audio[0], 1000))
    with pytest.raises(InputError, match="channels, samples"):
        pipeline((audio[:, :0], 1000))
    with pytest.raises(InputError, match="not finite"):
        pipeline((torch.full((1, 50), math.nan), 1000))
    with pytest.raises(InputError, match="sample rate"):
        pipeline((audio, 10))
    eight = pipeline((torch.zeros(8, 19_200), 192_000))
    assert eight.audios[0].shape == (1, 100)


def test_long_recordings_go_through_in_pieces():
    codec = tiny_codec()
    generator = torch.Generator().manual_seed(0)
    audio = torch.rand(1, 31_234, generator=generator) - 0.5
    out = ReconstructionPipeline(codec)((audio, 1000))
    assert out.approximate == [True]
    assert out.audios[0].shape == audio.shape and out.tokens[0].shape == (1, 3124)
    assert out.audios[0].isfinite().all()
    assert ReconstructionPipeline(codec)((audio[:, :9000], 1000)).approximate == [False]
