"""FlexAR: cached decoding, guidance, seeds, given tokens; the token sampler."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.autoregressive.flexar import FlexAR
from tessera.generators.sampling import guide, probabilities, sample
from tessera.modalities.errors import InputError


@pytest.fixture(scope="module")
def model() -> FlexAR:
    torch.manual_seed(0)
    model = FlexAR(
        vocab_size=40, num_tokens=12, dim=32, depth=2, heads=2, mlp_hidden=48, text_dim=16
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def text() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text_features": torch.randn(3, 5, 16, generator=generator),
        "text_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool(),
        "null_features": torch.randn(1, 5, 16, generator=generator),
        "null_mask": torch.tensor([[1, 1, 0, 0, 0]]).bool(),
    }


def streams(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_decoding_equals_full_recomputation(model, text, scale):
    ids = model.generate(generators=streams(0, 1, 2), guidance_scale=scale, temperature=0, **text)
    features, mask = text["text_features"], text["text_mask"]
    logits = model.logits(ids[:, :-1], features, mask)
    if scale != 1:
        null = model.logits(
            ids[:, :-1], text["null_features"].expand(3, -1, -1), text["null_mask"].expand(3, -1)
        )
        logits = guide(logits, null, scale)
    assert torch.equal(logits.argmax(-1), ids)


def test_an_item_draws_the_same_alone_and_in_a_batch(model, text):
    together = model.generate(generators=streams(5, 6, 7), **text)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in text.items() if not key.startswith("null")}
        null = {key: value for key, value in text.items() if key.startswith("null")}
        alone = model.generate(generators=streams(5 + i), **one, **null)
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together[0], together[1])


def test_padding_of_the_text_is_not_read(model, text):
    ids = model.generate(generators=streams(0, 1, 2), **text)
    padded = {**text, "text_features": text["text_features"].clone()}
    padded["text_features"][~text["text_mask"]] = 99.0
    assert torch.equal(model.generate(generators=streams(0, 1, 2), **padded), ids)


def test_given_tokens_are_kept_where_the_mask_says(model, text):
    given = torch.arange(24).view(3, 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, :4] = mask[0, 6] = True
    ids = model.generate(generators=streams(0, 1, 2), tokens=given, token_mask=mask, **text)
    assert torch.equal(ids[:, :8][mask], given[mask])
    free = model.generate(generators=streams(0, 1, 2), **text)
    # Kept tokens use up their draws, so the same prefix goes on with the same tokens.
    again = model.generate(
        generators=streams(0, 1, 2), tokens=free[:, :6], token_mask=mask[:, :6] | True, **text
    )
    assert torch.equal(again, free)


def test_a_prefix_is_the_start_of_the_whole(model, text):
    ids = model.generate(generators=streams(0, 1, 2), **text)
    short = model.generate(generators=streams(0, 1, 2), num_tokens=5, **text)
    assert torch.equal(short, ids[:, :5])


def test_loss_is_the_cross_entropy_of_the_next_token(model, text):
    ids = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(2))
    loss, parts = model(ids, text["text_features"], text["text_mask"])
    logits = model.logits(ids[:, :-1], text["text_features"], text["text_mask"])
    by_hand = -logits.log_softmax(-1).gather(2, ids[..., None]).mean()
    assert torch.allclose(loss, by_hand, atol=1e-5)
    assert set(parts) == {"nll", "nll_first_8"}
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    model.zero_grad()


def test_later_tokens_do_not_change_earlier_logits(model, text):
    ids = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(2))
    logits = model.logits(ids, text["text_features"], text["text_mask"])
    ids[:, 7:] = 0
    changed = model.logits(ids, text["text_features"], text["text_mask"])
    assert torch.equal(changed[:, :8], logits[:, :8])
    assert not torch.equal(changed[:, 8:], logits[:, 8:])


def test_save_and_load_are_exact(model, text, tmp_path):
    model.save_pretrained(tmp_path)
    again = FlexAR.from_pretrained(tmp_path)
    expected = model.generate(generators=streams(0, 1, 2), **text)
    assert torch.equal(again.generate(generators=streams(0, 1, 2), **text), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_tokens": 13}, "1 to 12 tokens, got 13"),
        ({"temperature": -1.0}, "Temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 1.5}, "top_p must lie in 0"),
    ],
)
def test_illegal_settings_are_refused(model, text, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(generators=streams(0, 1, 2), **settings, **text)


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]))
    assert probabilities(logits, 1.0, top_k=2).nonzero()[:, 1].tolist() == [0, 1]
    assert probabilities(logits, 1.0, top_p=0.7).nonzero()[:, 1].tolist() == [0, 1]
    assert probabilities(logits, 1.0, top_p=0.71).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert probabilities(logits, 1.0, top_p=0.01).nonzero()[:, 1].tolist() == [0]
    assert torch.allclose(probabilities(logits, 1.0), logits.exp())
    assert torch.allclose(
        probabilities(logits, 0.5), logits.exp().square() / logits.exp().square().sum()
    )


def test_draws_follow_the_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, -1)
    ids = sample(logits, 1.0, 0, 0.0, streams(*range(4000)))
    expected = logits[0].exp() * 4000
    chi_square = ((ids.bincount(minlength=4) - expected).square() / expected).sum()
    assert chi_square < 16.3  # The 0.1 % point of 3 degrees of freedom.
