"""KL-16: batches, seeds, precision, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera.modalities.errors import InputError
from tessera.tokenizers.image.autoencoder import upsample_conv
from tessera.tokenizers.image.kl16_vae import KL16VAE
from tessera.weights.convert.kl16_vae import convert_state_dict
from tessera.weights.loading import load_strict
from tessera.weights.registry import model_info


@pytest.fixture(scope="module")
def vae() -> KL16VAE:
    torch.manual_seed(0)
    return KL16VAE(
        image_size=16,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
    ).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_tokens_are_scaled_means_in_raster_order(vae, images):
    tokens = vae.encode(images)
    assert tokens.shape == (3, vae.num_tokens, vae.latent_dim) == (3, 16, 4)
    mean = vae.posterior(images).mean
    assert torch.allclose(tokens[:, 6], mean[:, :, 1, 2] * vae.config.scaling_factor)


def test_batch_equals_one_by_one(vae, images):
    together = vae.encode(images, generators(3))
    decoded = vae.decode(together)
    for i in range(3):
        alone = vae.encode(images[i : i + 1], generators(3)[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-5)
        assert torch.allclose(vae.decode(together[i : i + 1])[0], decoded[i], atol=1e-5)


def test_a_sample_differs_from_the_mean_by_its_standard_deviation(vae, images):
    posterior = vae.posterior(images)
    mean, sample = vae.encode_latents(images), vae.encode_latents(images, generators(3))
    noise = torch.stack([torch.randn(4, 4, 4, generator=g) for g in generators(3)])
    expected = posterior.std * noise * vae.config.scaling_factor
    assert torch.allclose(sample - mean, expected, atol=1e-6)


def test_other_sizes_go_through_latents(vae):
    latents = vae.encode_latents(torch.zeros(1, 3, 8, 24))
    assert latents.shape == (1, 4, 2, 6)
    assert vae.decode_latents(latents).shape == (1, 3, 8, 24)


def test_gradients_reach_every_weight(vae, images):
    latents = vae.encode_latents(images, generators(3))
    (vae.decode_latents(latents) - images).square().mean().backward()
    still = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    vae.zero_grad()
    # A key bias adds the same to every score of a row: softmax drops it.
    assert all(name.endswith("to_k.bias") for name in still)


def test_bfloat16_is_near(vae, images, tmp_path):
    vae.save_pretrained(tmp_path)
    half = KL16VAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    tokens = vae.encode(images)
    error = (half.encode(images).float() - tokens).abs().max() / tokens.abs().max()
    assert 0 < error < 0.05
    decoded = vae.decode(tokens)
    error = (half.decode(tokens).float() - decoded).abs().max() / decoded.abs().max()
    assert 0 < error < 0.05


def test_save_and_load_are_exact(vae, images, tmp_path):
    vae.save_pretrained(tmp_path)
    again = KL16VAE.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images), vae.encode(images))


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (2, 3, 5, 7)])
def test_upsample_conv_equals_upsampling_then_convolution(shape):
    x, weight, bias = torch.randn(shape), torch.randn(6, shape[1], 3, 3), torch.randn(6)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    assert torch.allclose(upsample_conv(x, weight, bias), expected, atol=1e-5)


def test_wrong_pictures_and_latents_are_refused(vae):
    with pytest.raises(InputError, match="16"):
        vae.encode(torch.zeros(1, 3, 20, 16))
    with pytest.raises(InputError, match="divisible by 4"):
        vae.encode_latents(torch.zeros(1, 3, 18, 16))
    with pytest.raises(InputError, match="16, 4"):
        vae.decode(torch.zeros(1, 15, 4))


def test_another_checkpoint_is_refused(vae):
    with pytest.raises(InputError, match=r"quantize\.embedding\.weight"):
        convert_state_dict({"quantize.embedding.weight": torch.zeros(8, 4)}, {})
    state = convert_state_dict({"model.encoder.conv_in.bias": torch.zeros(32)}, {})
    with pytest.raises(InputError, match=r"conv_in\.weight"):
        load_strict(vae, state)


def test_published_size():
    with torch.device("meta"):
        model = KL16VAE(**model_info("kl16").config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == model_info("kl16").parameters
