"""FlowAR: pyramid, cached sampling, guidance interval, seeds, training, files."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.flow.samplers import euler
from tessera.generators.next_scale.flowar import FlowAR, sampling_times
from tessera.generators.sampling import guide
from tessera.generators.schedules import guidance_weight
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.weights.convert.flowar import convert_state_dict
from tessera.weights.loading import load_strict
from tessera.weights.registry import list_models, model_info

CLASSES, SCALES, CHANNELS = 5, (1, 2, 4), 3
STEPS = {"num_steps": 4}


@pytest.fixture(scope="module", params=[False, True], ids=["small", "cross-attention"])
def model(request) -> FlowAR:
    """Every weight random, so that no path is zero."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "encoder_depth": 1, "decoder_depth": 2, "heads": 2}
    sizes |= {"flow_dim": 64, "flow_depth": 2, "cross_attention": request.param}
    model = FlowAR(CHANNELS, SCALES, CLASSES, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 16, CHANNELS, generator=torch.Generator().manual_seed(1))


def test_times_are_the_published_ones():
    assert sampling_times(50) == torch.linspace(1, 0, 51, dtype=torch.float64).tolist()
    times = sampling_times(25)
    assert len(times) == 25 and times[0] == 1 and times[11:13] == [0.3, 0.25] and times[-1] == 0
    assert sampling_times(2) == [1, 0.25, 0]


def test_the_pyramid_holds_averages(model, latents):
    one, two, four = model.pyramid(latents)
    image = latents.mT.view(3, CHANNELS, 4, 4)
    assert torch.equal(four, image) and torch.allclose(one[..., 0, 0], image.mean((2, 3)))
    assert torch.allclose(two[..., 0, 1], image[..., :2, 2:].mean((2, 3)))
    inputs = model.next_inputs([one, two, four])
    assert inputs.shape == (3, 20, CHANNELS)
    assert torch.allclose(inputs[:, :4], one.flatten(2).mT.expand(-1, 4, -1), atol=1e-5)


def test_a_scale_does_not_see_the_finer_ones(model, labels):
    inputs = torch.randn(3, 20, CHANNELS)
    changed = inputs.clone()
    changed[:, 4:] += 1
    before, after = model.features(inputs, labels), model.features(changed, labels)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


GUIDANCE = [(1.0, "linear"), (3.0, "linear"), (3.0, "constant")]


@pytest.mark.parametrize(("scale", "schedule"), GUIDANCE)
def test_cached_sampling_equals_full_recomputation(model, labels, scale, schedule):
    noise = [torch.randn(1, 3, p * p, CHANNELS) for p in SCALES]
    settings = {"guidance_scale": scale, "guidance_high": 0.5, "noise": noise}
    settings["guidance_schedule"] = schedule
    result = model.generate(labels, streams(0, 1, 2), **STEPS, **settings)
    null = torch.full_like(labels, CLASSES)
    inputs = torch.zeros(3, 20, CHANNELS)
    for k, (side, here) in enumerate(zip(SCALES, model.places, strict=True)):
        halves = [model.features(inputs, each)[:, here] for each in (labels, null)]
        weight = guidance_weight(schedule, scale, k / 2)

        def velocity(x, t, k=k, halves=halves, weight=weight):
            both = [model.velocity(x, torch.full((3,), t), z, k) for z in halves]
            return both[0] if t > 0.5 else guide(*both, weight)

        with torch.no_grad():
            *_, x = euler(velocity, noise[k][0], sampling_times(4))
            if k < 2:
                image = model.enlarge(x.mT.unflatten(2, (side, side)))
                following = model.places[k + 1]
                inputs[:, following.start - 1 : following.stop - 1] = model.next_input(image, k + 1)
    assert torch.allclose(result, x, atol=1e-4)


