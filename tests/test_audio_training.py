"""From a small speech pack and a small sound pack to pipelines: codec, decoder, generators."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tessera.generators.autoregressive.frames import FrameTransformer
from tessera.modalities.audio import save_audio
from tessera.modalities.errors import InputError
from tessera.pipelines.text_to_sound import TextToSoundPipeline
from tessera.pipelines.text_to_speech import TextToSpeechPipeline
from tessera.tests.tiny import tiny_tokenizer
from tessera.tokenizers.audio.mel import LogMel
from tessera.tokenizers.audio.wavtokenizer import WavTokenizer
from tessera.tokenizers.auto import AutoTokenizer
from tessera.tokenizers.quantizers.rvq import ResidualVQ
from tessera.training.config import load_recipe
from tessera.training.id_warm_start import ids_of_codes
from tessera.training.registry import TASKS
from tessera.training.trainer import train

RATE = 4000
CODEC = {
    "sample_rate": RATE,
    "filters": 4,
    "strides": "[2, 4, 8]",
    "lstm_layers": 1,
    "latent_dim": 8,
    "vocab_size": 32,
    "dim": 64,
    "intermediate_dim": 32,
    "num_layers": 1,
}
SPECTRUM = {
    "data.seconds": 0.4,
    "quantize_start": 2,
    "model.sample_rate": RATE,
    "model.hop": 64,
    "model.n_fft": 256,
    "model.latent_dim": 8,
    "model.vocab_size": 32,
    "model.dim": 32,
    "model.intermediate_dim": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
}
SHORT = {
    "training.steps": 4,
    "training.batch_size": 2,
    "training.log_every": 1,
    "training.warmup": 1,
    "training.sample_every": 4,
    "training.precision": "fp32",
}


def tone(hertz: float, seconds: float) -> torch.Tensor:
    time = torch.arange(round(RATE * seconds)) / RATE
    return 0.3 * torch.sin(2 * torch.pi * hertz * time)[None]


def pack(folder, table, rows, seconds):
    """A pack of FLAC tones in one file, with its table."""
    folder.mkdir()
    data = b""
    for number, row in enumerate(rows):
        save_audio(tone(200 + 100 * number, seconds), RATE, folder / "a.flac")
        encoded = (folder / "a.flac").read_bytes()
        row |= {"offset": len(data), "length": len(encoded), "file": "all.bin", "sr": RATE}
        row |= {"seconds": seconds, "split": "train", "id": str(number)}
        data += encoded
    (folder / "all.bin").write_bytes(data)
    (folder / table).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(name, output, **settings):
    settings = {"output": output, **settings}
    return load_recipe(name, [f"{key}={value}" for key, value in settings.items()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every recipe of sound, a few steps long, at a tiny size."""
    root = tmp_path_factory.mktemp("audio")
    phones = {"phones": ["pau", "ax", "pau"], "ends": [0.1, 0.5, 0.7]}
    voices = [{"voice": v, "text": "A.", **phones} for v in ("kathleen", "slt") * 4]
    speech = pack(root / "speech", "transcripts.jsonl", voices, 0.7)
    captions = [{"caption": f"a {w} bell", "label": w, "kind": "real"} for w in ("low", "high") * 4]
    sounds = pack(root / "sounds", "sounds.jsonl", captions, 0.5)
    codec = {f"model.{key}": value for key, value in CODEC.items()}
    loss = {
        "data.seconds": 0.4,
        "loss.windows": "[64, 128]",
        "loss.n_mels": 10,
        "discriminators.periods": "[2, 3]",
        "discriminators.period_channels": 2,
        "discriminators.resolutions": "[64]",
        "discriminators.resolution_channels": 2,
    }
    started = {"loss.quantize_start": 1, "loss.weights.gan": 1, "loss.gan_start": 2}
    codec_recipe = recipe(
        "voice-codec", root / "codec", **codec, **loss, **started, **SHORT, **{"data.root": speech}
    )
    train(codec_recipe)
    trained = {"codec": root / "codec" / "model", "data.root": speech}
    train(recipe("voice-decoder", root / "decoder", **loss, **SHORT, **trained))
    small = {"model.dim": 32, "model.heads": 2, "model.mlp_hidden": 32, "model.depth": 1}
    small |= {"data.offsets": 2, **SHORT}
    train(recipe("voice-generator", root / "generator", **small, **trained))
    train(recipe("sound-codec", root / "sound-codec", **SPECTRUM, **SHORT, **{"data.root": sounds}))
    trained = {"codec": root / "sound-codec" / "model", "data.root": sounds}
    train(recipe("sound-generator", root / "sound-generator", **small, **trained))
    return root


