"""ENAT: reuse of features, the sampler, seeds, in-painting, training, files."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.masked.enat import ENAT
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.weights.convert.enat import convert_state_dict
from tessera.weights.loading import load_strict

V, N, CLASSES = 24, 16, 5


def build(**options) -> ENAT:
    """Every weight random, so that no path is zero."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "num_tokens": N, "num_classes": CLASSES, "num_steps": 5}
    sizes |= {"dim": 32, "encoder_depth": 2, "decoder_depth": 1, "heads": 4, "mlp_hidden": 48}
    model = ENAT(**sizes, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> ENAT:
    return build()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(2))


def test_given_tokens_are_visible_from_the_first_step(model, labels, tokens):
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[:, :6] = True
    rows = []
    hook = model.encoder[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    model.generate(labels, streams(0, 1, 2), tokens=tokens, token_mask=mask, guidance_scale=1.0)
    hook.remove()
    assert rows[0][:2] == (3, 6)


def test_visible_tokens_stay_and_every_token_is_encoded_once(model, labels):
    """The published schedule: of 16 tokens 15, 12, 9, 4, 0 stay hidden after 5 steps."""
    sizes, rows = [], []
    hooks = [
        model.encoder[0].register_forward_pre_hook(lambda _, a: sizes.append(a[0].shape[1])),
        model.decoder[0].register_forward_pre_hook(lambda _, a: rows.append(a[0].shape[:2])),
    ]
    seen = list(model.stream(labels, streams(0, 1, 2)))
    for hook in hooks:
        hook.remove()
    assert sizes == [1, 3, 3, 5]
    # The first step needs no unconditional half.
    assert rows == [(3, 16), (6, 15), (6, 12), (6, 9), (6, 4)]
    for before, after, hidden in zip(seen, seen[1:], (15, 12, 9, 4), strict=False):
        assert ((before != after).sum(1) <= hidden).all()


def test_scale_1_runs_no_unconditional_half(model, labels):
    rows = []
    hook = model.decoder[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model.generate(labels, streams(0, 1, 2), guidance_scale=1.0)
    hook.remove()
    assert rows == [3] * 5


def test_more_steps_than_tokens(model, labels, tokens):
    """Steps that reveal nothing, and steps after the last token."""
    mask = torch.arange(N).expand(3, -1) >= 3
    given = {"tokens": tokens, "token_mask": mask}
    seen = list(model.stream(labels, streams(0, 1, 2), num_steps=20, **given))
    assert len(seen) == 20
    assert torch.equal(seen[-1][mask], tokens[mask])


def test_greedy_sampling_uses_no_chance(model, labels):
    settings = {"temperature": 0.0, "mask_temperature": 0.0}
    ids = model.generate(labels, streams(0, 1, 2), **settings)
    assert torch.equal(model.generate(labels, streams(7, 8, 9), **settings), ids)
    assert not torch.equal(model.generate(labels, streams(7, 8, 9)), ids)


def test_the_teacher_makes_the_features_that_are_reused(model, labels, tokens):
    def loss(**settings):
        return model(tokens, labels, torch.Generator().manual_seed(0), **settings)[0]

    teacher = build()
    teacher.reuse_norm.weight.data.zero_()
    assert torch.equal(loss(reuse=1.0, teacher=teacher), loss(reuse=1.0))
    teacher.positions.data.zero_()
    assert not torch.equal(loss(reuse=1.0, teacher=teacher), loss(reuse=1.0))
    assert torch.equal(loss(reuse=0.0, teacher=teacher), loss(reuse=0.0))


def test_labels_are_dropped_in_training_only(labels, tokens):
    model = build(label_dropout=1.0)
    seen = []
    modulations = model.modulations
    model.modulations = lambda labels: seen.append(labels) or modulations(labels)
    for training in (True, False):
        model.train(training)(tokens, labels, torch.Generator().manual_seed(0), reuse=0.0)
    assert torch.equal(seen[0], torch.full_like(labels, CLASSES)) and torch.equal(seen[1], labels)


def test_bfloat16_is_close(model, labels, tokens):
    """Within 5 % of the largest logit, and it samples."""

    def logits(of: ENAT) -> torch.Tensor:
        places = torch.arange(N).expand(3, -1)
        modulations = of.modulations(labels)
        before, _ = of.features(tokens, places[:, :4], places[:, 4:], modulations)
        _, x = of.features(tokens, places[:, 4:9], places[:, 9:], modulations, before)
        return of.to_logits(x).float()

    half = build()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    expected = logits(model)
    assert (logits(half) - expected).abs().max() < 0.05 * expected.abs().max()
    assert half.generate(labels, streams(0, 1, 2)).shape == (3, N)


def test_weights_of_another_system_are_refused(model):
    with pytest.raises(InputError, match='"cls_token" is not a weight'):
        convert_state_dict({"cls_token": torch.zeros(1, 2, 2)}, model.config)
    table = {"x_embedder.word_embeddings.weight": torch.zeros(V + 1, 32)}
    with pytest.raises(InputError, match='"positions" is missing'):
        load_strict(model, convert_state_dict(table, model.config))
