"""What all generators of pictures have in common: seeds, given tokens, closing, files, training, refusals."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from tessera.generators.base import ImageGenerator
from tessera.modalities.errors import InputError
from tessera.tests.tiny_generators import CLASSES, MAKERS, Tiny, tiny_generator
from tessera.tokenizers.quantizers.dimension_wise import DimensionWiseQuantizer
from tessera.weights.registry import list_models, model_info


@pytest.fixture(scope="module", params=list(MAKERS))
def tiny(request) -> Tiny:
    return tiny_generator(request.param)


def same(tiny: Tiny, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Ids are exact; continuous tokens depend on the order of sums in products of other sizes."""
    return torch.equal(a, b) if tiny.discrete else bool((a - b).abs().max() < 1e-4 * b.abs().max())


def test_an_item_draws_the_same_alone_and_in_a_batch(tiny):
    together = tiny.generate((5, 6, 7))
    for i in range(3):
        assert same(tiny, tiny.generate((5 + i,), slice(i, i + 1))[0], together[i])
    assert torch.equal(tiny.generate((5, 6, 7)), together)
    assert not same(tiny, tiny.generate((8, 9, 10)), together)


def test_given_tokens_are_kept_and_do_not_depend_on_the_batch(tiny):
    """Items with different numbers of given tokens, all and none among them."""
    tokens = tiny.tokens()
    mask = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(3)) < 0.5
    mask[1], mask[2] = True, False
    given = {"tokens": tokens, "token_mask": mask}
    written = tiny.generate(**given)
    assert torch.equal(written[mask], tokens[mask])
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in given.items()}
        assert same(tiny, tiny.generate((i,), slice(i, i + 1), **one)[0], written[i])
    free = tiny.generate()
    assert same(tiny, free[2], written[2])
    assert not same(tiny, free[0], written[0])


def test_a_stream_that_is_closed_leaves_the_model_as_it_was(tiny):
    expected = tiny.generate()
    stream = tiny.stream()
    next(stream)
    stream.close()
    assert torch.equal(tiny.generate(), expected)


