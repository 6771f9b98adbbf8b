"""KARL: dropped tokens, budgets, batches, precision, training, what it refuses."""

from __future__ import annotations

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.pipelines.reconstruction import ReconstructionPipeline
from tessera.tokenizers.image.karl import ERRORS, KARL
from tessera.weights.convert.karl import convert_state_dict
from tessera.weights.loading import load_strict

VQGAN = {
    "channel_mult": [1, 1],
    "hidden_channels": 32,
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 16,
}
VAE = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 8,
}


def build(base: str, quantize: bool) -> KARL:
    torch.manual_seed(0)
    model = KARL(
        image_size=16,
        patch_size=2,
        base_type=base,
        base_config=VQGAN if base == "vqgan" else VAE,
        max_latent_tokens=20,
        num_latent_tokens=12,
        quantize_latent=quantize,
        codebook_size=32,
        encoder_dim=32,
        encoder_depth=2,
        encoder_heads=2,
        decoder_dim=32,
        decoder_depth=2,
        decoder_heads=2,
        halt_threshold=0.5,
    )
    torch.nn.init.normal_(model.encoder.halting[2].weight)
    if base == "vqgan":  # Codes of the usual spread, or the first normalisation blows up rounding.
        torch.nn.init.normal_(model.base.quantizer.embedding.weight)
    return model.eval()


@pytest.fixture(scope="module", params=[("vqgan", True), ("vae", False)], ids=["ids", "latents"])
def tokenizer(request) -> KARL:
    return build(*request.param)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), atol=1e-5, equal_nan=True)


def test_batch_equals_one_by_one_with_other_lengths(tokenizer, images):
    encoded = tokenizer.encode(images)
    tokens = encoded.clone()
    for i, length in enumerate((1, 12, 5, 0)):
        tokens[i, length:] = -1 if tokenizer.vocab_size else torch.nan
    assert tokenizer.lengths(tokens).unique().numel() > 1
    together = tokenizer.decode(tokens)
    for i in range(4):
        assert same(tokenizer.encode(images[i, None])[0], encoded[i])
        assert torch.allclose(tokenizer.decode(tokens[i, None])[0], together[i], atol=1e-4)


def test_it_drops_some_tokens_and_says_how_many(tokenizer, images):
    tokens = tokenizer.encode(images)
    lengths = tokenizer.lengths(tokens)
    assert tokens.shape[:2] == (4, 12)
    assert ((lengths > 0) & (lengths < 12)).any()
    with torch.no_grad():
        _, halting = tokenizer.latents((images + 1) / 2)
    assert torch.equal(tokenizer.active(halting).sum(1), lengths)
    assert tokenizer.encode(images, 20).shape[1] == 20
    with torch.no_grad():
        assert not torch.equal(tokenizer.latents(images, target_error=0.005)[1], halting)


def test_a_dropped_token_is_as_if_masked(tokenizer):
    """The paper keeps dropped latents in the sequence, hidden from all tokens but themselves."""
    decoder = tokenizer.decoder
    latents = torch.randn(1, 12, 12)
    active = torch.tensor([[True, False, True, True, False, False] * 2])
    with torch.no_grad():
        tokens = decoder.ln_pre(decoder.embed(latents) + decoder.latent_positions[:12])
        grid = decoder.ln_pre(decoder.mask_token + decoder.positions)[None]
        seen = torch.cat([torch.ones(1, 64, dtype=torch.bool), active], 1)
        mask = (seen[:, :, None] & seen[:, None]) | torch.eye(76, dtype=torch.bool)
        x = torch.cat([grid, tokens], 1)
        for block in decoder.blocks:
            x = block(x, mask=mask[:, None])
        expected = decoder.head(decoder.ln_post(x[:, :64]))
        assert torch.allclose(decoder(latents, active), expected, atol=1e-5)


def test_requested_errors_fall_into_bins(tokenizer):
    bins = tokenizer.encoder.error_bin(torch.tensor([0.0, 0.005, 0.0051, 0.05, 0.38, 2.0]))
    assert bins.tolist() == [0, 0, 1, 5, 18, 18]
    assert len(ERRORS) == 19


@pytest.mark.parametrize(("base", "quantize"), [("vqgan", True), ("vae", False)])
def test_training_moves_every_trainable_weight(images, base, quantize):
    model = build(base, quantize)
    loss, parts = model(images, 8, torch.full((4,), 0.05), needed=5)
    loss.backward()
    still = {
        name
        for name, p in model.named_parameters()
        if not name.startswith("base.") and (p.grad is None or not p.grad.any())
    }
    assert not still
    assert torch.isclose(loss, sum(parts.values()))


def test_save_and_load_are_exact_and_bfloat16_is_close(tokenizer, images, tmp_path):
    """bfloat16: latents within 5 % of their range."""
    tokenizer.save_pretrained(tmp_path)
    again = KARL.from_pretrained(tmp_path).eval()
    tokens = tokenizer.encode(images)
    assert torch.equal(again.encode(images).nan_to_num(-9), tokens.nan_to_num(-9))
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))
    half = KARL.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.decode(half.encode(images)).isfinite().all()
    with torch.no_grad():
        exact = tokenizer.latents((images + 1) / 2)[0]
        rounded = half.latents((images.bfloat16() + 1) / 2)[0]
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 20, 16)), "16"),
        (lambda m: m.encode(torch.zeros(1, 3, 16, 16), 21), "1 to 20"),
        (lambda m: m.encode(torch.zeros(1, 3, 16, 16), target_error=-1.0), "0 or more"),
        (lambda m: m.decode(torch.full((1, 5), 32)), "0 to 31"),
        (lambda m: m.decode(torch.full((1, 5), -2)), "-2"),
        (lambda m: m.decode(torch.zeros(1, 21, dtype=torch.int64)), "1 to 20"),
        (lambda m: m.decode(torch.zeros(1, 5)), "whole numbers"),
    ],
)
def test_wrong_input_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call(build("vqgan", True))


def test_wrong_latents_and_bases_are_refused():
    with pytest.raises(InputError, match="12"):
        build("vae", False).decode(torch.zeros(1, 5, 11))
    with pytest.raises(InputError, match="vqvae"):
        KARL(base_type="vqvae")
    with pytest.raises(InputError, match="base tokenizer"):
        KARL(image_size=32, patch_size=2, base_config=VQGAN | {"channel_mult": [1]})


def test_another_checkpoint_is_refused_by_name(tokenizer):
    with pytest.raises(InputError, match="conv_in"):
        convert_state_dict({"conv_in.weight": torch.zeros(1)}, {})
    with pytest.raises(InputError, match="base"):
        load_strict(tokenizer, convert_state_dict({"ema.latent_tokens": torch.zeros(1)}, {}))


def test_reconstruction_within_budgets_says_what_was_used(tokenizer, images):
    out = ReconstructionPipeline(tokenizer)(images, num_tokens=[4, 12])
    for budget in (4, 12):
        tokens = tokenizer.encode(images, num_tokens=budget)
        assert out.used[budget] == tokenizer.lengths(tokens).tolist()
        decoded = tokenizer.decode(tokens).clamp(-1, 1)
        error = (decoded - images).square().mean((1, 2, 3))
        expected = 10 * torch.log10(4 / error)
        assert torch.allclose(torch.tensor(out.psnr[budget]), expected, atol=1e-2)
    assert list(ReconstructionPipeline(tokenizer)(images).psnr) == [1, 2, 4, 8, 12]
