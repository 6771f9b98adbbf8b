"""Token-Shuffle: windows over any grid, and the generator that writes a window at a time."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.generators.autoregressive.token_shuffle import (
    TokenShuffle,
    TokenShuffleAR,
    TokenUnshuffle,
    group,
    ungroup,
    window_places,
)
from tessera.generators.sampling import guide
from tessera.generators.schedules import guidance_weight
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams

V, TEXT, GRID = 24, 10, (3, 5)
PROMPTS = [[1, 2, 3], [], [7]]


@pytest.fixture(scope="module", params=[(2, 2), (1, 1)], ids=["window-2x2", "window-1x1"])
def model(request) -> TokenShuffleAR:
    """Every weight random, so that no path is zero; the grid is no multiple of the window."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 4, "mlp_hidden": 48, "guidance_scale": 3.0}
    model = TokenShuffleAR(V, GRID, request.param, TEXT, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, V, (3, 15), generator=torch.Generator().manual_seed(2))


def test_a_window_holds_its_tokens_in_raster_order():
    w = 6
    places = window_places((4, w), (2, 2)).view(2, 3, 4)
    for i in range(2):
        for j in range(3):
            top = 2 * i * w + 2 * j
            assert places[i, j].tolist() == [top, top + 1, top + w, top + w + 1]
    assert window_places((3, 3), (2, 2)).tolist() == [
        [0, 1, 3, 4],
        [2, 9, 5, 9],
        [6, 7, 9, 9],
        [8, 9, 9, 9],
    ]


SHAPES = [((7,), (3,)), ((4, 6), (2, 2)), ((3, 5), (2, 2)), ((3, 4, 5), (2, 2, 1))]


@pytest.mark.parametrize(("grid", "window"), SHAPES)
def test_grouping_is_undone(grid, window):
    count = math.prod(grid)
    places = window_places(grid, window)
    real = places[places < count]
    assert torch.equal(real.sort().values, torch.arange(count))
    x = torch.randn(2, count, 5)
    grouped = group(x, places)
    assert torch.equal(ungroup(grouped, places, count), x)
    assert not grouped[:, places == count].any()


@pytest.mark.parametrize(("grid", "window"), SHAPES)
def test_shuffle_and_unshuffle_with_identities_are_the_identity(grid, window):
    size = math.prod(window)
    dim = 4 * size
    shuffle, unshuffle = TokenShuffle(dim, window), TokenUnshuffle(dim, window)
    for op in (shuffle, unshuffle):
        for parameter in op.parameters():
            torch.nn.init.zeros_(parameter)
    eye = torch.eye(4, dim)
    shuffle.compress.weight.data.copy_(eye)
    unshuffle.expand.weight.data.copy_(eye.T)
    x = torch.randn(2, math.prod(grid), dim)
    x[..., 4:] = 0
    fused = shuffle(x, grid)
    assert fused.shape == (2, len(window_places(grid, window)), dim)
    assert torch.equal(unshuffle(fused, grid), x)


def test_a_window_of_one_token_is_no_operation():
    x = torch.randn(2, 6, 8)
    for op in (TokenShuffle(8, (1, 1)), TokenUnshuffle(8, (1, 1))):
        assert torch.equal(op(x, (2, 3)), x) and not list(op.parameters())


