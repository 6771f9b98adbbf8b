"""MaskGIT: the masked sampler, seeds, in-painting, training, files."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.masked.maskgit import MaskGIT
from tessera.generators.masked.masking import mask_lowest, masked_loss, random_mask, sample_masked
from tessera.generators.schedules import guidance_weight, masked_counts
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.weights.convert.maskgit import convert_state_dict
from tessera.weights.loading import load_strict

V, N, CLASSES = 24, 12, 5


def build(trunk: str, **options) -> MaskGIT:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "num_tokens": N, "num_classes": CLASSES, "trunk": trunk}
    sizes |= {"dim": 32, "depth": 2, "heads": 4, "mlp_hidden": 48, "num_steps": 5}
    model = MaskGIT(**sizes, **options)
    model.init_weights()
    return model


@pytest.fixture(scope="module", params=["bert", "uvit"])
def model(request) -> MaskGIT:
    """Every weight random, so that no path is zero."""
    model = build(request.param)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"guidance_scale": 1.0}, [3] * 5),
        ({"guidance_schedule": "linear"}, [3] + [6] * 4),
        ({"guidance_schedule": "constant"}, [6] * 5),
    ],
)
def test_the_unconditional_half_runs_only_where_it_counts(model, labels, settings, expected):
    rows = []
    hook = model.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model.generate(labels, streams(0, 1, 2), **settings)
    hook.remove()
    assert rows == expected


def test_each_step_hides_what_the_schedule_says():
    """32 tokens in 8 steps, as the paper's model, and steps beyond the number of tokens."""
    assert masked_counts("arccos", 32, 8) == [29, 26, 24, 21, 18, 14, 10, 1]
    assert masked_counts("cosine", 3, 6) == [2, 1, 1, 1, 1, 1]
    score = torch.tensor([[3.0, 1.0, torch.inf, 2.0], [0.0, torch.inf, torch.inf, 5.0]])
    masked = torch.isfinite(score)
    again = mask_lowest(score, masked, torch.tensor([2, 1]))
    assert again.tolist() == [[False, True, False, True], [True, False, False, False]]


def test_ids_are_drawn_by_their_probability():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4000, -1)
    uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(1, 4000).bool()
    ids, score = sample_masked(logits, torch.zeros(1, 4000).long(), hidden, 1.0, uniform)
    expected = logits[0, 0].exp() * 4000
    chi_square = ((ids[0].bincount(minlength=4) - expected).square() / expected).sum()
    assert chi_square < 16.3  # The 0.1 % point of 3 degrees of freedom.
    assert torch.equal(score, logits.gather(-1, ids[..., None])[..., 0])
    greedy, _ = sample_masked(logits, ids, hidden, 0.0, uniform)
    assert not greedy.any()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [5, 5, 5]),
        ("linear", [1, 3, 5]),
        ("cosine", [1, 3, 5]),
        ("power-cosine", [1, 1 + 4 * 0.5 * (1 - 0.5**0.5), 5]),
        ("flipped-cosine", [3, 1 + 4 * 0.5 * 0.5**0.5, -1]),
    ],
)
def test_guidance_schedules(schedule, expected):
    """Power 2 at the start, the middle and the end."""
    found = [guidance_weight(schedule, 5.0, r, 2.0) for r in (0.0, 0.5, 1.0)]
    assert found == pytest.approx(expected)


def test_loss_weighs_hidden_tokens_ten_times(tokens):
    logits = torch.randn(3, N, V, generator=torch.Generator().manual_seed(1))
    masked = random_mask(tokens, torch.Generator().manual_seed(0))
    loss, parts = masked_loss(logits, tokens, masked, label_smoothing=0.0)
    nll = -logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    weight = masked.float() * 0.9 + 0.1
    assert torch.allclose(loss, (nll * weight).sum() / weight.sum())
    assert torch.allclose(parts["masked_nll"], nll[masked].mean())


def test_masks_hide_an_arccos_share():
    """One token at least; on average 1 - integral of arcsin, 2/pi of them."""
    masked = random_mask(torch.zeros(4000, 16), torch.Generator().manual_seed(0))
    assert masked.sum(1).min() >= 1
    assert abs(masked.float().mean() - 0.6366) < 0.01
    assert (masked.float().mean(0) - 0.6366).abs().max() < 0.04


def test_labels_are_dropped_in_training_only(labels, tokens):
    model = build("uvit", label_dropout=1.0)
    null = torch.full_like(labels, CLASSES)
    seeds = [torch.Generator().manual_seed(0) for _ in range(3)]
    seen = []
    logits = model.logits
    model.logits = lambda ids, labels: seen.append(labels) or logits(ids, labels)
    model.train()(tokens, labels, seeds[0])
    model.eval()(tokens, labels, seeds[1])
    assert torch.equal(seen[0], null) and torch.equal(seen[1], labels)


def test_bfloat16_is_close(model, labels, tokens):
    """Within 5 % of the largest logit, and it samples."""
    expected = model.logits(tokens, labels)
    half = build(model.config.trunk).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    difference = (half.logits(tokens, labels).float() - expected).abs().max()
    assert difference < 0.05 * expected.abs().max()
    assert half.generate(labels, streams(0, 1, 2)).shape == (3, N)


def test_unknown_trunk_is_refused():
    with pytest.raises(InputError, match='"bert" or "uvit", got "resnet"'):
        MaskGIT(trunk="resnet")


def test_weights_of_another_system_are_refused(model):
    with pytest.raises(InputError, match='"pos_embedding" is not a weight'):
        convert_state_dict({"pos_embedding": torch.zeros(1, 2, 2)}, model.config)
    table = torch.zeros(V + CLASSES + 2, 32)
    name = {"bert": "model.embeddings.word_embeddings.weight", "uvit": "embeddings.weight"}
    state = convert_state_dict({name[model.config.trunk]: table}, model.config)
    with pytest.raises(InputError, match='"positions" is missing'):
        load_strict(model, state)
