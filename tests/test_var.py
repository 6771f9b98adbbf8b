"""VAR: the multi-scale tokenizer."""

from __future__ import annotations

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.tokenizers.image.var_vqvae import MultiScaleVQVAE
from tessera.tokenizers.quantizers.residual import MultiScaleResidualVQ
from tessera.weights.convert import var_vqvae
from tessera.weights.loading import load_strict
from tessera.weights.registry import list_models, model_info

SCALES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleVQVAE:
    torch.manual_seed(0)
    model = MultiScaleVQVAE(
        vocab_size=24, code_dim=8, block_out_channels=(32, 64), patch_nums=SCALES
    )
    torch.nn.init.normal_(model.quantizer.codebook.embedding.weight, std=0.3)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_sizes(tokenizer, images):
    ids = tokenizer.encode(images)
    assert tokenizer.image_size == 8
    assert ids.shape == (3, tokenizer.num_tokens) == (3, 30)
    assert tokenizer.decode(ids).shape == images.shape


def test_batch_equals_one_by_one(tokenizer, images):
    ids = tokenizer.encode(images)
    decoded = tokenizer.decode(ids)
    for i in range(3):
        assert torch.equal(tokenizer.encode(images[i : i + 1])[0], ids[i])
        assert torch.allclose(tokenizer.decode(ids[i : i + 1])[0], decoded[i], atol=1e-5)


def test_ids_decode_to_the_sum_that_encoding_made(tokenizer, images):
    codes, ids, _ = tokenizer.quantizer(tokenizer.encode_latents(images))
    assert torch.allclose(tokenizer.quantizer.ids_to_codes(ids), codes, atol=1e-5)


def test_each_id_is_the_nearest_code_of_what_is_left(tokenizer, images):
    """Every scale's ids, from the plain distance to the residual of the scales before."""
    quantizer = tokenizer.quantizer
    latents = tokenizer.encode_latents(images).detach()
    ids = quantizer(latents)[1]
    start = 0
    for scale, side in enumerate(SCALES):
        done = quantizer.ids_to_codes(ids[:, :start]) if start else 0
        cells = torch.nn.functional.adaptive_avg_pool2d(latents - done, side)
        cells = cells.flatten(2).transpose(1, 2)
        nearest = torch.cdist(cells, quantizer.codebook.embedding.weight).argmin(-1)
        assert torch.equal(nearest, ids[:, start : start + side * side]), scale
        start += side * side


@pytest.mark.parametrize("count", [1, 4, 5, 13, 14, 29, 30])
def test_prefixes_decode_by_whole_scales(tokenizer, images, count):
    ids = tokenizer.encode(images)
    whole = max(n for n in (1, 5, 14, 30) if n <= count)
    decoded = tokenizer.decode(ids[:, :count])
    assert torch.equal(decoded, tokenizer.decode(ids[:, :whole]))
    assert decoded.isfinite().all() and decoded.abs().max() <= 1


def test_next_inputs_are_the_sum_so_far_shrunk(tokenizer, images):
    quantizer, ids = tokenizer.quantizer, tokenizer.encode(images)
    inputs = quantizer.next_inputs(ids)
    assert inputs.shape == (3, 29, 8)
    so_far = quantizer.ids_to_codes(ids[:, :5])
    expected = torch.nn.functional.adaptive_avg_pool2d(so_far, 3).flatten(2).transpose(1, 2)
    assert torch.allclose(inputs[:, 4:13], expected, atol=1e-6)


def test_published_phis_are_shared_by_neighbours():
    with torch.device("meta"):
        phis = MultiScaleResidualVQ(8, 4, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).phi_of_scale
    assert phis == sorted(phis) and set(phis) == {0, 1, 2, 3}


def test_training_moves_every_weight(tokenizer, images):
    loss, parts = tokenizer(images)
    loss.backward()
    still = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    tokenizer.zero_grad()
    # A key bias adds the same to every score of a row: softmax drops it.
    assert all(name.endswith("to_k.bias") for name in still)
    assert torch.allclose(parts["l1"] + parts["vq"], loss)
    assert 1 <= parts["perplexity"] <= 24


def test_gradient_passes_straight_through(tokenizer):
    z = torch.randn(1, 8, 4, 4, requires_grad=True)
    codes, _, loss = tokenizer.quantizer(z)
    (gradient,) = torch.autograd.grad(codes.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z)) and loss > 0


def test_unused_codes_are_revived():
    torch.manual_seed(0)
    quantizer = MultiScaleResidualVQ(16, 4, (1, 2, 4), revive=True)
    torch.nn.init.constant_(quantizer.codebook.embedding.weight, 50.0)
    quantizer.codebook.embedding.weight.data[0] = 0
    z = torch.randn(8, 4, 4, 4)
    quantizer(z)
    assert quantizer(z)[1].unique().numel() > 1


def test_save_and_load_are_exact(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = MultiScaleVQVAE.from_pretrained(tmp_path)
    ids = tokenizer.encode(images)
    assert torch.equal(again.encode(images), ids)
    assert torch.equal(again.decode(ids), tokenizer.decode(ids))


def test_bfloat16_is_near(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    half = MultiScaleVQVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.quantizer.codebook.embedding.weight.dtype == torch.float32
    ids = tokenizer.encode(images)
    assert (half.encode(images) == ids).float().mean() > 0.7
    assert (half.decode(ids).float() - tokenizer.decode(ids)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(1, 31, dtype=torch.int64), "1 to 30 tokens, got 31"),
        (torch.full((1, 5), 24), "0 to 23, got 24"),
        (torch.zeros(1, 5), "whole numbers"),
    ],
)
def test_wrong_tokens_are_refused(tokenizer, tokens, words):
    with pytest.raises(InputError, match=words):
        tokenizer.decode(tokens)


def test_wrong_picture_size_is_refused(tokenizer):
    with pytest.raises(InputError, match="8"):
        tokenizer.encode(torch.zeros(1, 3, 16, 8))


def test_another_checkpoint_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"class_emb\.weight"):
        var_vqvae.convert_state_dict({"class_emb.weight": torch.zeros(8, 4)}, {})
    with pytest.raises(InputError, match=r"encoder\.conv_in\.weight"):
        load_strict(tokenizer, var_vqvae.convert_state_dict({}, {}))


@pytest.mark.parametrize("name", list_models("var-vqvae*"))
def test_published_tokenizers(name):
    info = model_info(name)
    with torch.device("meta"):
        model = info.model_class()(**info.config)
    assert f"1-{model.num_tokens}" == info.tokens and model.vocab_size == info.vocab_size
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == info.parameters
    assert model.image_size == int(name.rpartition("-")[2])
