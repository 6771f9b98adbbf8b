"""COMiT: orders of observation, partial calls, batches, precision, training, what it refuses."""

from __future__ import annotations

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.tokenizers.image.comit import COMiT
from tessera.weights.convert.comit import convert_state_dict, read_config
from tessera.weights.loading import load_strict


@pytest.fixture(scope="module")
def tokenizer() -> COMiT:
    """A tiny one over pixels with 2x2 crops, every weight random so that no path is zero."""
    torch.manual_seed(0)
    model = COMiT(
        image_size=16,
        crop_size=10,
        crop_stride=6,
        latent_channels=3,
        latent_size=16,
        num_message_tokens=6,
        fsq_levels=(5, 4, 3),
        dim=32,
        depth=2,
        heads=2,
        num_inference_steps=2,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def noises(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_partial_calls_equal_the_full_one(tokenizer, images):
    predictor = tokenizer.predictor
    t, offset = torch.rand(3), torch.randn(3, 2)
    codes = tokenizer.quantizer.ids_to_codes(tokenizer.encode(images))
    with torch.no_grad():
        velocity, message, _ = predictor(images, t, codes, offset)
        modulations, condition = predictor.modulations(t), predictor.condition(codes, offset)
        assert torch.allclose(
            predictor.velocity(images, modulations, *condition), velocity, atol=1e-5
        )
        alone = predictor.next_message(images, modulations, *condition)
    assert torch.allclose(alone, message, atol=1e-5)


def test_locations_are_centres_of_crops(tokenizer):
    places = tokenizer.locations(torch.tensor([-1, 0, 1, 3]))
    expected = [[0, 0], [-0.375, -0.375], [0.375, -0.375], [0.375, 0.375]]
    assert places.tolist() == expected


def test_orders(tokenizer, images):
    raster = tokenizer.observe(images)
    assert raster.crops.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.equal(raster.ids, tokenizer.encode(images))
    assert torch.equal(tokenizer.observe(images, [0, 1, 2, 3]).ids, raster.ids)
    rows = torch.tensor([[1, 2], [3, 0], [2, 1]])
    each = tokenizer.observe(images, rows)
    for i in range(3):
        assert torch.equal(tokenizer.observe(images[i, None], rows[i]).ids[0], each.ids[i])
    drawn = tokenizer.observe(images, "random", generator=noises(3))
    assert drawn.crops.sort(1).values.tolist() == [[0, 1, 2, 3]] * 3
    whole = tokenizer.observe(images, num_crops=2, global_crop=True)
    assert whole.crops.tolist() == [[0, 1]] * 3
    assert torch.equal(tokenizer.observe(images, [0], global_crop=True).offset, torch.zeros(3, 2))


def test_adaptive_order_of_a_picture_does_not_depend_on_the_batch(tokenizer, images):
    together = tokenizer.observe(images, "adaptive", generator=noises(3))
    assert (together.crops[:, 0] == 2).all()
    assert together.crops.sort(1).values.tolist() == [[0, 1, 2, 3]] * 3
    for i in range(3):
        alone = tokenizer.observe(images[i, None], "adaptive", generator=noises(3)[i : i + 1])
        assert torch.equal(alone.crops[0], together.crops[i])
        assert torch.equal(alone.ids[0], together.ids[i])


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_batch_equals_one_by_one(tokenizer, images, solver):
    ids = tokenizer.encode(images)
    together = tokenizer.sample_latents(ids, generator=noises(3), solver=solver)
    for i in range(3):
        assert torch.equal(tokenizer.encode(images[i, None])[0], ids[i])
        alone = tokenizer.sample_latents(
            ids[i, None], generator=noises(3)[i : i + 1], solver=solver
        )
        assert torch.allclose(alone[0], together[i], atol=1e-4)


def test_decode_takes_the_offset_of_the_raster_order(tokenizer, images):
    message = tokenizer.observe(images)
    given = tokenizer.decode(message.ids, generator=noises(3), offset=message.offset)
    assert torch.equal(tokenizer.decode(message.ids, generator=noises(3)), given)


def test_training_moves_every_trainable_weight(tokenizer, images):
    crops = torch.stack([images[..., :10, :10], images[..., 6:, 6:]], 1)
    locations = tokenizer.locations(torch.tensor([[0, 3]] * 3))
    loss, parts = tokenizer(images, crops, locations, torch.randn_like(images), torch.rand(3))
    loss.backward()
    still = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    tokenizer.zero_grad()
    # The guess of the offset is no part of the flow loss.
    assert still == ["predictor.offset_proj.weight", "predictor.offset_proj.bias"]
    assert parts["flow"] == loss


def test_save_and_load_are_exact_and_bfloat16_is_close(tokenizer, images, tmp_path):
    """bfloat16: velocities within 5 % of their range."""
    tokenizer.save_pretrained(tmp_path)
    again = COMiT.from_pretrained(tmp_path)
    ids = tokenizer.encode(images)
    assert torch.equal(again.encode(images), ids)
    full = tokenizer.decode(ids, generator=noises(3))
    assert torch.equal(again.decode(ids, generator=noises(3)), full)
    half = COMiT.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.encode(images).shape == ids.shape
    codes, t, offset = tokenizer.quantizer.ids_to_codes(ids), torch.rand(3), torch.zeros(3, 2)
    with torch.no_grad():
        exact = tokenizer.predictor(images, t, codes, offset)[0]
        rounded = half.predictor(images.bfloat16(), t, codes, offset)[0]
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 20, 16)), "16"),
        (lambda m: m.decode(torch.zeros(1, 5, dtype=torch.int64)), "6"),
        (lambda m: m.decode(torch.full((1, 6), 60)), "0 to 59"),
        (lambda m: m.observe(torch.zeros(1, 3, 16, 16), "spiral"), "spiral"),
        (lambda m: m.observe(torch.zeros(1, 3, 16, 16), [4]), "0 to 3"),
        (lambda m: m.observe(torch.zeros(1, 3, 16, 16), num_crops=5), "1 to 4"),
        (lambda m: m.sample_latents(torch.zeros(1, 6).long(), solver="rk4"), "rk4"),
    ],
)
def test_wrong_input_is_refused(tokenizer, call, words):
    with pytest.raises(InputError, match=words):
        call(tokenizer)


def test_another_checkpoint_is_refused_by_name(tokenizer):
    with pytest.raises(InputError, match="blocks"):
        convert_state_dict({"blocks.0.weight": torch.zeros(1)}, {})
    with pytest.raises(InputError, match="predictor"):
        load_strict(tokenizer, {})


def test_old_names_of_the_vae_and_the_configuration_are_read():
    old = "encoder.mid_block.attentions.0.proj_attn.weight"
    assert list(convert_state_dict({old: torch.zeros(1)}, {})) == [
        "vae.encoder.mid_block.attentions.0.to_out.0.weight"
    ]
    tree = {
        "predictor": {"_target_": "os.system", "hidden_size": 1024, "num_heads": 8},
        "quantizer": {"levels": [8, 8]},
    }
    assert read_config(tree) == {"dim": 1024, "heads": 8, "fsq_levels": [8, 8]}
    with pytest.warns(UserWarning, match="sd-vae-ft-mse"):
        read_config({"vae": {"type": "mse"}})
    with pytest.raises(InputError, match="predictor"):
        read_config({"predictor": 3})
