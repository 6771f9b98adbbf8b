"""TokenBridge: levels without training, over any continuous tokenizer."""

from __future__ import annotations

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.tokenizers.image.kl16_vae import KL16VAE
from tessera.tokenizers.image.tokenbridge import TokenBridgeTokenizer
from tessera.tokenizers.quantizers.dimension_wise import DimensionWiseQuantizer, gaussian_levels
from tessera.weights.convert import tokenbridge_tokenizer
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


def test_batch_equals_one_by_one(tokenizer, images):
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


def test_wrong_settings_are_refused():
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
