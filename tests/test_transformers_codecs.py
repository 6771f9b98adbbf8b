from __future__ import annotations

import math
import sys

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.tokenizers.audio.streaming import stream_decoder, stream_encoder

pytest.importorskip("transformers")

from tessera.tokenizers.audio import transformers_codecs as codecs

SMALL_TRANSFORMER = {
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "sliding_window": 6,
}
TINY_MIMI = {
    "hidden_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "upsample_groups": 16,
    "sampling_rate": 1600,
    **SMALL_TRANSFORMER,
}
TINY_DAC = {
    "encoder_hidden_size": 4,
    "decoder_hidden_size": 16,
    "hidden_size": 16,
    "downsampling_ratios": [2, 5],
    "upsampling_ratios": [5, 2],
    "n_codebooks": 4,
    "codebook_size": 32,
    "codebook_dim": 4,
    "sampling_rate": 1000,
}
TINY_HUBERT = {
    "model_type": "hubert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_stride": [4, 5],
    "conv_kernel": [8, 5],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
TINY = {
    "encodec": (
        codecs.EncodecTokenizer,
        {
            "num_filters": 4,
            "hidden_size": 8,
            "upsampling_ratios": [5, 2],
            "codebook_size": 64,
            "sampling_rate": 1000,
            "target_bandwidths": [0.6, 2.4],
            "num_lstm_layers": 1,
        },
        3,
    ),
    "encodec_acausal": (
        codecs.EncodecTokenizer,
        {
            "num_filters": 4,
            "hidden_size": 8,
            "upsampling_ratios": [5, 2],
            "codebook_size": 64,
            "sampling_rate": 1000,
            "target_bandwidths": [2.4],
            "num_lstm_layers": 1,
            "use_causal_conv": False,
        },
        None,
    ),
    "dac": (codecs.DacTokenizer, TINY_DAC, 2),
    "mimi": (
        codecs.MimiTokenizer,
        {
            **TINY_MIMI,
            "codebook_size": 32,
            "codebook_dim": 8,
            "vector_quantization_hidden_dimension": 8,
            "num_quantizers": 4,
        },
        3,
    ),
    "pocket_tts": (
        codecs.PocketTTSTokenizer,
        {**TINY_MIMI, "latent_dim": 6, "latent_stride": 4},
        None,
    ),
    "xcodec": (
        codecs.XcodecTokenizer,
        {
            "sample_rate": 1000,
            "target_bandwidths": [0.3, 1.2],
            "codebook_size": 64,
            "acoustic_model_config": {
                **TINY_DAC,
                "model_type": "dac",
                "downsampling_ratios": [5, 4],
                "upsampling_ratios": [5, 4],
            },
            "semantic_model_config": TINY_HUBERT,
        },
        2,
    ),
    "xcodec2": (
        codecs.Xcodec2Tokenizer,
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "encoder_hidden_size": 4,
            "quantization_dim": 48,
            "quantization_levels": [4, 4, 4],
            "semantic_model_config": {
                "model_type": "wav2vec2-bert",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
            },
        },
        None,
    ),
    "vibevoice": (
        codecs.VibeVoiceTokenizer,
        {
            "hidden_size": 6,
            "num_filters": 4,
            "downsampling_ratios": [2, 5],
            "depths": [1, 1, 1],
            "layer_scale_init_value": 0.5,
            "initializer_range": 0.3,
        },
        None,
    ),
}  # fmt: skip
STREAMING = ("encodec", "mimi", "pocket_tts", "vibevoice")


def build(name):
    kind, config, num_codebooks = TINY[name]
    torch.manual_seed(0)
    codec = kind({"model_type": kind.model_type, **config}, num_codebooks).eval()
    if name == "xcodec2":
        codec.codec.quantizer.project_in.weight.data *= 1e4
    # Fresh codebooks are all zeros: spread them over what comes in.
    generator = torch.Generator().manual_seed(1)
    middle, spread = torch.zeros(()), torch.ones(())
    if name.startswith("encodec"):
        latents = codec.codec.encoder(noise(50 * codec.hop)).detach()
        middle, spread = latents.mean((0, 2)), latents.std((0, 2))
    for key, value in codec.named_buffers():
        if key.endswith(("embed", "embed_sum")):
            value.copy_(middle + spread * torch.randn(value.shape, generator=generator))
            middle = torch.zeros(())  # Later codebooks quantize what is left.
    return codec


class Tokenizers(dict):
    def __missing__(self, name):
        self[name] = build(name)
        return self[name]


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizers()


def noise(samples, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 1, samples, generator=generator) * 1.6 - 0.8


