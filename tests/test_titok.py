"""TiTok, TA-TiTok and MaskGIT's VQGAN: batches, precision, gradients, saving, what is refused."""

from __future__ import annotations

import json
import re
from functools import cache

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tessera.modalities.errors import InputError
from tessera.tokenizers.auto import AutoTokenizer
from tessera.tokenizers.base import Tokenizer
from tessera.tokenizers.image.maskgit_vqgan import MaskGITVQGAN
from tessera.tokenizers.image.tatitok import TATiTok, embed_text
from tessera.tokenizers.image.titok import Block, TiTok
from tessera.weights.convert import enat_vqgan, maskgit_vqgan, tatitok, titok
from tessera.weights.loading import load_strict

SIZE = 32
VIT = {"encoder_dim": 32, "encoder_depth": 2, "encoder_heads": 4}
VIT |= {"decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 4}
SHARED = {"image_size": SIZE, "patch_size": 8, "num_latent_tokens": 5, **VIT}
VQ = {"codebook_size": 40, "token_size": 6, "use_l2_norm": False}
VAE = {"quantize_mode": "vae", "token_size": 6}
PIXELS = {"channel_mult": [1, 1, 2, 1], "hidden_channels": 32, "num_res_blocks": 1}
PIXELS |= {"z_channels": 8, "codebook_size": 24}
TEXT = {"text_context_length": 7, "text_embed_dim": 12}
KINDS = {
    "two-stage": (TiTok, SHARED | VQ | {"use_l2_norm": True, "pixel_decoder": PIXELS}),
    "vq": (TiTok, SHARED | VQ | {"two_stage": False}),
    "vae": (TiTok, SHARED | VAE | {"two_stage": False}),
    "text-vq": (TATiTok, SHARED | VQ | TEXT),
    "text-vae": (TATiTok, SHARED | VAE | TEXT),
    "vqgan": (MaskGITVQGAN, {"image_size": SIZE, **PIXELS}),
}


@cache
def model_of(kind: str) -> Tokenizer:
    """Random weights, large enough that every one of them matters."""
    torch.manual_seed(0)
    cls, config = KINDS[kind]
    model = cls(**config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            std = 0.5 if "embedding" in name else (2 / fan_in) ** 0.5
            # Sharp attention to strong patches, so that the pictures show in the tokens.
            gain = 4 if "patch_embed" in name else 2 if "encoder" in name and "qkv" in name else 1
            torch.nn.init.normal_(parameter, std=gain * std)
    return model.eval()


def pictures(count: int = 3) -> torch.Tensor:
    """Coarse squares of colour, so that the pictures differ."""
    colours = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return colours.repeat_interleave(SIZE // 4, 2).repeat_interleave(SIZE // 4, 3)


def texts(model: Tokenizer, count: int = 3) -> tuple[torch.Tensor, ...]:
    """The further arguments of ``decode``."""
    if not isinstance(model, TATiTok):
        return ()
    return (torch.randn(count, 7, 12, generator=torch.Generator().manual_seed(2)),)


@pytest.fixture(params=KINDS)
def model(request) -> Tokenizer:
    return model_of(request.param)


def test_shapes(model):
    tokens = model.encode(pictures())
    if model.vocab_size is None:
        assert tokens.shape == (3, 5, model.latent_dim) and tokens.dtype == torch.float32
    else:
        assert tokens.shape == (3, model.num_tokens) and tokens.dtype == torch.int64
        assert model.latent_dim is None and tokens.unique().numel() > 3
    assert model.decode(tokens, *texts(model)).shape == (3, 3, SIZE, SIZE)
    assert model.num_tokens == (16 if isinstance(model, MaskGITVQGAN) else 5)


def test_batch_equals_one_by_one(model):
    tokens, text = model.encode(pictures()), texts(model)
    decoded = model.decode(tokens, *text)
    for i in range(3):
        alone = model.encode(pictures()[i : i + 1])
        if model.vocab_size is None:
            assert torch.allclose(alone[0], tokens[i], atol=1e-5)
        else:
            assert torch.equal(alone[0], tokens[i])
        again = model.decode(tokens[i : i + 1], *(t[i : i + 1] for t in text))
        assert torch.allclose(again[0], decoded[i], atol=1e-4)


def test_bf16_agrees_with_float32(model, tmp_path):
    """Within 6% of the spread, on what the quantizer reads and on pictures."""
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16

    def latents(m):
        if isinstance(m, MaskGITVQGAN):
            return m.encoder((pictures().to(m.dtype) + 1) / 2)
        return m.encode_latents(pictures())

    tokens, text = model.encode(pictures()), texts(model)
    with torch.no_grad():
        pairs = [(latents(m), m.decode(tokens, *text)) for m in (model, half)]
    for full, rounded in zip(*pairs, strict=True):
        assert rounded.dtype == torch.bfloat16
        error = (full - rounded.float()).square().mean().sqrt()
        assert 0 < error < 0.06 * full.std()


def test_saved_and_loaded_is_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    tokens, text = model.encode(pictures()), texts(model)
    assert type(again) is type(model)
    assert torch.equal(again.encode(pictures()), tokens)
    assert torch.equal(again.decode(tokens, *text), model.decode(tokens, *text))


def without_gradient(model) -> list[str]:
    names = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    return names


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vqgan"])
def test_training_moves_every_weight(kind):
    model = model_of(kind)
    noise = torch.randn(3, 5, 6) if model.vocab_size is None else None
    decoded, loss, parts = model(pictures(), *texts(model), noise=noise)
    (decoded.square().mean() + loss).backward()
    assert without_gradient(model) == []
    assert set(parts) == ({"kl"} if noise is not None else {"vq", "perplexity", "codebook_usage"})


def test_gradients_reach_every_weight_of_the_vqgan():
    model = model_of("vqgan")
    codes, _, loss = model.quantizer(model.encoder(pictures()).permute(0, 2, 3, 1))
    (model.decoder(codes.permute(0, 3, 1, 2)).square().mean() + loss).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("kind", ["two-stage", "vq", "vae"])
def test_reconstruction_in_training_is_encode_and_decode(kind):
    model = model_of(kind)
    with torch.no_grad():
        decoded, _, _ = model(pictures())
    assert torch.allclose(decoded, model.decode(model.encode(pictures())), atol=1e-3)


@pytest.mark.parametrize("rows", [slice(None), slice(-4, None), slice(1, 7)])
def test_a_block_computes_only_the_rows_asked_for(rows):
    torch.manual_seed(0)
    block, x = Block(32, 4), torch.randn(2, 12, 32)
    assert torch.allclose(block(x, rows), block(x)[:, rows], atol=1e-6)


def test_posterior():
    model, noise = model_of("vae"), torch.randn(3, 5, 6)
    with torch.no_grad():
        posterior = model.posterior(pictures())
    assert posterior.parameters.shape == (3, 12, 1, 5)
    mean, std = (x[:, :, 0].transpose(1, 2) for x in (posterior.mean, posterior.std))
    assert torch.equal(model.encode(pictures()), mean)
    assert torch.equal(model.encode(pictures(), noise=noise), mean + std * noise)
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum((1, 2)).mean()
    assert torch.allclose(model(pictures())[1], kl, rtol=1e-4)
    with pytest.raises(InputError, match="discrete and has no posterior"):
        model_of("vq").posterior(pictures())


def test_text_changes_the_picture_but_not_the_tokens():
    model = model_of("text-vq")
    (text,) = texts(model)
    tokens = model.encode(pictures())
    other = model.decode(tokens, text.flip(0))
    assert (other - model.decode(tokens, text)).abs().max() > 0.01


def test_text_embeddings_are_all_positions_of_the_tower():
    torch.manual_seed(0)
    text_cfg = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2}
    clip = open_clip.CLIP(8, {"image_size": 32, "patch_size": 16, "layers": 1}, text_cfg).eval()
    found = embed_text(clip, ["a red heart", ""])
    seen = []
    clip.ln_final.register_forward_hook(lambda *call: seen.append(call[-1]))
    ids = open_clip.get_tokenizer("ViT-L-14-336-quickgelu", context_length=16)(["a red heart", ""])
    assert ids[1].tolist() == [49406, 49407] + [0] * 14
    clip.encode_text(ids)
    assert found.shape == (2, 16, 24) and torch.allclose(found, seen[0], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, SIZE, SIZE + 8), (1, 3, 16, 16), (3, SIZE, SIZE)])
