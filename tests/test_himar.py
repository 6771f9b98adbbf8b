"""Hi-MAR: both phases, seeds, in-painting, training, files."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.flow.diffusion import GaussianDiffusion
from tessera.generators.masked.himar import PIVOTS, HiMAR, sincos_positions
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.weights.convert.himar import convert_state_dict
from tessera.weights.loading import load_strict

P, N, C, CLASSES = 4, 16, 3, 5
# Few kept timesteps of small noise, so that random weights stay bounded.
STEPS = {"pivot_diffusion_steps": [0, 150, 300], "diffusion_steps": [0, 200, 400]}


def build(**options) -> HiMAR:
    """Every weight random, so that no path is zero."""
    torch.manual_seed(0)
    sizes = {"latent_dim": C, "num_pivots": P, "num_tokens": N, "num_classes": CLASSES}
    sizes |= {"encoder_dim": 32, "encoder_depth": 2, "encoder_heads": 4, "buffer_size": 3}
    sizes |= {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 2, "mlp_ratio": 2.0}
    sizes |= {"head_dim": 24, "head_depth": 2, "dit_dim": 24, "dit_depth": 2, "dit_heads": 2}
    sizes |= {"pivot_steps": 3, "num_steps": 3}
    model = HiMAR(**sizes, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> HiMAR:
    return build()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.fixture
def tokens() -> torch.Tensor:
    return 4 * torch.randn(3, N, C, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def pivots() -> torch.Tensor:
    return 4 * torch.randn(3, P, C, generator=torch.Generator().manual_seed(3))


def test_an_item_draws_the_same_alone_and_in_a_batch(model, labels):
    together = list(model.stream(labels, streams(5, 6, 7), **STEPS))
    assert [tuple(x.shape) for x in together] == [(3, P, C)] * 3 + [(3, N, C)] * 3
    assert together[-1].isfinite().all()
    for i in range(3):
        alone = model.generate(labels[i : i + 1], streams(5 + i), **STEPS)
        assert torch.allclose(alone[0], together[-1][i], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[-1][0], together[-1][1], atol=0.1)


def test_given_tokens_and_pivots_are_kept_and_do_not_depend_on_the_batch(
    model, labels, tokens, pivots
):
    """Items with different numbers of given ones, all and none among them."""
    random = torch.Generator().manual_seed(4)
    mask = torch.rand(3, N, generator=random) < 0.5
    mask[1], mask[2] = True, False
    pivot_mask = torch.rand(3, P, generator=random) < 0.5
    pivot_mask[2] = False
    given = {"tokens": tokens, "token_mask": mask, "pivots": pivots, "pivot_mask": pivot_mask}
    seen = list(model.stream(labels, streams(0, 1, 2), **given, **STEPS))
    for found in seen[:3]:
        assert torch.equal(found[pivot_mask], pivots[pivot_mask])
    for found in seen[3:]:
        assert torch.equal(found[mask], tokens[mask])
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in given.items()}
        alone = model.generate(labels[i : i + 1], streams(i), **one, **STEPS)
        assert torch.allclose(alone[0], seen[-1][i], rtol=1e-4, atol=1e-4)
    free = model.generate(labels, streams(0, 1, 2), **STEPS)
    assert torch.allclose(free[2], seen[-1][2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(free[0][~mask[0]], seen[-1][0][~mask[0]], atol=1e-2)


def test_tokens_that_were_written_stay(model, labels):
    """Of 16 tokens 13, 8 and 1 stay hidden after the three steps; the last step writes all."""
    seen = list(model.stream(labels, streams(0, 1, 2), **STEPS))[3:]
    for before, after, hidden in zip(seen, seen[1:], (13, 8), strict=False):
        changed = (before != after).any(-1).sum(1)
        assert changed.tolist() == [hidden] * 3


@pytest.mark.parametrize(
    ("scales", "expected"),
    [((1.0, 1.0), [3] * 6), ((2.0, 1.0), [6] * 3 + [3] * 3), ((1.0, 2.0), [3] * 3 + [6] * 3)],
)
def test_scale_1_runs_no_unconditional_half(model, labels, scales, expected):
    rows = []
    hook = model.decoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    settings = {"pivot_guidance_scale": scales[0], "guidance_scale": scales[1], **STEPS}
    model.generate(labels, streams(0, 1, 2), **settings)
    hook.remove()
    assert rows == expected


def test_hidden_pivots_are_not_read(model, labels, pivots):
    places = torch.arange(P).expand(3, -1)

    def features(values: torch.Tensor) -> torch.Tensor:
        modulations = model.modulations(PIVOTS)
        return model.pivot_features(
            values, places[:, :2], places, model.classes(labels), modulations
        )

    changed = pivots.clone()
    changed[:, 2:] = 9.0
    assert torch.equal(features(changed), features(pivots))
    changed[:, :1] = 9.0
    assert not torch.allclose(features(changed), features(pivots))


def test_known_tokens_hold_the_noise_of_the_start(model, labels):
    """What the head reads at known places is the token at that step's noise, from one draw."""
    head, process = model.dit_head, GaussianDiffusion([0, 200, 400])
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 1, N, C, generator=random)
    tokens, known = torch.randn(1, N, C, generator=random), torch.rand(1, N, generator=random) < 0.5
    seen = []
    hook = head.input_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    head.sample(torch.randn(1, N, 24, generator=random), process, noise, tokens, known)
    hook.remove()
    for x, step in zip(seen, (2, 1, 0), strict=True):
        kept = float(process.alphas_cumprod[step])
        expected = kept**0.5 * tokens + (1 - kept) ** 0.5 * noise[0]
        assert torch.allclose(x[known], expected[known], atol=1e-5)
    assert torch.equal(seen[0][~known], noise[0][~known])


