"""Lyrics to songs over tiny random models: the pipeline, its parts, and ``tessera song``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as TextTokenizer
from tokenizers import models, pre_tokenizers, processors
from typer.testing import CliRunner

from tessera.app.commands import cli
from tessera.generators.autoregressive.songgen import SongGen, encode_voice
from tessera.generators.conditioning.mert import VoiceMERT
from tessera.generators.conditioning.t5 import TextT5
from tessera.modalities.audio import load_audio, read_record, save_audio
from tessera.modalities.errors import InputError
from tessera.pipelines import text_to_song
from tessera.pipelines.text_to_song import TextToSongPipeline
from tessera.tokenizers.audio.transformers_codecs import XcodecTokenizer
from tessera.weights import registry

transformers = pytest.importorskip("transformers", reason="runs the codec")

LYRICS, DESCRIPTION = "Morning light\nover the hill", "a calm song"
HUBERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_stride": [20, 20],
    "conv_kernel": [20, 20],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SMALL = {"dim": 16, "depth": 1, "heads": 2, "mlp_hidden": 32, "max_positions": 160}
SMALL |= {"lyrics_dim": 16, "lyrics_depth": 1, "lyrics_heads": 2, "lyrics_hidden": 16}
CODES = {"num_codebooks": 2, "codebook_size": 64, "text_dim": 16, "lyrics_vocab": 300}


def tiny_codec() -> XcodecTokenizer:
    """50 frames of 20 samples a second."""
    acoustic = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "hidden_size": 16}
    acoustic |= {"downsampling_ratios": [5, 4], "upsampling_ratios": [5, 4], "model_type": "dac"}
    acoustic |= {"n_codebooks": 4, "codebook_size": 32, "codebook_dim": 4, "sampling_rate": 1000}
    semantic = {**HUBERT, "model_type": "hubert", "conv_stride": [4, 5], "conv_kernel": [8, 5]}
    config = {"model_type": "xcodec", "sample_rate": 1000, "target_bandwidths": [0.3, 1.2]}
    config |= {"codebook_size": 64, "acoustic_model_config": acoustic}
    codec = XcodecTokenizer({**config, "semantic_model_config": semantic}, 2)
    for name, table in codec.named_buffers():
        if name.endswith(".embed"):
            torch.nn.init.normal_(table)
    return codec.eval()


def word_tokenizer(*words: str) -> TextTokenizer:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = TextTokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def tiny_generator(pattern: str = "mixed_pro") -> SongGen:
    generator = SongGen(pattern, **SMALL, **CODES, voice_layers=2, voice_dim=16, dropout=0.0)
    with torch.no_grad():
        # Conditions count, and a channel that is constant makes ids that are no codes unlikely.
        generator.blocks[0].cross_proj.weight.mul_(20)
        generator.head.weight.mul_(8)
        generator.norm.weight[0], generator.norm.bias[0] = 0.0, 1.0
        generator.head.weight.view(generator.rows, -1, 16)[:, 64:, 0] = -40.0
    return generator.eval()


def tiny_song(pattern: str = "mixed_pro", voice: bool = True) -> TextToSongPipeline:
    torch.manual_seed(0)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    tower = TextT5({"vocab_size": 8, **small}, 6)
    tower.texts = word_tokenizer("a", "calm", "song")
    tower.texts.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    ear = VoiceMERT(HUBERT).eval() if voice else None
    lyrics = word_tokenizer("morning", "light", "over", "the", "hill")
    pipe = TextToSongPipeline(tiny_codec(), tiny_generator(pattern), tower.eval(), ear, lyrics)
    pipe.name = "tiny"
    return pipe


@pytest.fixture(scope="module")
def mixed():
    return tiny_song()


@pytest.fixture(scope="module")
def dual():
    return tiny_song("interleaving_A_V", voice=False)


def voice(seconds: float = 0.5, rate: int = 8000):
    return torch.sin(torch.arange(int(seconds * rate)) / 9)[None], rate


@pytest.mark.parametrize("name", ["mixed", "dual"])
def test_a_song_is_the_sum_of_its_tracks(name, request):
    pipe, steps = request.getfixturevalue(name), []
    song = pipe(LYRICS, DESCRIPTION, seconds=0.6, seed=3, callback=lambda *step: steps.append(step))
    assert song.seed == 3 and song.sample_rate == 1000
    assert set(song.tracks) == set(pipe.tracks) and len(pipe.tracks) == (
        1 if name == "mixed" else 2
    )
    assert all(tokens.shape == (2, 30) for tokens in song.tokens.values())
    assert song.audio.shape == (1, 600) and song.audio.abs().max() <= 1
    torch.testing.assert_close(song.audio, sum(song.tracks.values()))
    assert song.audio.std() > 0
    assert [step for step, _ in steps] == sorted(step for step, _ in steps)
    assert steps[-1][0] == steps[-1][1]


def test_seed_lyrics_description_and_voice_all_count(mixed):
    settings = {"lyrics": LYRICS, "description": DESCRIPTION, "seconds": 0.4, "seed": 1}
    tokens = mixed(**settings).tokens["mixed"]
    assert torch.equal(mixed(**settings).tokens["mixed"], tokens)
    others = [{"seed": 2}, {"lyrics": "The hill"}, {"description": "a song"}, {"voice": voice()}]
    for other in others:
        assert not torch.equal(mixed(**settings | other).tokens["mixed"], tokens), other


def test_a_song_can_be_stopped(mixed):
    stream = mixed.stream(LYRICS, DESCRIPTION, seconds=0.6, seed=3)
    first = next(stream)
    stream.close()
    assert first.output is None and first.step < first.total

    def stop(step, total):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mixed(LYRICS, DESCRIPTION, seconds=0.6, callback=stop)


def test_loud_tracks_are_scaled_together(dual, monkeypatch):
    decode = type(dual.codec).decode
    monkeypatch.setattr(type(dual.codec), "decode", lambda self, codes: 1e4 * decode(self, codes))
    audio, tracks = dual.decode_tokens(
        {"vocal": torch.ones(2, 9).long(), "accompaniment": torch.zeros(2, 7).long()}
    )
    assert audio.shape == (1, 140) and set(tracks) == {"vocal", "accompaniment"}
    assert max(each.abs().max() for each in (audio, *tracks.values())) == pytest.approx(1)
    torch.testing.assert_close(audio, sum(tracks.values()))


def test_bad_input_has_a_clear_outcome(mixed, dual):
    def refused(match, lyrics=LYRICS, description=DESCRIPTION, pipe=mixed, **options):
        with pytest.raises(InputError, match=match):
            pipe(lyrics, description, **{"seconds": 0.4, "seed": 1} | options)

    refused("no English word", lyrics="... !")
    refused("at most 2,000", lyrics="la " * 1000)
    refused("prompt is empty", description=" ")
    refused("has 8 tokens; this model reads 6", description="a a a a a a a")
    refused("takes 0.04 to 3.16 seconds, got 9", seconds=9)
    refused("Seed must be", seed=-1)
    refused("silent", voice=(torch.zeros(1, 800), 8000))
    refused("not finite", voice=(torch.full((1, 800), torch.nan), 8000))
    refused("without the network that hears", pipe=dual, voice=voice())
    refused("project_text is", project_text="never")


def test_an_empty_song_is_an_error(mixed, monkeypatch):
    monkeypatch.setattr(
        mixed.generator, "codes", lambda sequence: [{"mixed": torch.zeros(2, 0).long()}]
    )
    with pytest.raises(InputError, match="seed 4 this model ended at once"):
        mixed(LYRICS, DESCRIPTION, seconds=0.4, seed=4)


def test_parts_must_fit(mixed):
    parts = {**mixed.components, "lyrics_tokenizer": mixed.lyrics_tokenizer}
    small = {**SMALL, **CODES, "voice_layers": 2, "voice_dim": 16}
    for change, match in (
        ({"num_codebooks": 4}, "codebooks, ids"),
        ({"text_dim": 8}, "width 8, the text tower makes 16"),
        ({"voice_layers": 3}, r"\(3, 16\) of the one, \(2, 16\)"),
        ({"lyrics_vocab": 4}, "8 ids, the generator reads 4"),
    ):
        with pytest.raises(InputError, match=match):
            TextToSongPipeline(**{**parts, "generator": SongGen(**small | change)})
    with pytest.raises(InputError, match="tokenizer of its lyrics"):
        TextToSongPipeline(**{**parts, "lyrics_tokenizer": None})


@pytest.mark.parametrize("name", ["mixed", "dual"])
def test_a_pipeline_is_saved_and_loaded(name, request, tmp_path):
    pipe = request.getfixturevalue(name)
    pipe.save_pretrained(tmp_path)
    again = TextToSongPipeline.from_pretrained(tmp_path)
    given = {} if name == "dual" else {"voice": voice()}
    songs = [each(LYRICS, DESCRIPTION, seconds=0.4, seed=1, **given) for each in (pipe, again)]
    assert torch.equal(songs[0].audio, songs[1].audio)
    (tmp_path / text_to_song.LYRICS_FILE).unlink()
    with pytest.raises(InputError, match=r"lyrics_tokenizer\.json is missing"):
        TextToSongPipeline.from_pretrained(tmp_path)


def test_published_parts_are_put_together(mixed, monkeypatch, tmp_path):
    """The generator's converter and the hub are left out here."""
    mert = transformers.HubertModel(transformers.HubertConfig(**HUBERT)).eval()
    old = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    state = {}
    for name, value in mert.state_dict().items():
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        state[f"mert_model.{name}"] = value
    assert "mert_model.encoder.pos_conv_embed.conv.weight_g" in state
    save_file(state, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "mert_model", "auto_map": {}, **HUBERT}))
    mixed.lyrics_tokenizer.save(str(tmp_path / "vocab.json"))

    def find_files(info, folder=None):
        return (
            [config]
            if info.files == (text_to_song.MERT_CONFIG,)
            else [Path(folder) / name.rpartition(":")[2] for name in info.files]
        )

    monkeypatch.setattr(text_to_song, "find_files", find_files)
    monkeypatch.setattr(text_to_song, "load_published", lambda info, paths: mixed.generator)
    asked = []
    load = {"codec": text_to_song.AutoTokenizer, "text_tower": TextT5}
    monkeypatch.setattr(
        load["codec"], "from_pretrained", lambda name: asked.append(name) or mixed.codec
    )
    monkeypatch.setattr(TextT5, "from_hub", lambda name: asked.append(name) or mixed.text_tower)
    with pytest.warns(UserWarning, match="not for commercial use"):
        pipe = TextToSongPipeline.from_pretrained("songgen-mixed-pro", files=tmp_path, voice=True)
    assert asked == ["xcodec-hubert-general-balanced", "google/flan-t5-large"]
    audio = torch.randn(1, 1, 9000, generator=torch.Generator().manual_seed(0))
    states, wanted = (encode_voice(audio, ear)[0] for ear in (pipe.voice_tower, mert))
    torch.testing.assert_close(states, wanted)
    assert pipe.name == "songgen-mixed-pro"
    assert pipe(LYRICS, DESCRIPTION, voice(), seconds=0.4).audio.shape == (1, 400)
    with pytest.raises(InputError, match="not text-to-song"):
        TextToSongPipeline.from_pretrained("mimi")