def test_wrong_pictures_are_refused(model, shape):
    with pytest.raises(InputError, match=rf"{SIZE}, {SIZE}\], got"):
        model.encode(torch.zeros(shape))


@pytest.mark.parametrize("kind", ["two-stage", "vq", "text-vq", "vqgan"])
def test_wrong_ids_are_refused(kind):
    model = model_of(kind)
    count, size = model.num_tokens, model.vocab_size
    for tokens, words in (
        (torch.zeros(1, count - 1, dtype=torch.int64), f"exactly {count} tokens, got {count - 1}"),
        (torch.full((1, count), size), f"0 to {size - 1}, got {size}"),
        (torch.full((1, count), -1), "got -1"),
        (torch.zeros(1, count), "whole numbers"),
    ):
        with pytest.raises(InputError, match=words):
            model.decode(tokens, *texts(model, 1))


@pytest.mark.parametrize("kind", ["vae", "text-vae"])
def test_wrong_latents_are_refused(kind):
    model = model_of(kind)
    for latents in (torch.zeros(1, 4, 6), torch.zeros(1, 5, 7), torch.zeros(1, 5, 6).long()):
        with pytest.raises(InputError, match=r"latents of shape \[batch, 5, 6\], got"):
            model.decode(latents, *texts(model, 1))


