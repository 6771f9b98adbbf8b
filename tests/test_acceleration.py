"""Lossless acceleration: the distribution of what is written, equality, passes saved, shared prefixes."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from tessera.generators.acceleration import (
    distribution,
    inverse_cdf,
    share_prefix,
    speculative_jacobi,
    verify,
)
from tessera.generators.autoregressive.decoding import autoregress
from tessera.generators.autoregressive.flexar import FlexAR, FlexARClass
from tessera.generators.autoregressive.rar import RAR
from tessera.generators.sampling import guide
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams


class ToyDecoder:
    """Logits by the two tokens before, the earlier of which it reads from its cache."""

    def __init__(self, batch: int, vocab: int, num_tokens: int, scale: float = 1.0, depend=True):
        random = torch.Generator().manual_seed(1)
        shape = (2, num_tokens, vocab + 1, vocab + 1, vocab)
        self.table = torch.randn(shape, generator=random)
        if not depend:
            self.table[:] = self.table[:, :1, :1, :1].clone()
        self.batch, self.vocab_size, self.num_tokens, self.scale = batch, vocab, num_tokens, scale
        self.device, self.cached = torch.device("cpu"), 0
        self.seen = torch.full((batch, num_tokens), vocab)
        self.places = []

    def __call__(self, ids, cached, count):
        inputs = torch.cat([torch.full((self.batch, 1), self.vocab_size), ids], dim=1)
        end = inputs.shape[1]
        self.places.append(end - cached)
        self.seen[:, cached:end] = inputs[:, cached:]
        before = torch.cat([torch.full((self.batch, 1), self.vocab_size), self.seen], dim=1)
        at = torch.arange(end - count, end)
        conditional, null = self.table[:, at, before[:, at], self.seen[:, at]]
        return guide(conditional, null, self.scale)

    def repeat(self, batch):
        other = copy.copy(self)
        other.batch, other.seen = batch, self.seen.repeat(batch, 1)
        return other


def run(decoder, generators, count, **settings) -> torch.Tensor:
    return list(speculative_jacobi(decoder, generators, count, **settings))[-1]


def exact(decoder: ToyDecoder, settings: dict) -> dict[tuple, float]:
    """Probability of every sequence."""
    one = ToyDecoder(1, decoder.vocab_size, decoder.num_tokens, decoder.scale)
    found = {}
    for ids in itertools.product(range(one.vocab_size), repeat=one.num_tokens):
        logits = one(torch.tensor([ids[:-1]]), 0, one.num_tokens)
        p = distribution(logits, settings["temperature"], settings.get("top_k"), 1.0)[0]
        found[ids] = math.prod(float(p[i, token]) for i, token in enumerate(ids))
    return found


@pytest.mark.parametrize(
    ("scale", "settings"),
    [
        (1.0, {"temperature": 1.0}),
        (2.0, {"temperature": 0.7}),
        (2.0, {"temperature": 1.5, "top_k": 2}),
    ],
)
@pytest.mark.parametrize("window", [1, 2, 6])
def test_sequences_are_distributed_as_those_of_plain_sampling(scale, settings, window):
    """Chi-square of 3000 sequences of 4 tokens of 3 ids, at the 0.1 % point."""
    count = 3000
    decoder = ToyDecoder(count, 3, 4, scale)
    ids = run(decoder, streams(*range(count)), 4, window=window, **settings)
    expected = exact(decoder, settings)
    codes = (ids * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81).double()
    p = torch.tensor([expected[key] for key in sorted(expected)], dtype=torch.float64)
    assert abs(float(p.sum()) - 1) < 1e-5
    assert not codes[p == 0].any()
    # Rare sequences count together.
    rare = (p * count < 5) & (p > 0)
    observed = torch.cat([codes[~rare & (p > 0)], codes[rare].sum()[None]])
    wanted = count * torch.cat([p[~rare & (p > 0)], p[rare].sum()[None]])
    used = wanted > 0
    chi_square = float(((observed - wanted).square() / wanted)[used].sum())
    free = int(used.sum()) - 1
    limit = free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3
    assert chi_square < limit


def test_a_verified_token_is_distributed_as_p():
    """Drafts from a q far from p."""
    count = 20000
    random = torch.Generator().manual_seed(0)
    q = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(count, 1, -1)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(count, 2, -1)
    draft = inverse_cdf(q, torch.rand(count, 1, generator=random))
    u, w = torch.rand(count, 1, generator=random), torch.rand(count, generator=random)
    accepted, token = verify(draft, q, p, u, w)
    first = torch.where(accepted > 0, draft[:, 0], token)
    expected = p[0, 0] * count
    assert ((first.bincount(minlength=4) - expected).square() / expected).sum() < 16.3
    # The rate of acceptance is what p and q have in common.
    assert abs(accepted.double().mean() - 0.4) < 0.02


def test_a_one_hot_draft_is_accepted_by_its_probability():
    q = torch.tensor([[[0.0, 1.0, 0.0]]])
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]])
    draft, w = torch.tensor([[1]]), torch.tensor([0.9])
    assert [int(x) for x in verify(draft, q, p, torch.tensor([[0.29]]), w)] == [1, 2]
    # Rejected: what is left is 0.5 and 0.2 of 0.7.
    assert [int(x) for x in verify(draft, q, p, torch.tensor([[0.31]]), w)] == [0, 2]
    assert [int(x) for x in verify(draft, q, p, torch.tensor([[0.31]]), w * 0.7)] == [0, 0]


@pytest.fixture(scope="module")
def models() -> dict:
    """Decoders of three items, and how to write their tokens one by one."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 3, 4])
    rar = RAR(24, 12, 5, dim=32, depth=2, heads=4, mlp_hidden=48)
    classes = FlexARClass(24, 12, 5, dim=32, depth=2, heads=2, mlp_hidden=48)
    flexar = FlexAR(24, 12, dim=32, depth=2, heads=2, mlp_hidden=48, text_dim=16)
    for model in (rar, classes, flexar):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.eval()
    text = {
        "text_features": torch.randn(3, 5, 16),
        "text_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool(),
    }
    null = {"null_features": torch.randn(1, 5, 16), "null_mask": torch.ones(1, 5).bool()}
    return {
        "rar": (rar, {"labels": labels}, {"guidance_scale": 3.0}),
        "flexar-class": (classes, {"labels": labels}, {"guidance_scale": 2.0}),
        "flexar": (flexar, text, {"guidance_scale": 3.0, **null}),
        "flexar-unguided": (flexar, text, {"guidance_scale": 1.0}),
    }