def test_positions_are_those_of_column_then_row():
    table = sincos_positions(4, 8).view(4, 4, 8)
    row, column = 2, 3
    angle = torch.tensor([1.0, 0.01])
    half = torch.cat([(column * angle).sin(), (column * angle).cos()])
    assert torch.allclose(table[row, column, :4], half)
    half = torch.cat([(row * angle).sin(), (row * angle).cos()])
    assert torch.allclose(table[row, column, 4:], half)


def test_training_lowers_the_loss_and_reaches_every_weight(labels, tokens, pivots):
    model = build(label_dropout=0.5).train()
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(8):
        seed = torch.Generator().manual_seed(42)  # Three of four pivots are hidden.
        loss, parts = model(tokens, pivots, labels, seed, pivot_rate=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert set(parts) == {"pivot_loss", "token_loss"}
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_pivots_reach_the_second_phase_only_at_their_rate(labels, tokens, pivots):
    model = build()
    for rate, reached in ((0.0, False), (1.0, True)):
        model.zero_grad()
        model(tokens, pivots, labels, torch.Generator().manual_seed(1), pivot_rate=rate)[
            0
        ].backward()
        assert bool(model.pivot_feature_proj.weight.grad.any()) == reached
        if not reached:
            assert model.pivot_placeholder.grad.any() and model.pivot_proj.weight.grad.any()


def test_save_and_load_are_exact(model, labels, tmp_path):
    model.save_pretrained(tmp_path)
    again = HiMAR.from_pretrained(tmp_path)
    state = {**again.state_dict(), "positions": again.dit_head.positions}
    for name, value in {**model.state_dict(), "positions": model.dit_head.positions}.items():
        assert torch.equal(state[name], value), name
    # Products may round in another order where the weights lie at other addresses.
    expected = model.generate(labels, streams(0, 1, 2), **STEPS)
    found = again.generate(labels, streams(0, 1, 2), **STEPS)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close(model, labels, tokens):
    """Features and noise within 5 % of the largest, and it samples."""

    def run(of: HiMAR) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(P).expand(3, -1)
        z = of.pivot_features(
            tokens[:, :P], places[:, :2], places, of.classes(labels), of.modulations(PIVOTS)
        )
        features = z.repeat(1, N // P, 1)
        return z.float(), of.dit_head(tokens, torch.tensor([3, 400, 900]), features)

    half = build()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    for found, expected in zip(run(half), run(model), strict=True):
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert half.generate(labels, streams(0, 1, 2), **STEPS).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": 0}, "1 to 16 steps, got 0"),
        ({"pivot_steps": 5}, "1 to 4 steps, got 5"),
        ({"temperature": -1.0}, "Temperature must be 0"),
        ({"diffusion_steps": 1}, "Diffusion takes 2 to 1000 steps, got 1"),
        ({"guidance_schedule": "steep"}, 'Unknown guidance schedule "steep"'),
        ({"labels": torch.tensor([0, 1, CLASSES + 1])}, "Class labels must lie in 0 to 4"),
        ({"generators": streams(0)}, "one random generator an item: 3, got 1"),
        ({"tokens": torch.zeros(3, N, C)}, "tokens together with token_mask"),
        (
            {"pivots": torch.zeros(3, P, C + 1), "pivot_mask": torch.ones(3, P).bool()},
            "must have the shapes",
        ),
    ],
)
def test_illegal_settings_are_refused(model, labels, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(**{"labels": labels, "generators": streams(0, 1, 2), **STEPS, **settings})


def test_weights_of_another_system_are_refused(model):
    with pytest.raises(InputError, match='"cls_token" is not a weight'):
        convert_state_dict({"model_ema.cls_token": torch.zeros(1, 2, 2)}, model.config)
    state = convert_state_dict({"model_ema.fake_latent": torch.zeros(1, 32)}, model.config)
    assert set(state) == {"null_class"}
    with pytest.raises(InputError, match='"pivot_placeholder" is missing'):
        load_strict(model, state)
