"""RAR: cached decoding, seeds, orders, training, files."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.autoregressive import rar
from tessera.generators.autoregressive.rar import RAR
from tessera.generators.sampling import guide
from tessera.generators.schedules import guidance_weight
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.weights.convert.rar import convert_state_dict
from tessera.weights.loading import load_strict

V, N, CLASSES = 24, 10, 5


def build(**options) -> RAR:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "num_tokens": N, "num_classes": CLASSES}
    sizes |= {"dim": 32, "depth": 2, "heads": 4, "mlp_hidden": 48}
    return RAR(**sizes, guidance_scale=4.0, **options)


@pytest.fixture(scope="module")
def model() -> RAR:
    """Every weight random, so that no path is zero."""
    model = build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_cached_decoding_equals_full_recomputation(model, labels, monkeypatch, scale, rows):
    """Whatever number of modulations is computed at a time."""
    monkeypatch.setattr(rar, "MODULATION_ROWS", rows)
    ids = model.generate(labels, streams(0, 1, 2), guidance_scale=scale, temperature=0)
    logits = model.logits(ids[:, :-1], labels)
    null = model.logits(ids[:, :-1], torch.full_like(labels, CLASSES))
    for i in range(N):
        weight = guidance_weight("power-cosine", scale, i / N, model.config.guidance_power)
        assert torch.equal(guide(logits[:, i], null[:, i], weight).argmax(-1), ids[:, i])


def test_no_unconditional_half_runs_at_scale_1(model, labels):
    rows = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model.generate(labels, streams(0, 1, 2), guidance_scale=1.0)
    model.generate(labels, streams(0, 1, 2), guidance_scale=2.0)
    hook.remove()
    assert rows == [3] * N + [6] * N


def test_given_tokens_are_kept_and_a_prefix_goes_on_the_same(model, labels, tokens):
    mask = torch.rand(3, N, generator=torch.Generator().manual_seed(3)) < 0.4
    ids = model.generate(labels, streams(0, 1, 2), tokens=tokens, token_mask=mask)
    assert torch.equal(ids[mask], tokens[mask])
    free = model.generate(labels, streams(0, 1, 2))
    again = model.generate(
        labels, streams(0, 1, 2), tokens=free[:, :6], token_mask=torch.ones(3, 6).bool()
    )
    assert torch.equal(again, free)
    assert torch.equal(model.generate(labels, streams(0, 1, 2), num_tokens=4), free[:, :4])


def test_a_token_depends_on_earlier_ones_and_on_its_own_place(model, labels, tokens):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    orders = order.expand(3, -1)
    logits = model.logits(tokens, labels, orders)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % V
    other = model.logits(changed, labels, orders)
    assert torch.equal(other[:, :7], logits[:, :7])
    assert not torch.equal(other[:, 7], logits[:, 7])
    # The place of the token that comes next changes its logits, later places do not.
    orders = orders.clone()
    orders[:, [6, 7]] = orders[:, [7, 6]]
    swapped = model.logits(tokens, labels, orders)
    assert torch.equal(swapped[:, :6], logits[:, :6])
    assert not torch.equal(swapped[:, 6], logits[:, 6])


def test_loss_is_the_mean_cross_entropy_in_each_order(model, labels, tokens):
    loss, parts = model(tokens, labels)
    logits = model.logits(tokens, labels)[:, :-1]
    by_hand = -logits.log_softmax(-1).gather(2, tokens[..., None]).mean()
    assert torch.allclose(loss, by_hand, atol=1e-5) and parts["nll"] == loss
    shuffled, _ = model(tokens, labels, 1.0, torch.Generator().manual_seed(0))
    again, _ = model(tokens, labels, 1.0, torch.Generator().manual_seed(0))
    assert shuffled == again and not torch.allclose(shuffled, loss, atol=1e-3)


def test_training_lowers_the_loss_and_reaches_every_weight(labels, tokens):
    model = build()
    model.init_weights()
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss, _ = model(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_labels_are_dropped_in_training_only(model, labels, tokens):
    dropping = build(label_dropout=1.0, dropout=0.0)
    dropping.load_state_dict(model.state_dict())
    null = torch.full_like(labels, CLASSES)
    assert torch.allclose(dropping.train()(tokens, labels)[0], model(tokens, null)[0])
    assert torch.allclose(dropping.eval()(tokens, labels)[0], model(tokens, labels)[0])


def test_save_and_load_are_exact(model, labels, tmp_path):
    model.save_pretrained(tmp_path)
    again = RAR.from_pretrained(tmp_path)
    expected = model.generate(labels, streams(0, 1, 2))
    assert torch.equal(again.generate(labels, streams(0, 1, 2)), expected)


def test_bfloat16_is_close(model, labels, tokens):
    """Within 5 % of the largest logit, and it samples."""
    expected = model.logits(tokens, labels)
    half = build().eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    difference = (half.logits(tokens, labels).float() - expected).abs().max()
    assert difference < 0.05 * expected.abs().max()
    assert half.generate(labels, streams(0, 1, 2)).shape == (3, N)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_tokens": N + 1}, f"1 to {N} tokens, got {N + 1}"),
        ({"temperature": -1.0}, "Temperature must be 0"),
        ({"top_k": 0}, "top_k must be a whole number of 1 or more, or None"),
        ({"labels": torch.tensor([0, 1, CLASSES + 1])}, "Class labels must lie in 0 to 4"),
        ({"labels": torch.zeros(3)}, "whole numbers"),
        ({"generators": streams(0)}, "one random generator an item: 3, got 1"),
        ({"tokens": torch.zeros(3, 2, dtype=torch.int64)}, "together with token_mask"),
        (
            {"tokens": torch.full((3, 2), V), "token_mask": torch.ones(3, 2).bool()},
            f"0 to {V - 1}, got {V}",
        ),
    ],
)
def test_illegal_settings_are_refused(model, labels, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(**{"labels": labels, "generators": streams(0, 1, 2), **settings})


def test_weights_of_another_system_are_refused(model):
    with pytest.raises(InputError, match=r'"model\.lm_head\.weight" is not a weight'):
        convert_state_dict({"model.lm_head.weight": torch.zeros(2, 2)}, model.config)
    with pytest.raises(InputError, match='"positions" is missing'):
        load_strict(model, convert_state_dict({"cls_token": torch.zeros(1, 1, 32)}, model.config))