def test_wrong_text_is_refused():
    model = model_of("text-vq")
    with pytest.raises(InputError, match=r"shape \[2, 7, 12\], got \[1, 7, 12\]: make them with"):
        model.decode(model.encode(pictures(2)), torch.zeros(1, 7, 12))


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("vq", {"quantize_mode": "fsq"}, 'must be "vq" or "vae", got "fsq"'),
        ("vq", {"patch_size": 7}, "image_size 32 must be a multiple of patch_size 7"),
        ("vq", {"quantizer_options": {"emma": True}}, "quantizer_options do not fit.*emma"),
        ("vqgan", {"image_size": 36}, "multiple of 8, got 36"),
    ],
)
def test_impossible_models_are_refused(kind, change, words):
    cls, config = KINDS[kind]
    with pytest.raises(InputError, match=words):
        cls(**config | change)


# Published names


_NAMES = [
    (r"^encoder\.latent_tokens", "latent_tokens"),
    (r"latent_positional", "latent_token_positional"),
    (r"\.blocks\.", ".transformer."),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"attn\.proj\.", "attn.out_proj."),
    (r"mlp\.0\.", "mlp.c_fc."),
    (r"mlp\.2\.", "mlp.c_proj."),
    (r"^encoder\.proj\.", "encoder.conv_out."),
    (r"^decoder\.embed\.", "decoder.decoder_embed."),
    (r"^quantizer\.", "quantize."),
    (r"^head\.codebook\.", "pixel_quantize.embedding."),
    (r"^head\.conv_out\.", "decoder.conv_out."),
    (r"^head\.proj\.(\d)\.", r"decoder.ffn.\1."),
    (r"^head\.proj\.", "decoder.ffn.0."),
    (r"^text_proj\.", "decoder.text_guidance_proj."),
    (r"^text_positional", "decoder.text_guidance_positional"),
    (r"^head\.pixel_decoder", "pixel_decoder"),
    (r"\b(down|up)\.(\d+)\.(\d+)\.", r"\1.\2.block.\3."),
    (r"upsample\.(\d+)\.conv\.", lambda match: f"up.{int(match[1]) + 1}.upsample_conv."),
]


def published(model: Tokenizer) -> dict[str, torch.Tensor]:
    """A model's weights under the published names."""
    state = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        pointwise = name.endswith("weight") and ("ffn" in name or name == "encoder.conv_out.weight")
        state[name] = value[..., None, None] if pointwise and value.ndim == 2 else value
    return state


CONVERTERS = {"two-stage": titok, "vq": titok, "vae": titok, "vqgan": maskgit_vqgan}
CONVERTERS |= {"text-vq": tatitok, "text-vae": tatitok}


