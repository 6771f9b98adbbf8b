"""TokenBridge: levels without training over any continuous tokenizer, and the generator of its ids."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.generators.autoregressive import tokenbridge
from tessera.generators.autoregressive.tokenbridge import TokenBridge
from tessera.generators.schedules import masked_counts
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.tokenizers.image.kl16_vae import KL16VAE
from tessera.tokenizers.image.tokenbridge import TokenBridgeTokenizer
from tessera.tokenizers.quantizers.dimension_wise import DimensionWiseQuantizer, gaussian_levels
from tessera.weights.convert import tokenbridge_tokenizer
from tessera.weights.convert.tokenbridge import convert_state_dict
from tessera.weights.loading import load_strict
from tessera.weights.registry import model_info

BASE = {
    "image_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def tokenizer() -> TokenBridgeTokenizer:
    torch.manual_seed(0)
    return TokenBridgeTokenizer("KL16VAE", BASE, levels=16, value_range=(-0.5, 0.5)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("levels", [2, 16, 64])
def test_values_are_the_means_of_equal_shares(levels):
    boundaries, values = gaussian_levels(levels, 30.0)
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    cell = torch.bucketize(draws, boundaries[1:-1])
    counts = torch.bincount(cell, minlength=levels)
    assert counts.min() > 0.8 * 200_000 / levels
    inner = slice(1, -1) if levels > 2 else slice(None)
    means = torch.zeros(levels).index_add_(0, cell, draws) / counts
    assert torch.allclose(values[inner], means[inner], atol=0.03)


@pytest.mark.parametrize("levels", [2, 16, 64])
def test_ids_round_trip_and_errors_stay_within_a_cell(levels):
    quantizer = DimensionWiseQuantizer(levels)
    ids = torch.arange(levels)
    values, again = quantizer(quantizer.ids_to_codes(ids))
    assert torch.equal(again, ids) and torch.equal(values, quantizer.ids_to_codes(ids))
    z = torch.linspace(-7, 7, 301)
    values, ids = quantizer(z)
    assert (values.diff() >= 0).all() and ids[0] == 0 and ids[-1] == levels - 1
    levels_of = quantizer.ids_to_codes(torch.arange(levels))
    assert torch.allclose((z - values).abs(), (z[:, None] - levels_of).abs().amin(1), atol=1e-5)


def test_gradient_passes_straight_through():
    z = torch.randn(5, requires_grad=True)
    DimensionWiseQuantizer(8)(z)[0].sum().backward()
    assert torch.equal(z.grad, torch.ones(5))


def test_encode_rounds_what_the_base_encodes(tokenizer, images):
    ids = tokenizer.encode(images)
    assert ids.shape == (3, tokenizer.num_tokens) == (3, 64 * 4) and ids.unique().numel() > 8
    latents = tokenizer.quantizer.ids_to_codes(ids).unflatten(1, (64, 4))
    assert (latents - tokenizer.base.encode(images).clamp(-0.5, 0.5)).abs().max() < 0.15
    assert torch.equal(tokenizer.decode(ids), tokenizer.base.decode(latents))


def test_tokenizer_batch_equals_one_by_one(tokenizer, images):
    ids = tokenizer.encode(images)
    decoded = tokenizer.decode(ids)
    for i in range(3):
        assert torch.equal(tokenizer.encode(images[i : i + 1])[0], ids[i])
        assert torch.allclose(tokenizer.decode(ids[i : i + 1])[0], decoded[i], atol=1e-5)


def test_a_loaded_tokenizer_can_be_quantized(tokenizer, images, tmp_path):
    vae = KL16VAE(**BASE).eval()
    quantized = TokenBridgeTokenizer.from_continuous(vae, levels=32, value_range=(-1.0, 1.0))
    ids = quantized.encode(images)
    assert quantized.base is vae and quantized.vocab_size == 32
    quantized.save_pretrained(tmp_path)
    again = TokenBridgeTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images), ids)
    assert torch.equal(again.decode(ids), quantized.decode(ids))
    with pytest.raises(InputError, match="discrete already"):
        TokenBridgeTokenizer.from_continuous(tokenizer)


def test_bfloat16_keeps_the_levels(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    half = TokenBridgeTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(
        half.quantizer.reconstruction_values, tokenizer.quantizer.reconstruction_values
    )
    difference = (half.encode(images) - tokenizer.encode(images)).abs()
    assert difference.float().mean() < 0.5


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(1, 255, dtype=torch.int64), "exactly 256 tokens, got 255"),
        (torch.full((1, 256), 16), "0 to 15, got 16"),
        (torch.zeros(1, 256), "whole numbers"),
    ],
)
def test_wrong_tokens_are_refused(tokenizer, tokens, words):
    with pytest.raises(InputError, match=words):
        tokenizer.decode(tokens)


def test_wrong_quantizers_are_refused():
    with pytest.raises(InputError, match="1 levels"):
        DimensionWiseQuantizer(1)
    with pytest.raises(InputError, match="NoSuchVAE"):
        TokenBridgeTokenizer("NoSuchVAE")


def test_published_file_is_the_vae_alone():
    info = model_info("tokenbridge-kl16")
    state = {"model.quant_conv.weight": torch.zeros(32, 32, 1, 1)}
    converted = tokenbridge_tokenizer.convert_state_dict(state, info.config)
    assert set(converted) == {"base.vae.quant_conv.weight", "quantizer.reconstruction_values"}
    with torch.device("meta"):
        assert info.model_class()(**info.config).num_tokens == int(info.tokens)


N, C, V, CLASSES = 9, 4, 8, 5


@pytest.fixture(scope="module")
def model() -> TokenBridge:
    """Every weight random, so that no path is zero."""
    torch.manual_seed(0)
    model = TokenBridge(
        num_tokens=N,
        channels=C,
        levels=V,
        channel_order=(2, 0, 3, 1),
        num_classes=CLASSES,
        encoder_dim=24,
        encoder_depth=2,
        encoder_heads=3,
        decoder_dim=32,
        decoder_depth=2,
        decoder_heads=4,
        head_dim=16,
        head_depth=2,
        head_heads=2,
        buffer_size=3,
        num_steps=4,
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model.eval()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_cached_head_equals_full_recomputation(model, monkeypatch, rows):
    """Whatever number of modulations is computed at a time; but for the first input, as published."""
    monkeypatch.setattr(tokenbridge, "MODULATION_ROWS", rows)
    head, features = model.head, torch.randn(5, 32)
    ids = head.sample(features, 0.0, torch.ones(5, C, V))
    condition = head.condition(features)[:, None]
    before = [condition + head.timesteps[0]]
    before += [table(ids[:, j : j + 1]) for j, table in enumerate(head.embeddings)]
    x = torch.cat(before, dim=1) + head.positions
    blocks, end = head.modulations(condition + head.timesteps)
    for block, modulation in zip(head.blocks, blocks, strict=True):
        x = block(x, modulation)
    x = head.final(x, end)
    for j in range(C):
        assert torch.equal(head.outputs[j](x[:, j]).argmax(-1), ids[:, j])


def test_a_channel_does_not_see_the_later_ones(model):
    features, ids = torch.randn(5, 32), torch.randint(0, V, (5, C))
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 1) % V
    before, after = model.head.logits(features, ids), model.head.logits(features, changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_features_depend_on_visible_tokens_alone(model, labels):
    values, classes = torch.randn(3, N, C), model.classes(labels)
    order = torch.stack([torch.randperm(N) for _ in range(3)])
    visible, wanted = order[:, :4], order[:, 4:6]
    features = model.features(values, visible, wanted, classes)
    every = model.features(values, visible, torch.arange(N).expand(3, -1), classes)
    picked = every.gather(1, wanted[..., None].expand(-1, -1, 32))
    assert torch.allclose(features, picked, atol=1e-5)
    values.scatter_(1, order[:, 4:, None].expand(-1, -1, C), 9.0)
    assert torch.equal(model.features(values, visible, wanted, classes), features)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_batch_equals_one_by_one(model, labels, scale):
    together = model.generate(labels, streams(5, 6, 7), guidance_scale=scale)
    assert together.shape == (3, N * C) and together.min() >= 0 and together.max() < V
    for i in range(3):
        alone = model.generate(labels[i : i + 1], streams(5 + i), guidance_scale=scale)
        assert torch.equal(alone[0], together[i])
    other = model.generate(labels, streams(8, 9, 10), guidance_scale=scale)
    assert not torch.equal(other, together)


@pytest.mark.parametrize("steps", [1, 4, N])
def test_stream_writes_each_token_once(model, labels, steps):
    orders = torch.stack([torch.randperm(N) for _ in range(3)])
    parts = list(model.stream(labels, streams(0, 1, 2), steps, orders=orders))
    assert len(parts) == steps
    parts = [part.view(3, N, C).gather(1, orders[..., None].expand(-1, -1, C)) for part in parts]
    middle = model.quantizer(torch.zeros(()))[1]
    for part, left in zip(parts[:-1], masked_counts("cosine", N, steps), strict=False):
        assert torch.equal(part[:, left:], parts[-1][:, left:])
        assert (part[:, :left] == middle).all()


def test_given_tokens_stay_and_steer_the_rest(model, labels):
    free = model.generate(labels, streams(0, 1, 2), temperature=0)
    keep = torch.zeros(3, N, C, dtype=torch.bool)
    keep[0, :4] = True
    keep[1, 5:] = True
    keep, given = keep.flatten(1), (free + 3) % V
    edited = model.generate(labels, streams(0, 1, 2), temperature=0, tokens=given, token_mask=keep)
    assert torch.equal(edited[keep], given[keep])
    assert torch.equal(edited[2], free[2])
    assert not torch.equal(edited[:2][~keep[:2]], free[:2][~keep[:2]])


def test_training_moves_every_weight(model, labels):
    tokens = torch.randint(0, V, (3, N * C))
    loss, parts = model(tokens, torch.tensor([0, 3, CLASSES]), streams(0)[0])
    loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    assert still == [] and parts["nll"] == loss


def test_a_new_model_knows_nothing(labels):
    torch.manual_seed(0)
    small = {"encoder_dim": 24, "encoder_depth": 1, "encoder_heads": 3, "decoder_dim": 24}
    model = TokenBridge(N, C, V, channel_order=range(C), **small, decoder_depth=1, decoder_heads=3)
    model.init_weights()
    loss, _ = model.eval()(torch.randint(0, V, (3, N * C)), labels)
    assert 0.8 < float(loss.detach()) / math.log(V) < 1.6


def test_generator_saves_and_loads_exactly(model, labels, tmp_path):
    model.save_pretrained(tmp_path)
    again = TokenBridge.from_pretrained(tmp_path)
    ids = model.generate(labels, streams(0, 1, 2))
    assert torch.equal(again.generate(labels, streams(0, 1, 2)), ids)
    half = TokenBridge.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.quantizer.reconstruction_values.dtype == torch.float32
    features, targets = torch.randn(5, 32), torch.randint(0, V, (5, C))
    exact = model.head.logits(features, targets)
    error = half.head.logits(features.bfloat16(), targets).float() - exact
    assert error.abs().max() < 0.05 * exact.abs().max()
    assert half.generate(labels, streams(0, 1, 2)).shape == ids.shape


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": torch.tensor([6])}, "0 to 4"),
        ({"generators": streams(0, 1)}, "1, got 2"),
        ({"temperature": -1.0}, "Temperature"),
        ({"num_steps": 0}, "1 to 9 steps, got 0"),
        ({"num_steps": 10}, "1 to 9 steps, got 10"),
        ({"guidance_schedule": "sideways"}, "sideways"),
        ({"token_mask": torch.ones(1, 36, dtype=torch.bool)}, "together"),
    ],
)
def test_wrong_settings_are_refused(model, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(**{"labels": torch.tensor([0]), "generators": streams(0)} | settings)


def test_wrong_channel_order_is_refused():
    with pytest.raises(InputError, match="channel_order"):
        TokenBridge(channels=4, channel_order=(0, 1, 2, 2))


def test_another_checkpoint_is_refused(model):
    with pytest.raises(InputError, match="pos_start"):
        convert_state_dict({"pos_start": torch.zeros(1, 1, 8)}, {})
    averaged = {
        "model.mask_token": torch.ones(1, 1, 32),
        "model_ema.mask_token": torch.zeros(1, 1, 32),
    }
    state = convert_state_dict(averaged, {})
    assert torch.equal(state["mask_token"], torch.zeros(32))
    with pytest.raises(InputError, match="null_class"):
        load_strict(model, state)