NAMES = ["rar", "flexar-class", "flexar", "flexar-unguided"]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_decoding_is_equal(models, name):
    model, items, settings = models[name]
    expected = model.generate(**items, generators=streams(0, 1, 2), temperature=0.0, **settings)
    for window in (1, 4, 16):
        decoder = model.decoder(**items, **settings)
        seen = list(
            speculative_jacobi(decoder, streams(0, 1, 2), 12, window=window, temperature=0.0)
        )
        assert torch.equal(seen[-1], expected)
        # Every pass writes at least one token, and what is written stays.
        lengths = [ids.shape[1] for ids in seen]
        assert lengths == sorted(set(lengths)) and lengths[-1] == 12
        assert all(torch.equal(ids, expected[:, : ids.shape[1]]) for ids in seen)


@pytest.mark.parametrize("name", NAMES)
def test_an_item_draws_the_same_alone_and_in_a_batch(models, name):
    model, items, settings = models[name]
    together = run(model.decoder(**items, **settings), streams(5, 6, 7), 12, window=4)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in items.items()}
        alone = run(model.decoder(**one, **settings), streams(5 + i), 12, window=4)
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_window_equals_place_by_place(models, name):
    """A pass over several places after cached ones, and one that takes places back."""
    model, items, settings = models[name]
    ids = torch.randint(0, 24, (3, 11), generator=torch.Generator().manual_seed(2))
    decoder = model.decoder(**items, **settings)
    whole = decoder(ids, 0, 12)
    single = [decoder(ids[:, :n], n, 1) for n in range(12)]
    assert torch.allclose(torch.cat(single, dim=1), whole, atol=1e-4)
    # Other tokens from place 4 on, then the right ones again.
    other = torch.cat([ids[:, :3], (ids[:, 3:] + 1) % 24], dim=1)
    changed = decoder(other, 4, 8)
    assert not torch.allclose(changed, whole[:, 4:], atol=1e-2)
    assert torch.allclose(decoder(ids, 4, 8), whole[:, 4:], atol=1e-4)


def test_passes_of_tokens_that_do_not_depend_on_each_other():
    """After the first pass every guess is right: window + 1 tokens a pass."""
    decoder = ToyDecoder(1, 5, 40, depend=False)
    lengths = [ids.shape[1] for ids in speculative_jacobi(decoder, streams(0), 40, window=6)]
    steps = [b - a for a, b in itertools.pairwise(lengths)]
    assert set(steps[:-1]) == {7} and lengths[-1] == 40
    assert len(lengths) == 1 + math.ceil((40 - lengths[0]) / 7)