@pytest.mark.parametrize("name", TINY)
def test_frames_are_exact(tokenizers, name):
    codec = tokenizers[name]
    hop = codec.hop
    for samples in (1, hop - 1, hop, hop + 1, 7 * hop + 3):
        tokens = codec.encode(noise(samples))
        frames = codec.num_frames(samples)
        if name != "xcodec2":
            assert frames == math.ceil(samples / hop)
        if codec.vocab_size is None:
            assert tokens.shape == (2, frames, codec.latent_dim) and tokens.isfinite().all()
        else:
            assert tokens.shape == (2, codec.num_codebooks, frames)
            assert tokens.dtype == torch.long
            assert tokens.min() >= 0 and tokens.max() < codec.vocab_size
        sound = codec.decode(tokens)
        assert sound.shape == (2, 1, frames * hop) and sound.isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_batches_are_made_of_single_items(tokenizers, name):
    codec = tokenizers[name]
    audio = noise(6 * codec.hop + 1, batch=3)
    tokens = codec.encode(audio)
    assert torch.equal(codec.encode(audio), tokens)
    for i in range(3):
        assert torch.allclose(
            codec.encode(audio[i : i + 1]).float(), tokens[i : i + 1].float(), atol=1e-5
        )
        alone = codec.decode(tokens[i : i + 1])
        assert torch.allclose(alone, codec.decode(tokens)[i : i + 1], atol=1e-5)
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("pieces", [1, 3], ids=lambda n: f"pieces{n}")
def test_streams_give_what_the_whole_gives(tokenizers, name, pieces):
    codec = tokenizers[name]
    audio = noise(20 * codec.hop + 3)
    whole = codec.encode(audio)
    encoder, parts = stream_encoder(codec), []
    assert not encoder.approximate
    step = math.ceil(audio.shape[-1] / (4 * pieces)) + 1
    for start in range(0, audio.shape[-1], step):
        parts.append(encoder.push(audio[..., start : start + step]))
    parts.append(encoder.flush())
    axis = 1 if codec.vocab_size is None else 2
    assert sum(part.shape[axis] > 0 for part in parts) > 1
    tokens = torch.cat(parts, axis)
    assert tokens.shape == whole.shape
    if codec.vocab_size is None:
        assert torch.allclose(tokens, whole, atol=1e-5)
    else:
        assert torch.equal(tokens, whole)

    sound = codec.decode(whole)
    decoder, parts = stream_decoder(codec), []
    for piece in whole.split(pieces, axis):
        parts.append(decoder.push(piece))
    parts.append(decoder.flush())
    assert sum(part.shape[-1] > 0 for part in parts) > 1
    assert torch.allclose(torch.cat(parts, -1), sound, atol=1e-5)


