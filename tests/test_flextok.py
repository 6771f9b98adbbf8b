"""FlexTok: exactness of the merged masks, prefixes, seeds, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tessera.modalities.errors import InputError
from tessera.tokenizers.image.flextok import FlexTok
from tessera.tokenizers.quantizers.fsq import FSQ
from tessera.weights import loading
from tessera.weights.convert.flextok import convert_state_dict, read_config
from tessera.weights.loading import load_strict, read_header
from tessera.weights.registry import model_info


@pytest.fixture(scope="module")
def tokenizer() -> FlexTok:
    """A tiny one over pixels, every weight random so that no path is zero."""
    torch.manual_seed(0)
    model = FlexTok(
        image_size=16,
        vae_config=None,
        latent_channels=3,
        latent_size=16,
        patch_size=4,
        max_grid=4,
        num_registers=8,
        fsq_levels=(5, 4, 3),
        encoder_dim=32,
        encoder_depth=2,
        decoder_dim=32,
        decoder_depth=2,
        head_dim=16,
        num_inference_steps=2,
        guidance_scale=1.0,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def noises(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (5, 4, 3), (2,), (8, 8, 8, 5, 5, 5)])
def test_fsq_ids_round_trip(levels):
    fsq = FSQ(levels)
    ids = torch.arange(0, fsq.vocab_size, max(1, fsq.vocab_size // 5000))
    codes = fsq.ids_to_codes(ids)
    assert torch.equal(fsq.codes_to_ids(codes), ids)
    assert codes.min() >= -1 and codes.max() <= 1


def test_fsq_reaches_every_level_and_passes_gradients():
    fsq = FSQ((8, 5))
    z = torch.linspace(-6, 6, 400)[:, None].repeat(1, 2).requires_grad_()
    codes, _ = fsq(z)
    assert codes[:, 0].unique().numel() == 8 and codes[:, 1].unique().numel() == 5
    codes.sum().backward()
    assert (z.grad[150:250] > 0).all()


def test_merged_masks_equal_all_masks(tokenizer, images):
    """One mask token with a log-count bias is what all N - k identical tokens compute."""
    decoder = tokenizer.decoder
    ids = tokenizer.encode(images)
    codes = tokenizer.quantizer.ids_to_codes(ids)
    x, t = torch.randn(3, 3, 16, 16), torch.rand(3)
    keep = torch.tensor([1, 5, 8])
    drop = torch.tensor([False, False, True])
    merged = decoder(x, t, *decoder.condition(codes, keep, drop))

    tokens = decoder.from_codes(codes) + decoder.register_positions
    hidden = torch.arange(8) >= keep[:, None]
    tokens = torch.where(hidden[..., None], decoder.mask_token, tokens)
    tokens[2] = decoder.null_token
    assert torch.allclose(merged, decoder(x, t, tokens, torch.zeros(3, 8)), atol=1e-5)


def test_first_registers_do_not_need_the_rest(tokenizer, images):
    assert torch.equal(tokenizer.encode(images, 3), tokenizer.encode(images)[:, :3])


def test_batch_equals_one_by_one(tokenizer, images):
    ids = tokenizer.encode(images)
    together = tokenizer.decode(ids[:, :5], generator=noises(3))
    for i in range(3):
        assert torch.equal(tokenizer.encode(images[i : i + 1])[0], ids[i])
        alone = tokenizer.decode(ids[i : i + 1, :5], generator=noises(3)[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_mixed_lengths_equal_each_alone(tokenizer, images):
    ids = tokenizer.encode(images)
    rows = [ids[0, :2], ids[1, :8], ids[2, :5]]
    together = tokenizer.decode(rows, generator=noises(3), guidance_scale=2.0)
    for i, row in enumerate(rows):
        alone = tokenizer.decode(row[None], generator=noises(3)[i : i + 1], guidance_scale=2.0)
        assert torch.allclose(alone[0], together[i], atol=1e-4)


@pytest.mark.parametrize("count", range(1, 9))
def test_every_prefix_decodes(tokenizer, images, count):
    decoded = tokenizer.decode(tokenizer.encode(images)[:, :count], generator=noises(3))
    assert decoded.shape == images.shape and decoded.isfinite().all()


def test_training_moves_every_trainable_weight(tokenizer, images):
    loss, parts = tokenizer(images, torch.randn_like(images), torch.rand(3), 4)
    loss.backward()
    still = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    tokenizer.zero_grad()
    # The null token needs a dropped condition to have a gradient.
    assert still == ["decoder.null_token"]
    assert parts["flow"] == loss


def test_frozen_ids_replace_the_encoder(tokenizer, images):
    noise, t = torch.randn_like(images), torch.rand(3)
    ids = tokenizer.encode(images)
    with torch.no_grad():
        encoded, _ = tokenizer(images, noise, t, 4)
        given, _ = tokenizer(images, noise, t, 4, ids=ids)
    assert torch.allclose(encoded, given, atol=1e-6)


def test_save_and_load_are_exact(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    ids = tokenizer.encode(images)
    assert torch.equal(again.encode(images), ids)
    assert torch.equal(
        again.decode(ids, generator=noises(3)), tokenizer.decode(ids, generator=noises(3))
    )


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(1, 9, dtype=torch.int64), "1 to 8 tokens, got 9"),
        (torch.full((1, 2), 60), "0 to 59, got 60"),
        (torch.full((1, 2), -1), "got -1"),
        (torch.zeros(1, 2), "whole numbers"),
        (torch.zeros(2, dtype=torch.int64), "shape"),
    ],
)
def test_wrong_tokens_are_refused(tokenizer, tokens, words):
    with pytest.raises(InputError, match=words):
        tokenizer.decode(tokens)


def test_wrong_picture_size_is_refused(tokenizer):
    with pytest.raises(InputError, match="16"):
        tokenizer.encode(torch.zeros(1, 3, 20, 16))


VAE = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
}
SMALL = {
    "image_size": 16,
    "vae_config": VAE,
    "latent_channels": 4,
    "latent_size": 8,
    "max_grid": 4,
    "num_registers": 8,
    "encoder_dim": 32,
    "encoder_depth": 1,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "head_dim": 16,
    "num_inference_steps": 2,
}


def test_bfloat16_keeps_the_vae_in_float32_and_stays_close(tmp_path, images):
    """Velocities within 3 % of their range."""
    torch.manual_seed(0)
    FlexTok(**SMALL).save_pretrained(tmp_path)
    full = FlexTok.from_pretrained(tmp_path).eval()
    half = FlexTok.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    assert half.decode(half.encode(images)).isfinite().all()
    ids = full.encode(images)
    x, t = torch.randn(3, 4, 8, 8), torch.rand(3)
    velocities = []
    for model in (full, half):
        codes = model.quantizer.ids_to_codes(ids).to(model.dtype)
        condition = model.decoder.condition(codes[:, :5])
        velocities.append(model.decoder(x.to(model.dtype), t, *condition).float())
    assert (velocities[0] - velocities[1]).abs().max() < 0.03 * velocities[0].abs().max()


def test_a_generator_samples_the_posterior(images):
    torch.manual_seed(0)
    model = FlexTok(**SMALL).eval()
    mean = model.encode_latents(images)
    assert torch.equal(model.encode_latents(images), mean)
    drawn = model.encode_latents(images, noises(3))
    assert not torch.equal(drawn, mean)
    assert torch.equal(model.encode_latents(images, noises(3)), drawn)


TREE = {
    "vae": {"_target_": "flextok.vae_wrapper.VAE", "scaling_factor": 0.5, "sample_posterior": True},
    "encoder": {
        "_target_": "flextok.model.Sequential",
        "module_dict": {
            "enc_patch_emb": {"channels_in": 4, "patch_sizes": [2, 2]},
            "enc_transformer": {"_target_": "flextok.Trunk", "dim": 64, "depth": 3, "head_dim": 32},
        },
    },
    "decoder": {
        "module_dict": {
            "dec_registers_posemb_module": {"max_sizes": [16]},
            "dec_time_embedder": {"max_timestep": 1.0},
            "dec_transformer": {"dim": 96, "depth": 2},
            "dec_repa_head": {"_target_": "anything"},
        }
    },
    "regularizer": {"_target_": "flextok.regularizers.FSQ", "levels": [8, 5]},
    "pipeline": {"_target_": "flextok.flow_matching.Pipeline"},
}
READ = {
    "vae_scaling_factor": 0.5,
    "latent_channels": 4,
    "patch_size": 2,
    "encoder_dim": 64,
    "encoder_depth": 3,
    "head_dim": 32,
    "num_registers": 16,
    "max_timestep": 1.0,
    "decoder_dim": 96,
    "decoder_depth": 2,
    "fsq_levels": [8, 5],
}


def test_published_configuration_is_read_as_tree_and_as_header(tmp_path):
    assert read_config(TREE) == READ
    header = {name: str(value) for name, value in TREE.items()}
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", {"format": "pt", **header})
    assert read_config(read_header(tmp_path / "m.safetensors")) == READ


@pytest.mark.parametrize("as_file", [True, False])
def test_the_files_own_configuration_beats_the_registry(tmp_path, monkeypatch, as_file):
    weights = tmp_path / "model.safetensors"
    state = FlexTok(**SMALL | READ).state_dict()
    save_file(state, weights, None if as_file else {name: str(v) for name, v in TREE.items()})
    if as_file:
        (tmp_path / "config.json").write_text(json.dumps(TREE))
    renaming = SimpleNamespace(convert_state_dict=lambda s, _: s, read_config=read_config)
    monkeypatch.setattr(loading, "converter", lambda _: renaming)
    info = replace(model_info("flextok-d12-d12"), config=SMALL)
    model = loading.load_published(info, loading.find_files(info, tmp_path))
    assert model.config.max_timestep == 1.0 and model.config.encoder_dim == 64
    assert model.config.num_inference_steps == 2


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"encoder": {"module_dict": {"enc_extra": {}}}}, "enc_extra"),
        ({"regularizer": {"_target_": "os.system", "levels": [2]}}, "os.system"),
        ({"encoder": {"module_dict": {"enc_transformer": {"_target_": "os.system"}}}}, "os.system"),
        ({"vae": "{__import__('os')}"}, "literal"),
        ({"decoder": "[1]"}, "tree"),
    ],
)
def test_other_configurations_are_refused(tree, words):
    with pytest.raises(InputError, match=words):
        read_config(tree)


def test_another_checkpoint_is_refused_by_name(tokenizer):
    with pytest.raises(InputError, match="conv_in"):
        convert_state_dict({"conv_in.weight": torch.zeros(1)}, {})
    with pytest.raises(InputError, match="decoder"):
        load_strict(tokenizer, {k: v for k, v in tokenizer.state_dict().items() if "encoder" in k})