# --- tessera song ---


@pytest.fixture
def workplace(mixed, dual, tmp_path, monkeypatch):
    """An empty current folder; "solo" and "duo" are shipped models."""
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "shipped"
    for name, pipe in (("solo", mixed), ("duo", dual)):
        pipe.save_pretrained(shipped / name)
        row = {"title": "Tiny", "task": "text-to-song", "license_weights": "CC0-1.0"}
        row |= {"model": "pipelines.text_to_song:TextToSongPipeline"}
        (shipped / name / "tessera.json").write_text(json.dumps(row))
    monkeypatch.setattr(registry, "SHIPPED", shipped)
    registry._models.cache_clear()
    yield tmp_path
    registry._models.cache_clear()


def tessera(*arguments, code=0, text=None):
    result = CliRunner().invoke(cli, [str(each) for each in arguments], input=text)
    assert result.exit_code == code, (result.output, result.exception)
    if code == 2:
        assert result.stderr.splitlines()[-1].startswith("Error: ")
    return result


def test_song(workplace, mixed):
    options = ("-d", DESCRIPTION, "--model", "solo", "--seconds", 0.4, "--seed", 5)
    result = tessera("song", LYRICS, *options, "-o", "a.wav")
    assert result.stdout == "a.wav\n"
    audio, rate = load_audio("a.wav")
    wanted = mixed(LYRICS, DESCRIPTION, seconds=0.4, seed=5)
    assert rate == 1000 and torch.allclose(audio, wanted.audio, atol=1e-4)
    record = read_record("a.wav")
    assert record["prompt"] == LYRICS.replace("\n", "\u2028") and record["seed"] == 5
    assert record["settings"]["description"] == DESCRIPTION
    assert record["pipeline"] == "TextToSongPipeline" and len(record["sha256"]) == 64
    assert "identical" in tessera("info", "a.wav", "--rerun").stdout

    Path("words.txt").write_text(LYRICS)
    more = ("--file", "words.txt", "-n", 2, "-o", "out/", "--json", "--no-metadata")
    shown = json.loads(tessera("song", *options, *more).stdout)["songs"]
    assert [each["seed"] for each in shown] == [5, 6]
    assert torch.equal(load_audio(shown[0]["path"])[0], audio)
    assert not torch.equal(load_audio(shown[1]["path"])[0], audio)
    assert read_record(shown[0]["path"]) is None