def test_fewer_passes_than_tokens():
    """Tokens that depend weakly on those before: at least 1.5 a pass."""
    decoder = ToyDecoder(1, 5, 200)
    decoder.table *= 0.3
    passes = len(list(speculative_jacobi(decoder, streams(0), 200, window=8)))
    assert 200 / passes > 1.5
    assert max(decoder.places) <= 9


def test_a_prefix_is_kept(models):
    model, items, settings = models["flexar-class"]
    prefix = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]])
    decoder = model.decoder(**items, **settings)
    ids = run(decoder, streams(0, 1, 2), 12, temperature=0.0, prefix=prefix)
    given = {"tokens": prefix, "token_mask": torch.ones_like(prefix).bool()}
    expected = model.generate(
        **items, generators=streams(0, 1, 2), temperature=0.0, **settings, **given
    )
    assert torch.equal(ids, expected) and torch.equal(ids[:, :3], prefix)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, 4])
def test_a_shared_prefix_changes_nothing(models, name, length):
    """Four items of one condition, by the plain sampler and by the speculative one."""
    model, items, settings = models[name]
    one = {key: value[1:2] for key, value in items.items()}
    four = {key: value.expand(4, *value.shape[1:]) for key, value in one.items()}
    prefix = torch.tensor([[3, 1, 4, 1]])[:, :length]
    every = prefix.expand(4, -1)
    given = {"tokens": every, "token_mask": torch.ones_like(every).bool()}

    shared = share_prefix(model.decoder(**one, **settings), 4, prefix)
    assert shared.cached == length
    ids = list(autoregress(shared, streams(0, 1, 2, 3), 12, 1.0, **given))[-1]
    decoder = model.decoder(**four, **settings)
    plain = list(autoregress(decoder, streams(0, 1, 2, 3), 12, 1.0, **given))[-1]
    assert torch.equal(ids, plain)
    assert not torch.equal(ids[0], ids[1])

    shared = share_prefix(model.decoder(**one, **settings), 4, prefix)
    ids = run(shared, streams(0, 1, 2, 3), 12, window=4, prefix=every)
    again = run(model.decoder(**four, **settings), streams(0, 1, 2, 3), 12, window=4, prefix=every)
    assert torch.equal(ids, again)


def test_a_shared_prefix_is_read_once():
    decoder = ToyDecoder(1, 5, 12)
    prefix = torch.arange(4)[None]
    shared = share_prefix(decoder, 3, prefix)
    assert decoder.places == [4]
    list(speculative_jacobi(shared, streams(0, 1, 2), 12, window=2, prefix=prefix.expand(3, -1)))
    assert shared.places[1] == 3  # The last token of the prefix and two guesses.


def test_closing_leaves_the_model_as_it_was(models):
    model, items, settings = models["rar"]
    expected = model.generate(**items, generators=streams(0, 1, 2), **settings)
    stream = speculative_jacobi(model.decoder(**items, **settings), streams(0, 1, 2), 12)
    next(stream)
    stream.close()
    assert torch.equal(model.generate(**items, generators=streams(0, 1, 2), **settings), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 0}, "window must hold 1 guess or more, got 0"),
        ({"num_tokens": 13}, "1 to 12 tokens, got 13"),
        ({"temperature": -1.0}, "Temperature must be 0"),
        ({"top_k": 0}, "top_k must be a whole number of 1 or more, or None"),
        ({"generators": streams(0)}, "one random generator an item: 2, got 1"),
        ({"prefix": torch.zeros(2, 12).long()}, "prefix must have the shape"),
        ({"prefix": torch.full((2, 3), 5)}, "Token ids must lie in 0 to 4"),
    ],
)
def test_illegal_settings_are_refused(settings, words):
    given = {"generators": streams(0, 1), "num_tokens": 12, **settings}
    with pytest.raises(InputError, match=words):
        list(speculative_jacobi(ToyDecoder(2, 5, 12), **given))


def test_only_one_item_is_shared():
    with pytest.raises(InputError, match="Only one item's prefix can be shared, got 2"):
        share_prefix(ToyDecoder(2, 5, 12), 3)


def test_a_shared_prefix_must_be_given_to_go_on():
    shared = share_prefix(ToyDecoder(1, 5, 12), 2, torch.arange(4)[None])
    for loop in (speculative_jacobi, autoregress):
        with pytest.raises(InputError, match="has read a prefix of 4 tokens"):
            next(loop(shared, streams(0, 1), 12))