def test_a_new_model_is_a_plain_one(tokens):
    """The MLPs of the windows begin as nothing."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 1, "heads": 4, "mlp_hidden": 48}
    model = TokenShuffleAR(V, GRID, (2, 2), TEXT, **sizes)
    model.init_weights()
    x = torch.randn(1, 2, 32)
    assert torch.equal(model.shuffle.blocks(x), x) and torch.equal(model.unshuffle.blocks(x), x)
    loss, _ = model.eval()(tokens, PROMPTS)
    assert abs(float(loss.detach()) - math.log(V)) < 0.1


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_decoding_equals_full_recomputation(model, scale):
    ids = model.generate(PROMPTS, streams(0, 1, 2), guidance_scale=scale, temperature=0)
    windows = group(ids, model.places)
    logits, null = model.logits(ids, PROMPTS), model.logits(ids, [[]] * 3)
    count = len(model.places)
    for i in range(count):
        weight = guidance_weight("half-linear", scale, i / count)
        guided = guide(logits[:, i], null[:, i], weight)
        inside = model.places[i] < 15
        assert torch.equal(guided.argmax(-1)[:, inside], windows[:, i, inside])


def test_the_scale_of_guidance_rises_in_the_first_half():
    weights = [guidance_weight("half-linear", 7.0, i / 8) for i in range(9)]
    assert weights[:5] == [1.0, 2.5, 4.0, 5.5, 7.0] and weights[5:] == [7.0] * 4


def test_a_window_sees_the_ones_before_alone(model, tokens):
    before = model.logits(tokens, PROMPTS)
    count = len(model.places)
    for i in (0, count // 2):
        changed = tokens.clone()
        changed[:, model.places[i][model.places[i] < 15]] += 1
        after = model.logits(changed % V, PROMPTS)
        assert torch.equal(after[:, : i + 1], before[:, : i + 1])
        assert not torch.allclose(after[:, i + 1], before[:, i + 1])


def test_batch_equals_one_by_one(model):
    """Whatever the length of the longest text of the batch."""
    together = model.generate(PROMPTS, streams(5, 6, 7))
    for i in range(3):
        assert torch.equal(model.generate([PROMPTS[i]], streams(5 + i))[0], together[i])
    assert torch.equal(model.generate(PROMPTS, streams(5, 6, 7)), together)
    assert not torch.equal(model.generate(PROMPTS, streams(8, 9, 10)), together)


def test_stream_yields_windows_and_can_be_closed(model):
    parts = list(model.stream(PROMPTS, streams(0, 1, 2)))
    assert len(parts) == len(model.places)
    for i, part in enumerate(parts):
        written = model.places[: i + 1].flatten()
        written = written[written < 15]
        assert torch.equal(part[:, written], parts[-1][:, written]) and part.shape == (3, 15)
        assert int((part != 0).sum()) <= 3 * len(written)
    stream = model.stream(PROMPTS, streams(0, 1, 2))
    next(stream)
    stream.close()
    assert torch.equal(model.generate(PROMPTS, streams(0, 1, 2)), parts[-1])


def test_given_tokens_stay_and_steer_the_rest(model):
    free = model.generate(PROMPTS, streams(0, 1, 2), temperature=0)
    mask = torch.zeros(3, 15, dtype=torch.bool)
    mask[:, :5] = True
    given = (free + 7) % V
    edited = model.generate(PROMPTS, streams(0, 1, 2), temperature=0, tokens=given, token_mask=mask)
    assert torch.equal(edited[mask], given[mask]) and not torch.equal(edited[~mask], free[~mask])


def test_training_moves_every_weight(model, tokens):
    loss, parts = model(tokens, PROMPTS)
    loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    assert still == [] and parts["nll"] == loss
    model.register_to_config(z_loss=0.5)
    with_z = model(tokens, PROMPTS)[0]
    model.register_to_config(z_loss=0.0)
    assert torch.allclose(with_z, loss + 0.5 * parts["z"])


def test_prompts_are_dropped_in_training_alone(model, tokens):
    model.register_to_config(prompt_dropout=1.0)
    kept, empty = model(tokens, PROMPTS)[0], model(tokens, [[]] * 3)[0]
    dropped = model.train()(tokens, PROMPTS)[0]
    model.eval().register_to_config(prompt_dropout=0.1)
    assert torch.allclose(dropped, empty) and not torch.allclose(kept, empty)


def test_saves_and_loads_exactly(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    again = TokenShuffleAR.from_pretrained(tmp_path)
    ids = model.generate(PROMPTS, streams(0, 1, 2))
    assert torch.equal(again.generate(PROMPTS, streams(0, 1, 2)), ids)
    half = TokenShuffleAR.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    exact = model.logits(tokens, PROMPTS)
    assert (half.logits(tokens, PROMPTS) - exact).abs().max() < 0.05 * exact.abs().max()
    assert half.generate(PROMPTS, streams(0, 1, 2)).shape == ids.shape


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": [[10]]}, "0 to 9, got 10"),
        ({"generators": streams(0, 1)}, "1, got 2"),
        ({"temperature": -1.0}, "Temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance_schedule": "steep"}, "steep"),
        ({"tokens": torch.zeros(1, 15, dtype=torch.int64)}, "token_mask"),
    ],
)
def test_wrong_settings_are_refused(model, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(**{"prompts": [[1]], "generators": streams(0)} | settings)


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="width of 10"):
        TokenShuffle(10, (2, 2))
    with pytest.raises(InputError, match="one side"):
        window_places((4, 4), (2,))