def test_the_codec_learns_with_and_without_discriminators(runs):
    rows = [json.loads(row) for row in (runs / "codec" / "log.jsonl").read_text().splitlines()]
    assert [("perplexity" in row, "gan" in row) for row in rows] == [
        (False, False),
        (True, False),
        (True, True),
        (True, True),
    ]
    assert (runs / "codec" / "samples" / "000004.png").is_file()


def test_a_codec_of_spectra_learns_before_and_after_it_is_quantized(runs):
    rows = (runs / "sound-codec" / "log.jsonl").read_text().splitlines()
    assert ["perplexity" in json.loads(row) for row in rows] == [False, False, True, True]
    assert (runs / "sound-codec" / "samples" / "000004.png").is_file()
    codec = AutoTokenizer.from_pretrained(runs / "sound-codec" / "model")
    assert codec.decode(codec.encode(tone(300, 0.5)[None])).shape == (1, 1, 2048)


def test_a_trained_decoder_keeps_the_tokens(runs):
    before, after = (
        WavTokenizer.from_pretrained(runs / name / "model") for name in ("codec", "decoder")
    )
    sound = tone(300, 1.0)[None]
    tokens = before.encode(sound)
    assert torch.equal(tokens, after.encode(sound))
    assert not torch.equal(before.decode(tokens), after.decode(tokens))


def test_a_codec_begins_with_another_one(runs, tmp_path):
    """`start` trains all of it: after a step of no length it is what it was."""
    settings = {
        "data.root": runs / "speech",
        "data.seconds": 0.4,
        "loss.windows": "[64, 128]",
        "loss.n_mels": 10,
        "loss.quantize_start": 100,
        **SHORT,
        "training.steps": 1,
        "training.ema": 0.0,
    }
    still = {"training.lr": 0.0, "training.min_lr": 0.0}
    start = runs / "codec" / "model"
    train(recipe("voice-codec", tmp_path / "same", start=start, **settings, **still))
    train(recipe("voice-codec", tmp_path / "moved", start=start, **settings))
    before, same, moved = (
        WavTokenizer.from_pretrained(folder / "model").state_dict()
        for folder in (runs / "codec", tmp_path / "same", tmp_path / "moved")
    )
    assert all(torch.equal(before[name], same[name]) for name in before)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], moved[name])}
    assert {"encoder", "backbone", "head"} <= changed
    tiny_tokenizer().save_pretrained(tmp_path / "pictures")
    other = recipe("voice-codec", tmp_path / "other", start=tmp_path / "pictures", **settings)
    with pytest.raises(InputError, match="a FlexTok: give the name or folder of a WavTokenizer"):
        train(other)
    both = recipe("voice-codec", tmp_path / "both", start=start, codec=start, **settings)
    with pytest.raises(InputError, match="set one of them to null"):
        train(both)


def test_the_parts_speak_and_sound(runs, tmp_path):
    parts = {"codec": runs / "decoder" / "model", "generator": runs / "generator" / "model"}
    train(recipe("voice", tmp_path / "voice", **parts))
    voice = TextToSpeechPipeline.from_pretrained(tmp_path / "voice")
    assert voice.voices == ["kathleen", "slt"]
    speech = voice("Hello.", seed=1)
    assert speech.audio.shape[-1] > 0 and bool(speech.audio.isfinite().all())
    spectra = {"codec": runs / "sound-codec" / "model"}
    with pytest.raises(InputError, match="needs a WavTokenizer as its codec, got SpectrumVQ"):
        train(recipe("voice", tmp_path / "voice", **parts | spectra))
    parts = spectra | {"generator": runs / "sound-generator" / "model"}
    train(recipe("sound", tmp_path / "sound", **parts))
    pipeline = TextToSoundPipeline.from_pretrained(tmp_path / "sound")
    assert list(pipeline.generator.config.words) == ["a", "bell", "high", "low"]
    assert pipeline("a low bell", seconds=0.2).sounds[0].shape[-1] > 0


