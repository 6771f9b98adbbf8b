"""The written-down encoder says local principal components, coarse ones first."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.tokenizers.image.flextok import FlexTok
from tessera.training.warm_start import SPREAD, local_components, patch_order, patch_vectors

CONFIG = {
    "image_size": 8,
    "latent_channels": 4,
    "latent_size": 8,
    "patch_size": 4,
    "max_grid": 2,
    "num_registers": 16,
    "fsq_levels": (8, 8, 8),
    "encoder_dim": 128,
    "encoder_depth": 1,
    "decoder_dim": 128,
    "decoder_depth": 2,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "normalized_guidance": False,
}


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Smooth latents with a common part, as those of pictures are."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(512, 4, 2, 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear")
    return 2 * smooth + 0.2 * torch.randn(512, 4, 8, 8, generator=generator) + 0.5


@pytest.fixture(scope="module")
def tokenizer(latents) -> FlexTok:
    torch.manual_seed(0)
    tokenizer = FlexTok(**CONFIG)
    tokenizer.init_weights()
    local_components(tokenizer, latents)
    return tokenizer.eval()


def components(tokenizer: FlexTok, latents: torch.Tensor) -> torch.Tensor:
    """The 12 whitened components of each patch, as registers ``[B, 16, 3]``."""
    vectors = patch_vectors(tokenizer.encoder.patch_embed, latents)
    centred = vectors - vectors.mean((0, 1))
    values, basis = torch.linalg.eigh(torch.cov(centred.flatten(0, 1).T))
    found = centred @ basis.flip(1)[:, :12] / values.flip(0)[:12].sqrt()
    return found[:, patch_order(2)].unflatten(2, (4, 3)).transpose(1, 2).flatten(1, 2)


def test_registers_say_the_components_of_their_patch(tokenizer, latents):
    with torch.no_grad():
        z = tokenizer.encoder(latents, 16)
    wanted = components(tokenizer, latents)
    for register in range(16):
        for value in range(3):
            pair = torch.stack([z[:, register, value], wanted[:, register, value]])
            # A component's sign is a matter of convention.
            assert torch.corrcoef(pair)[0, 1].abs() > 0.98
    spread = z.unflatten(1, (4, 4)).std((0, 2))
    assert torch.allclose(spread, torch.full((4, 3), SPREAD), rtol=0.1)


def test_every_doubling_of_the_tokens_keeps_more(tokenizer, latents):
    ids = tokenizer.encode_from_latents(latents)
    codes = tokenizer.quantizer.ids_to_codes(ids)
    errors = []
    for count in (1, 2, 4, 8, 16):
        known = torch.cat([codes[:, :count].flatten(1), torch.ones(512, 1)], dim=1)
        rebuilt = known @ torch.linalg.lstsq(known, latents.flatten(1)).solution
        errors.append(float((rebuilt - latents.flatten(1)).square().mean()))
    assert all(later < 0.9 * earlier for earlier, later in pairwise(errors))
    assert torch.equal(tokenizer.encode_from_latents(latents, 4), ids[:, :4])


def test_orders_are_spread_permutations():
    for grid in (1, 2, 4, 8):
        order = patch_order(grid)
        assert sorted(order.tolist()) == list(range(grid * grid))
    first = {(p // 4 // 2, p % 4 // 2) for p in patch_order(4)[:4].tolist()}
    assert len(first) == 4  # One patch of each quarter.


def test_the_decoder_can_be_trained_under_it(tokenizer, latents):
    ids = tokenizer.encode_from_latents(latents)
    model = FlexTok(**CONFIG)
    model.load_state_dict(tokenizer.state_dict())
    model.encoder.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-5)
    losses = []
    for _ in range(60):
        loss, _ = model(
            latents[:64], torch.zeros_like(latents[:64]), torch.ones(64), 16, ids=ids[:64]
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model.encode_from_latents(latents), ids)


@pytest.mark.parametrize("change", [{"encoder_depth": 2}, {"num_registers": 15}, {"max_grid": 4}])
def test_other_forms_are_refused(latents, change):
    with pytest.raises(InputError, match="start: components needs"):
        local_components(FlexTok(**{**CONFIG, **change}), latents)
