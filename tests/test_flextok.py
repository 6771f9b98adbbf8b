"""FlexTok: exactness of the merged masks, prefixes, seeds, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.tokenizers.image.flextok import FlexTok
from tessera.tokenizers.quantizers.fsq import FSQ


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