def test_a_stream_shorter_than_it_needs(tokenizers):
    for name in STREAMING:
        codec = tokenizers[name]
        audio = noise(codec.hop // 2, batch=1)
        encoder = stream_encoder(codec)
        axis = 1 if codec.vocab_size is None else 2
        assert encoder.push(audio).shape[axis] == 0
        assert torch.allclose(encoder.flush().float(), codec.encode(audio).float(), atol=1e-5)


def test_other_codecs_stream_approximately(tokenizers):
    codec = tokenizers["dac"]
    audio = noise(50 * codec.hop + 3)
    encoder = stream_encoder(codec, window=0.2, overlap=0.05)
    assert encoder.approximate
    parts = [encoder.push(piece) for piece in audio.split(37, -1)] + [encoder.flush()]
    tokens = torch.cat(parts, -1)
    whole = codec.encode(audio)
    assert tokens.shape == whole.shape
    assert (tokens == whole).float().mean() > 0.9

    decoder = stream_decoder(codec, window=0.2, overlap=0.05)
    assert decoder.approximate
    parts = [decoder.push(piece) for piece in whole.split(3, -1)] + [decoder.flush()]
    sound = torch.cat(parts, -1)
    exact = codec.decode(whole)
    assert sound.shape == exact.shape
    assert (sound - exact).square().mean() < 0.05 * exact.square().mean()
    # One window holds it all.
    decoder = stream_decoder(codec, window=10.0, overlap=1.0)
    assert decoder.push(whole).shape[-1] == 0
    assert torch.allclose(decoder.flush(), exact, atol=1e-6)
    with pytest.raises(InputError, match="overlap"):
        stream_decoder(codec, window=0.5, overlap=0.5)


@pytest.mark.parametrize("name", TINY)
def test_saved_and_loaded(tokenizers, name, tmp_path):
    codec = tokenizers[name]
    codec.save_pretrained(tmp_path)
    loaded = type(codec).from_pretrained(tmp_path).eval()
    audio = noise(5 * codec.hop)
    tokens = codec.encode(audio)
    assert torch.allclose(loaded.encode(audio).float(), tokens.float(), atol=1e-6)
    assert torch.allclose(loaded.decode(tokens), codec.decode(tokens), atol=1e-6)
    assert not [key for key in codec.state_dict() if "parametrizations" in key]


@pytest.mark.parametrize("name", TINY)
def test_published_weights_load(tokenizers, name, tmp_path):
    """What transformers saves is what its hub repositories hold: weight norm, flat names."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    from tessera.weights.convert.transformers_codecs import convert_state_dict, read_config
    from tessera.weights.loading import load_strict, read_json

    kind, config, _ = TINY[name]
    torch.manual_seed(3)
    published = AutoModel.from_config(AutoConfig.for_model(kind.model_type, **config)).eval()
    published.save_pretrained(tmp_path)
    options = read_config(read_json(tmp_path / "config.json"))
    state = convert_state_dict(load_file(tmp_path / "model.safetensors"), options)
    codec = kind(**options).eval()
    load_strict(codec, state)
    audio = noise(8 * codec.hop, batch=1)
    inputs = {"input_values": audio}
    if name == "xcodec2":
        inputs = codec.features(audio[0, 0].numpy(), sampling_rate=16_000, return_tensors="pt")
        inputs = {key: inputs[key] for key in ("input_values", "input_features")}
    elif name == "vibevoice":
        inputs["sample"] = False
    theirs = published.encode(**inputs)
    if codec.vocab_size is None:
        assert torch.allclose(codec.encode(audio), theirs.latents, atol=1e-5)
        sound = published.decode(theirs.latents)
        sound = sound.audio if name == "vibevoice" else sound.audio_values
    else:
        codes = theirs.audio_codes
        codes = codes[0] if name.startswith("encodec") else codes
        assert torch.equal(codec.encode(audio)[:, : codes.shape[1]], codes)
        if name.startswith("encodec"):
            sound = published.decode(theirs.audio_codes, theirs.audio_scales).audio_values
        else:
            sound = published.decode(audio_codes=codes).audio_values
        codec.num_codebooks = codes.shape[1]
    ours = codec.decode(codes if codec.vocab_size else theirs.latents)
    theirs = sound.reshape(1, 1, -1)
    assert torch.allclose(ours[..., : theirs.shape[-1]], theirs, atol=1e-5)

    with pytest.raises(InputError, match="nonsense"):
        convert_state_dict({"nonsense.weight": torch.zeros(1)}, options)


def test_every_registered_codec_has_its_class():
    from tessera.weights.registry import list_models, model_info

    names = [
        n
        for n in list_models(task="audio-tokenizer")
        if model_info(n).system == "transformers_codecs"
    ]
    assert {"encodec-24khz", "dac-44khz", "mimi", "xcodec-hubert-general", "xcodec2"} <= set(names)
    for name in names:
        info = model_info(name)
        assert info.config["codec_config"] == {"model_type": info.model_class().model_type}
        assert info.files == ("model.safetensors", "config.json") and info.license_weights


def test_mimi_changes_its_precision_with_its_codebooks():
    codec = build("mimi")
    audio = noise(6 * codec.hop)
    tokens = codec.encode(audio)
    codec.to(torch.float64)
    assert torch.equal(codec.encode(audio), tokens)
    assert codec.decode(tokens).dtype == torch.float64


def test_bad_input(tokenizers):
    mimi, dac = tokenizers["mimi"], tokenizers["dac"]
    for audio, reason in (
        (torch.zeros(1, 1, 0), "no samples"),
        (torch.zeros(1, 2, 99), "one channel"),
        (torch.full((1, 1, 99), math.nan), "NaN"),
        (torch.zeros(1, 1, 99, dtype=torch.long), "float"),
    ):
        with pytest.raises(InputError, match=reason):
            mimi.encode(audio)
    with pytest.raises(InputError, match="0 to 31"):
        mimi.decode(torch.full((1, 3, 2), 32))
    with pytest.raises(InputError, match="3, frames"):
        mimi.decode(torch.zeros(1, 2, 5, dtype=torch.long))
    with pytest.raises(InputError, match="latents"):
        tokenizers["vibevoice"].decode(torch.zeros(1, 5, 9))
    with pytest.raises(InputError, match="1 to 4 codebooks"):
        codecs.DacTokenizer({"model_type": "dac", **TINY_DAC}, 5)
    with pytest.raises(InputError, match='of "dac", not of "mimi"'):
        codecs.MimiTokenizer({"model_type": "dac"})
    with pytest.raises(InputError, match="loudness"):
        codecs.EncodecTokenizer(
            {"model_type": "encodec", "num_filters": 2, "hidden_size": 4, "normalize": True}
        )
    assert dac.bitrate == pytest.approx(100 * 2 * 5)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="transformers, which is not installed"):
        codecs.MimiTokenizer()