def test_ids_of_like_codes_begin_alike_and_are_likely_to_be_repeated():
    torch.manual_seed(0)
    codebooks = ResidualVQ(2, 32, 8).codebooks
    for codebook in codebooks:
        codebook.embed.normal_()
        codebook.embed[1] = codebook.embed[0] + 0.01
    model = FrameTransformer(32, 64, 1, 2, 32, 16, 0.0, 0.0, num_codebooks=2).eval()
    ids_of_codes(model, codebooks)
    for rows in (*model.embedding.weight.split(34), *model.head.weight.split(32)):
        assert cosine_similarity(rows[0], rows[1], dim=0) > 0.99
        assert cosine_similarity(rows[0], rows[2], dim=0) < 0.9
    tokens = torch.stack([torch.arange(32), torch.randperm(32)], dim=1)
    with torch.no_grad():
        x = model.head(model.norm(model.embed(tokens))).unflatten(-1, (2, 32))
    assert float((x.argmax(-1) == tokens).float().mean()) > 0.7


def test_sounds_are_learnt_over_any_codec_with_ids(runs, tmp_path):
    small = {"model.dim": 32, "model.heads": 2, "model.mlp_hidden": 32, "model.depth": 1, **SHORT}
    small |= {"data.root": runs / "sounds", "data.offsets": 1}
    train(recipe("sound-generator", tmp_path / "a", codec=runs / "codec" / "model", **small))
    config = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    assert config["vocab_size"] == 32
    LogMel(RATE, n_mels=10, n_fft=128, hop=64).save_pretrained(tmp_path / "mel")
    with pytest.raises(InputError, match="a LogMel: a model of sounds needs"):
        train(recipe("sound-generator", tmp_path / "b", codec=tmp_path / "mel", **small))
    plain = {"codec": runs / "codec" / "model", "training.lr": 0.0, **small}
    train(recipe("sound-generator", tmp_path / "c", start="random", **plain))
    with pytest.raises(InputError, match='Unknown start "smooth": choose from codes, random'):
        train(recipe("sound-generator", tmp_path / "d", start="smooth", **plain))


def test_sounds_are_heard_in_several_keys_and_batched_by_length(runs, tmp_path):
    notes = ["C", "D", "E", "F", "G", "A", "B", "E flat"]
    rows = [{"caption": f"bell playing a {n} note", "label": n, "kind": "note"} for n in notes]
    keys = pack(tmp_path / "keys", "sounds.jsonl", rows, 0.5)
    options = {"codec": runs / "sound-codec" / "model", "data.root": keys, **SHORT}
    options |= {"data.semitones": 1, "data.offsets": 2, "data.caption_dropout": 0.0}
    task = TASKS["sound"](
        recipe("sound-generator", tmp_path / "run", **options), torch.device("cpu")
    )
    heard = [caption for caption, _ in task.readings[0]]
    wanted = ["B", "B", "C", "C", "C sharp", "C sharp"]
    assert heard == [f"bell playing a {note} note" for note in wanted]
    low, same, high = (tokens.shape for _, tokens in task.readings[0][::2])
    assert low[0] == same[0] == high[0] == 4 and low[1] > same[1] > high[1]
    # Eight batches of one sound are an epoch, from short to long.
    task.readings = [[(str(i), readings[0][1])] for i, readings in enumerate(task.readings)]
    task.lengths = torch.tensor([5, 3, 8, 1, 7, 2, 6, 4])
    for epoch in range(2):
        batches = [
            task.batch(8 * epoch + i, 1, torch.Generator(), slice(0, 1))["captions"][0]
            for i in range(8)
        ]
        assert batches == [str(int(i)) for i in task.lengths.argsort()]


def test_a_codec_is_no_generator(runs, tmp_path):
    folder = runs / "codec" / "model"
    with pytest.raises(InputError, match="holds a WavTokenizer"):
        train(recipe("voice", tmp_path / "voice", codec=folder, generator=folder))