def test_guidance_acts_below_its_highest_time_alone(model, labels):
    free = model.generate(labels, streams(0, 1, 2), guidance_scale=1.0, **STEPS)
    for high, same in [(0.0, True), (0.3, False)]:
        result = model.generate(
            labels, streams(0, 1, 2), guidance_scale=4.0, guidance_high=high, **STEPS
        )
        assert torch.allclose(result, free, atol=1e-5) == same


def test_stream_yields_every_step_and_can_be_closed(model, labels):
    parts = list(model.stream(labels, streams(0, 1, 2), **STEPS))
    assert len(parts) == 12 and all(part.shape == (3, 16, CHANNELS) for part in parts)
    assert torch.allclose(parts[3], parts[3][:, :1].expand(-1, 16, -1), atol=1e-5)
    stream = model.stream(labels, streams(0, 1, 2), **STEPS)
    next(stream)
    stream.close()
    assert torch.equal(model.generate(labels, streams(0, 1, 2), **STEPS), parts[-1])


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama"])
def test_given_tokens_stay_and_steer_the_rest(model, labels, latents, sampler):
    settings = {**STEPS, "sampler": sampler}
    free = model.generate(labels, streams(0, 1, 2), **settings)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, :8] = True
    settings |= {"tokens": latents, "token_mask": mask}
    edited = model.generate(labels, streams(0, 1, 2), **settings)
    assert torch.equal(edited[mask], latents[mask])
    assert edited.isfinite().all() and not torch.allclose(edited[~mask], free[~mask], atol=0.01)


def test_a_new_model_predicts_nothing(model, labels, latents):
    new = FlowAR(**model.config)
    new.init_weights()
    new.eval()
    features = new.features(new.next_inputs(new.pyramid(latents)), labels)
    assert features.isfinite().all()
    assert not new.velocity(latents, torch.rand(3), features[:, new.places[2]], 2).any()


def test_saves_and_loads_exactly(model, labels, latents, tmp_path):
    model.save_pretrained(tmp_path)
    again = FlowAR.from_pretrained(tmp_path)
    result = model.generate(labels, streams(0, 1, 2), **STEPS)
    assert torch.equal(again.generate(labels, streams(0, 1, 2), **STEPS), result)
    half = FlowAR.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    inputs = model.next_inputs(model.pyramid(latents))
    times = torch.full((3,), 0.5)
    exact, rough = (
        m.velocity(latents, times, m.features(inputs, labels)[:, m.places[2]], 2)
        for m in (model, half)
    )
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    assert half.generate(labels, streams(0, 1, 2), **STEPS).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": torch.tensor([6])}, "0 to 4"),
        ({"generators": streams(0, 1)}, "1, got 2"),
        ({"num_steps": 1}, "2 steps or more"),
        ({"guidance_scale": 0.0}, "guidance scale"),
        ({"guidance_high": 1.5}, "guidance_high"),
        ({"sampler": "ddim"}, "ddim"),
        ({"time_shift": 0.0}, "time shift"),
        ({"token_mask": torch.ones(1, 16, dtype=torch.bool)}, "token_mask"),
        (
            {"tokens": torch.zeros(1, 16, 4), "token_mask": torch.ones(1, 16, dtype=torch.bool)},
            r"\[1, 16, 3\]",
        ),
    ],
)
def test_wrong_settings_are_refused(model, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(**{"labels": torch.tensor([0]), "generators": streams(0)} | settings)


def test_another_system_is_refused(model):
    with pytest.raises(InputError, match=r"time_embed\.mlp\.0\.weight"):
        convert_state_dict({"time_embed.mlp.0.weight": torch.zeros(8, 256)}, {})
    with pytest.raises(InputError, match=r'"output_positions" is missing'):
        load_strict(model, convert_state_dict({"z_proj.bias": torch.zeros(32)}, {}))


@pytest.mark.parametrize("name", list_models("flowar-*"))
def test_published_models(name):
    info = model_info(name)
    with torch.device("meta"):
        model = info.model_class()(**info.config)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(parameters / info.parameters - 1) < 0.01, parameters
    assert str(model.num_tokens) == info.tokens and info.non_commercial
