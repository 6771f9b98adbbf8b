"""FlexAR: cached decoding, guidance, seeds, given tokens; the token sampler."""

from __future__ import annotations

import pytest
import torch

from tessera.generators.autoregressive.decoding import branch
from tessera.generators.autoregressive.flexar import FlexAR, FlexARClass
from tessera.generators.sampling import guide, probabilities, sample
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.weights.convert.flexar import convert_state_dict
from tessera.weights.loading import load_strict


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
        ({"top_k": 0}, "top_k must be a whole number of 1 or more, or None"),
        ({"top_p": 1.5}, "top_p must lie above 0"),
        ({"null_features": None}, "Guidance needs null_features"),
    ],
)
def test_illegal_settings_are_refused(model, text, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(generators=streams(0, 1, 2), **{**text, **settings})


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
    ids = sample(logits, 1.0, None, 1.0, streams(*range(4000)))
    expected = logits[0].exp() * 4000
    chi_square = ((ids.bincount(minlength=4) - expected).square() / expected).sum()
    assert chi_square < 16.3  # The 0.1 % point of 3 degrees of freedom.


def test_the_last_token_branches_into_different_samples(model, text):
    """Siblings share all but the last token; log-probabilities are those of the drawn tokens."""
    settings = {"temperature": 0.8, "top_k": 9}
    prefix = torch.tensor([[1, 2], [3, 4], [5, 6]])
    decoder = model.decoder(num_tokens=6, **text)
    ids, log_p = branch(decoder, streams(0, 1, 2), 6, 4, prefix=prefix, **settings)
    assert ids.shape == (12, 6) and log_p.shape == (12,)
    groups = ids.view(3, 4, 6)
    assert torch.equal(groups[:, :, :2], prefix[:, None].expand(-1, 4, -1))
    assert (groups[:, :, :5] == groups[:, :1, :5]).all()
    assert all(len(set(last.tolist())) == 4 for last in groups[:, :, 5])

    rows = torch.arange(3).repeat_interleave(4)
    logits = model.logits(ids[:, :-1], text["text_features"][rows], text["text_mask"][rows])
    null = model.logits(
        ids[:, :-1], text["null_features"].expand(12, -1, -1), text["null_mask"].expand(12, -1)
    )
    logits = guide(logits, null, 3.0)[:, 2:]
    p = probabilities(logits.flatten(0, 1), **settings).view_as(logits)
    by_hand = p.gather(2, ids[:, 2:, None])[..., 0].log().sum(1)
    assert torch.allclose(log_p, by_hand, atol=1e-3)
    with pytest.raises(InputError, match="1 to 3 samples, got 4"):
        branch(decoder, streams(0, 1, 2), 6, 4, top_k=3)


@pytest.fixture(scope="module")
def class_model() -> FlexARClass:
    torch.manual_seed(0)
    model = FlexARClass(40, 12, 5, dim=32, depth=2, heads=2, mlp_hidden=48, label_dropout=0.5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_classes_cached_decoding_equals_full_recomputation(class_model, scale):
    labels = torch.tensor([0, 3, 4])
    settings = {"guidance_scale": scale, "temperature": 0}
    ids = class_model.generate(labels, streams(0, 1, 2), **settings)
    logits = class_model.logits(ids[:, :-1], labels)
    null = class_model.logits(ids[:, :-1], torch.full_like(labels, 5))
    assert torch.equal(guide(logits, null, scale).argmax(-1), ids)
    assert not torch.allclose(null, logits)
    with pytest.raises(InputError, match="Class labels must lie in 0 to 4"):
        class_model.generate(labels + 2, streams(0, 1, 2))


def test_classes_training_reaches_every_weight_and_files_are_exact(class_model, tmp_path):
    labels = torch.tensor([0, 3, 4])
    ids = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(2))
    loss, _ = class_model(ids, labels)
    loss.backward()
    parameters = class_model.named_parameters()
    assert not [name for name, p in parameters if p.grad is None or not p.grad.any()]
    class_model.zero_grad()
    class_model.save_pretrained(tmp_path)
    again = FlexARClass.from_pretrained(tmp_path)
    assert torch.equal(again.logits(ids[:, :-1], labels), class_model.logits(ids[:, :-1], labels))


def test_published_weights_of_classes_and_of_separate_projections(class_model):
    """The names that the fixture of the text model does not have."""
    state, published = class_model.state_dict(), {}
    published["models.image_tokenizer.encoder.x"] = torch.zeros(1)
    blocks, pre = "models.ar_image_model.trunk.blocks.", "models.ar_image_model.preprocessor."
    for name, value in state.items():
        new = name.replace("norm_3", "norm_2") if name.startswith("blocks.") else name
        if name.startswith("blocks."):
            new = blocks + new.removeprefix("blocks.")
        if "self_attn.qkv" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                published[new.replace("qkv", f"{part}_proj")] = rows
        elif "fc1_fc3" in name:
            for part, rows in zip(("fc1", "fc3"), value.chunk(2), strict=True):
                published[new.replace("fc1_fc3", part)] = rows
        else:
            outer = {
                "start": f"{pre}sos_token_embed",
                "positions": f"{pre}positional_embedding",
                "embedding.weight": f"{pre}embedding.weight",
                "class_embedding.weight": f"{pre}cls_embedding.weight",
                "head.weight": "models.ar_image_model.head.linear.weight",
                "norm.weight": "models.ar_image_model.trunk.post_trunk_norm.weight",
                "norm.bias": "models.ar_image_model.trunk.post_trunk_norm.bias",
            }
            published[outer.get(name, new)] = value[None, None] if name == "start" else value
    converted = convert_state_dict(published, dict(class_model.config))
    load_strict(class_model, converted)
    assert all(torch.equal(converted[name], value) for name, value in state.items())
    with pytest.raises(InputError, match='"cls_token" is not a weight'):
        convert_state_dict({"cls_token": torch.zeros(1)}, class_model.config)
