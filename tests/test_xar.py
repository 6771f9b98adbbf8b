"""xAR: cells, cached sampling, seeds, training, files."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.autoregressive.xar import XAR
from tessera.generators.flow.samplers import euler, flow_times
from tessera.generators.orders import cell_order
from tessera.generators.sampling import guide
from tessera.generators.schedules import guidance_weight
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.weights.convert.xar import convert_state_dict
from tessera.weights.loading import load_strict
from tessera.weights.registry import list_models, model_info

CLASSES, SIDE, CHANNELS = 5, 4, 3
STEPS = {"num_steps": 3}


@pytest.fixture(scope="module")
def model() -> XAR:
    """Every weight random, so that no path is zero."""
    torch.manual_seed(0)
    model = XAR(CHANNELS, SIDE, 2, CLASSES, dim=32, encoder_depth=1, decoder_depth=2, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, SIDE**2, CHANNELS, generator=torch.Generator().manual_seed(1))


def test_cells_are_blocks_of_the_picture(model, latents):
    assert cell_order(4, 2).view(4, 4).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    cells = model.cells(latents)
    image = latents.view(3, SIDE, SIDE, CHANNELS)
    assert torch.equal(cells[:, 1].view(3, 2, 2, CHANNELS), image[:, :2, 2:])
    assert torch.equal(model.latents(cells), latents)


def test_a_cell_does_not_see_later_ones_but_their_time_and_its_own(model, labels, latents):
    cells, times = model.cells(latents), torch.full((3, 4), 0.5)
    before = model.velocity(cells, times, labels)
    changed, later = cells.clone(), times.clone()
    changed[:, 2:] += 1
    later[:, 2:] = 0.9
    after = model.velocity(changed, later, labels)
    assert torch.equal(before[:, :2], after[:, :2]) and not torch.allclose(
        before[:, 2:], after[:, 2:]
    )
    earlier = times.clone()
    earlier[:, 0] = 0.9
    assert not torch.allclose(model.velocity(cells, earlier, labels)[:, 3], before[:, 3])


GUIDANCE = [(1.0, "linear"), (3.0, "linear"), (3.0, "constant")]


@pytest.mark.parametrize(("scale", "schedule"), GUIDANCE)
def test_cached_sampling_equals_full_recomputation(model, labels, scale, schedule):
    noise = torch.randn(4, 1, 3, 4, CHANNELS)
    settings = {"sampler": "euler", "guidance_scale": scale, "noise": noise}
    settings["guidance_schedule"] = schedule
    result = model.generate(labels, streams(0, 1, 2), **STEPS, **settings)
    cells = torch.zeros(3, 4, 4, CHANNELS)
    null = torch.full_like(labels, CLASSES)
    for cell in range(4):
        weight = guidance_weight(schedule, scale, cell / 3)

        def velocity(x, t, cell=cell, weight=weight):
            cells[:, cell] = x
            times = torch.zeros(3, 4)
            times[:, cell:] = t
            halves = (model.velocity(cells, times, each)[:, cell] for each in (labels, null))
            return guide(*halves, weight)

        with torch.no_grad():
            *_, cells[:, cell] = euler(velocity, noise[cell, 0], flow_times("euler", 3))
    assert torch.allclose(result, model.latents(cells), atol=1e-4)


def test_stream_yields_every_step_and_can_be_closed(model, labels):
    parts = list(model.stream(labels, streams(0, 1, 2), **STEPS))
    assert len(parts) == 12 and all(part.shape == (3, SIDE**2, CHANNELS) for part in parts)
    first = [model.cells(part)[:, 0] for part in parts]
    assert torch.equal(first[2], first[-1]) and not torch.equal(first[1], first[2])
    assert not model.cells(parts[2])[:, 1:].any()
    stream = model.stream(labels, streams(0, 1, 2), **STEPS)
    next(stream)
    stream.close()
    assert torch.equal(model.generate(labels, streams(0, 1, 2), **STEPS), parts[-1])


@pytest.mark.parametrize("sampler", ["euler-maruyama", "euler"])
def test_given_tokens_stay_and_steer_the_rest(model, labels, latents, sampler):
    settings = {**STEPS, "sampler": sampler}
    free = model.generate(labels, streams(0, 1, 2), **settings)
    mask = torch.zeros(3, SIDE**2, dtype=torch.bool)
    mask[:, :7] = True
    settings |= {"tokens": latents, "token_mask": mask}
    edited = model.generate(labels, streams(0, 1, 2), **settings)
    assert torch.equal(edited[mask], latents[mask])
    assert edited.isfinite().all() and not torch.allclose(edited[~mask], free[~mask], atol=0.1)


def test_labels_are_dropped_in_training_alone(model, labels, latents):
    def loss(labels):
        return model(latents, labels, torch.Generator().manual_seed(0))[0]

    null = torch.full_like(labels, CLASSES)
    model.register_to_config(label_dropout=1.0)
    kept, model.transformer.training = loss(labels), False
    model.training = True
    torch.manual_seed(0)
    dropped, fixed = loss(labels), loss(null)
    model.eval()
    model.register_to_config(label_dropout=0.1)
    assert torch.equal(dropped, fixed) and not torch.allclose(kept, loss(null))


def test_a_new_model_starts_small(labels, latents):
    torch.manual_seed(0)
    model = XAR(CHANNELS, SIDE, 2, CLASSES, dim=32, encoder_depth=1, decoder_depth=1, heads=2)
    model.init_weights()
    loss, _ = model.eval()(latents, labels)
    assert 0 < float(loss.detach()) < 10 and model.transformer.encoder_positions.std() < 0.03


def test_saves_and_loads_exactly(model, labels, latents, tmp_path):
    model.save_pretrained(tmp_path)
    again = XAR.from_pretrained(tmp_path)
    result = model.generate(labels, streams(0, 1, 2), **STEPS)
    assert torch.equal(again.generate(labels, streams(0, 1, 2), **STEPS), result)
    half = XAR.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    times = torch.full((3, 4), 0.5)
    exact = model.velocity(model.cells(latents), times, labels)
    error = half.velocity(model.cells(latents), times, labels) - exact
    assert error.abs().max() < 0.05 * exact.abs().max()
    assert half.generate(labels, streams(0, 1, 2), **STEPS).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": torch.tensor([6])}, "0 to 4"),
        ({"generators": streams(0, 1)}, "1, got 2"),
        ({"num_steps": 1}, "2 steps or more, got 1"),
        ({"guidance_scale": 0.5}, "guidance scale"),
        ({"sampler": "ddim"}, "ddim"),
        ({"time_shift": -1.0}, "time shift"),
        ({"tokens": torch.zeros(1, 16, 3)}, "token_mask"),
        (
            {"tokens": torch.zeros(1, 9, 3), "token_mask": torch.ones(1, 9, dtype=torch.bool)},
            r"\[1, 16, 3\]",
        ),
    ],
)
def test_wrong_settings_are_refused(model, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(**{"labels": torch.tensor([0]), "generators": streams(0)} | settings)


def test_cells_that_do_not_divide_the_picture_are_refused():
    with pytest.raises(InputError, match="Cells of 3"):
        XAR(CHANNELS, 4, 3)


def test_training_checkpoints_and_other_systems(model):
    state = {"model.pred.bias": torch.zeros(3), "model_ema.pred.bias": torch.ones(3)}
    assert convert_state_dict(state, {})["output.bias"].all()
    with pytest.raises(InputError, match=r"flownet\.input_proj\.weight"):
        convert_state_dict({"flownet.input_proj.weight": torch.zeros(8, 3)}, {})
    with pytest.raises(InputError, match=r'"class_embedding\.weight" is missing'):
        load_strict(model, convert_state_dict({"pred.bias": torch.zeros(3)}, {}))


@pytest.mark.parametrize("name", list_models("xar-*"))
def test_published_models(name):
    info = model_info(name)
    with torch.device("meta"):
        model = info.model_class()(**info.config)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(parameters / info.parameters - 1) < 0.01, parameters
    assert str(model.num_tokens) == info.tokens and info.non_commercial