def load(kind: str, state: dict[str, torch.Tensor]) -> Tokenizer:
    cls, config = KINDS[kind]
    model = cls(**config).eval()
    load_strict(model, CONVERTERS[kind].convert_state_dict(state, dict(model.config)))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_published_names(kind):
    again = load(kind, published(model_of(kind)))
    tokens, text = model_of(kind).encode(pictures()), texts(model_of(kind))
    assert torch.equal(again.encode(pictures()), tokens)
    assert torch.equal(again.decode(tokens, *text), model_of(kind).decode(tokens, *text))


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_unknown_names_are_refused(kind):
    state = published(model_of(kind))
    first = next(iter(state))
    with pytest.raises(InputError, match="is missing"):
        load(kind, {name: value for name, value in state.items() if name != first})
    with pytest.raises(InputError, match=r'"encoder\.surprise\.weight" is not a weight of'):
        load(kind, state | {"encoder.surprise.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [
        ("vq", "two-stage", '"decoder.ffn.2.weight" is not a weight of a published TiTok'),
        ("two-stage", "vq", '"decoder.conv_out.weight" is not a weight of a published TiTok'),
        ("vq", "text-vq", '"decoder.text_guidance_p'),
        ("text-vq", "vq", '"text_positional_embedding" is missing'),
        ("vq", "vae", '"quantizer.embedding.weight" is missing'),
        ("vae", "vq", '"quantizer.embedding.weight" is unknown'),
        ("vq", "vqgan", '"encoder.conv_in.weight" is not a weight of a published TiTok'),
        ("vqgan", "vq", "is not a weight of a published MaskGIT-VQGAN"),
    ],
)
def test_checkpoints_of_another_model_are_refused(kind, other, words):
    with pytest.raises(InputError) as caught:
        load(kind, published(model_of(other)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_enat_names_and_nested_state_dict():
    state = {}
    for name, value in published(model_of("vqgan")).items():
        name = name.replace("mid.0.", "mid.block_1.").replace("upsample_conv", "upsample.conv")
        state[f"state_dict.{name}"] = value
    config = KINDS["vqgan"][1]
    converted = enat_vqgan.convert_state_dict(state, config)
    assert converted.keys() == model_of("vqgan").state_dict().keys()
    with pytest.raises(InputError, match=r'"decoder\.mid\.attn_1\.q\.weight" is not a weight'):
        enat_vqgan.convert_state_dict(state | {"decoder.mid.attn_1.q.weight": value}, config)


def test_published_configurations(tmp_path):
    node = {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False}
    node |= {"vit_enc_model_size": "base", "vit_dec_model_size": "large", "num_latent_tokens": 64}
    node |= {"vit_enc_patch_size": 16, "vit_dec_patch_size": 16}
    node |= {"quantize_mode": "vq", "finetune_decoder": False, "is_legacy": False}
    whole = {"model": {"vq_model": node}, "dataset": {"preprocessing": {"crop_size": 256}}}
    config = titok.read_config(whole)
    assert config == {
        "image_size": 256,
        "patch_size": 16,
        "num_latent_tokens": 64,
        "two_stage": False,
        "quantize_mode": "vq",
        "codebook_size": 8192,
        "token_size": 64,
        "use_l2_norm": False,
        "encoder_dim": 768,
        "encoder_depth": 12,
        "encoder_heads": 12,
        "decoder_dim": 1024,
        "decoder_depth": 24,
        "decoder_heads": 16,
    }
    assert tatitok.read_config(whole) == {k: v for k, v in config.items() if k != "two_stage"}
    legacy = {"model": {"vq_model": {"codebook_size": 4096}}}
    assert titok.read_config(legacy)["two_stage"] is True
    assert titok.read_config({}) == {}
    node["is_legacy"] = True
    with pytest.raises(InputError, match="neither a two-stage nor a single-stage"):
        titok.read_config(whole)
    node |= {"is_legacy": False, "vit_enc_model_size": "huge"}
    with pytest.raises(InputError, match='Unknown model size "huge"'):
        titok.read_config(whole)


def test_auto_tokenizer_reads_published_files(tmp_path, monkeypatch):
    """By name, from local files, with the size that they state."""
    node = {"vit_enc_model_size": "small", "vit_dec_model_size": "small", "num_latent_tokens": 5}
    node |= {"vit_enc_patch_size": 8, "vit_dec_patch_size": 8, **VQ}
    node |= {"finetune_decoder": False, "is_legacy": False}
    monkeypatch.setattr(titok, "_SIZES", {"small": (32, 2, 4)})
    config = {"model": {"vq_model": node}, "dataset": {"preprocessing": {"crop_size": SIZE}}}
    model = TiTok(**titok.read_config(config)).eval()
    saved = {name: value.contiguous() for name, value in published(model).items()}
    save_file(saved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="not for commercial use"):
        again = AutoTokenizer.from_pretrained("titok-bl-64-vq", files=tmp_path)
    assert torch.equal(again.encode(pictures()), model.encode(pictures()))
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning), pytest.raises(InputError, match="is damaged"):
        AutoTokenizer.from_pretrained("titok-bl-64-vq", files=tmp_path)