def test_save_and_load_are_exact(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    again = type(tiny.model).from_pretrained(tmp_path)
    state = dict(again.named_parameters()) | dict(again.named_buffers())
    for name, value in [*tiny.model.named_parameters(), *tiny.model.named_buffers()]:
        assert torch.equal(state[name], value), name
    # Products may round in another order where the weights lie at other addresses.
    found = Tiny(again, tiny.items, tiny.shared).generate()
    assert same(tiny, found, tiny.generate())


@pytest.mark.parametrize("name", list(MAKERS))
def test_training_lowers_the_loss_and_reaches_every_weight(name):
    """Ten steps on one batch with the same draws, then other draws for what these left out."""
    tiny = tiny_generator(name, fresh=True)
    # Dropped conditions would make the loss jump.
    tiny.model.eval()
    tokens, optimizer = tiny.tokens(), torch.optim.AdamW(tiny.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        torch.manual_seed(0)
        loss, parts = tiny.model(tokens, **tiny.training)
        assert all(part.isfinite() and not part.requires_grad for part in parts.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    tiny.model.train()
    for seed in range(8):
        torch.manual_seed(seed)
        tiny.model(tokens, **tiny.training)[0].backward()
    missing = [n for n, p in tiny.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


# Refusals


def refuses(tiny: Tiny, words: str, **settings) -> None:
    """One sentence before anything is drawn."""
    with pytest.raises(InputError, match=words) as caught:
        next(iter(tiny.stream(**settings)))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")


ILLEGAL = [
    ("temperature", -1.0, "Temperature must be 0 .* got -1.0"),
    ("temperature", float("nan"), "Temperature must be 0 .* got nan"),
    ("temperature", float("inf"), "Temperature must be 0 .* got inf"),
    ("mask_temperature", -1.0, "Temperature must be 0 .* got -1.0"),
    ("top_k", 0, r"top_k must be .* or None \(off\), got 0"),
    ("top_k", -1, r"top_k must be .* or None \(off\), got -1"),
    ("top_k", 1.5, "top_k must be a whole number of 1 or more"),
    ("top_p", 0.0, "top_p must lie above 0 .* got 0.0"),
    ("top_p", 1.5, "top_p must lie above 0 .* got 1.5"),
    ("top_p", float("nan"), "top_p must lie above 0 .* got nan"),
    ("guidance_scale", float("nan"), "guidance scale must be a finite number .* got nan"),
    ("guidance_scale", float("inf"), "guidance scale must be a finite number .* got inf"),
    ("pivot_guidance_scale", float("inf"), "guidance scale must be a finite number"),
    ("guidance_schedule", "steep", 'Unknown guidance schedule "steep"'),
    ("guidance_power", -1.0, "guidance power must be 0 or more, got -1.0"),
    ("num_steps", 0, "steps?.*got 0"),
    ("num_steps", -3, "steps?.*got -3"),
    ("pivot_steps", 0, "1 to 4 steps, got 0"),
    ("diffusion_steps", 1, "2 to 1000 steps, got 1"),
    ("num_tokens", 0, "1 to 12 tokens, got 0"),
    ("num_tokens", 13, "1 to 12 tokens, got 13"),
    ("time_shift", 0.0, "time shift must be positive .* got 0.0"),
]


def test_illegal_settings_are_refused(tiny):
    known = inspect.signature(tiny.model.stream).parameters
    illegal = [case for case in ILLEGAL if case[0] in known]
    assert len(illegal) > 4
    for setting, value, words in illegal:
        refuses(tiny, words, **{setting: value})


def test_illegal_tokens_are_refused(tiny):
    tokens = tiny.tokens()
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    refuses(tiny, "tokens together with token_mask", tokens=tokens)
    refuses(tiny, "tokens together with token_mask", token_mask=mask)
    refuses(tiny, "must be bool", tokens=tokens, token_mask=mask.float())
    more = torch.cat([tokens, tokens], dim=1), torch.cat([mask, mask], dim=1)
    refuses(tiny, "tokens and token_mask must", tokens=more[0], token_mask=more[1])
    if tiny.discrete:
        vocab = tiny.vocab_size
        for wrong in (vocab, -1):
            refuses(tiny, f"lie in 0 to {vocab - 1}", tokens=tokens * 0 + wrong, token_mask=mask)
        refuses(tiny, "whole numbers", tokens=tokens.float(), token_mask=mask)
        # What is not kept is not read.
        tiny.generate(tokens=tokens * 0 + vocab, token_mask=~mask)
    else:
        refuses(tiny, "finite numbers", tokens=tokens * torch.nan, token_mask=mask)


def test_illegal_conditions_are_refused(tiny):
    refuses(tiny, "one random generator an item: 3, got 1", seeds=(0,))
    if "labels" in tiny.items:
        for wrong in (CLASSES + 1, -1):
            refuses(tiny, "lie in 0 to 4", labels=torch.tensor([0, 1, wrong]))
        refuses(tiny, "whole numbers", labels=torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    "name",
    [
        name
        for task in ("class-to-image", "text-to-image")
        for name in list_models(task=task)
        if not model_info(name).shipped
    ],
)
def test_registry_builds_the_published_sizes(name):
    info = model_info(name)
    with torch.device("meta"):
        built = info.model_class()(**info.config)
    count = sum(p.numel() for p in built.parameters()) / 1e6
    assert abs(count / info.parameters - 1) < 0.01, count
    assert built.num_tokens == int(info.tokens.split("-")[-1])


def test_a_tokenizer_that_does_not_fit_is_refused(tiny):
    if not isinstance(tiny.model, ImageGenerator):
        pytest.skip("takes ids of any tokenizer")
    count, vocab = tiny.model.num_tokens, tiny.vocab_size if tiny.discrete else None
    width = None if tiny.discrete else tiny.model.latent_dim
    quantizer = tiny.shared.get("quantizer", getattr(tiny.model, "quantizer", None))
    fitting = {"num_tokens": count, "vocab_size": vocab, "latent_dim": width, "ordered": False}
    fitting["quantizer"] = quantizer
    tiny.model.check_tokenizer(SimpleNamespace(**fitting))
    wrong = [{"num_tokens": count + 1}, {"vocab_size": 7, "latent_dim": None}]
    wrong += [{"vocab_size": None, "latent_dim": 7}]
    if quantizer is not None:
        wrong += [{"quantizer": None}, {"quantizer": DimensionWiseQuantizer(8, (-1.0, 1.0))}]
    for change in wrong:
        with pytest.raises(InputError, match=r"[^\n]+\.$"):
            tiny.model.check_tokenizer(SimpleNamespace(**fitting | change))