def test_song_of_a_voice_and_of_two_tracks(workplace):
    save_audio(*voice(), "voice.wav")
    options = ("-d", DESCRIPTION, "--seconds", 0.4, "--seed", 5)
    solo = ("song", LYRICS, *options, "--model", "solo")
    tessera(*solo, "--voice", "voice.wav", "-o", "a.wav")
    tessera(*solo, "-o", "b.wav")
    assert not torch.equal(load_audio("a.wav")[0], load_audio("b.wav")[0])
    assert "by a voice that it does not hold" in tessera("info", "a.wav", "--rerun", code=2).stderr

    duo = ("song", LYRICS, *options, "--model", "duo", "-o", "c.flac")
    tessera(*duo, "--tracks")
    tracks = [load_audio(f"c.{name}.flac")[0] for name in ("vocal", "accompaniment")]
    torch.testing.assert_close(sum(tracks), load_audio("c.flac")[0], atol=1e-4, rtol=0)
    assert "exists already" in tessera(*duo, code=2).stderr
    assert "writes one track" in tessera(*solo, "-o", "d.wav", "--tracks", code=2).stderr


def test_bad_arguments_of_song(workplace):
    solo = ("--model", "solo", "-o", "a.wav")
    assert "prompt is empty" in tessera("song", LYRICS, *solo, code=2).stderr
    assert "Give a text" in tessera("song", "-d", "a song", *solo, code=2).stderr
    song = ("song", LYRICS, "-d", "a song")
    assert "no English word" in tessera("song", "-", "-d", "a song", *solo, code=2, text="!").stderr
    assert "voice.wav" in tessera(*song, *solo, "--voice", "voice.wav", code=2).stderr
    assert "give a folder" in tessera(*song, *solo, "-n", 2, code=2).stderr
    assert "must end in" in tessera(*song, "-o", "a.png", code=2).stderr
    assert not Path("a.wav").exists()
