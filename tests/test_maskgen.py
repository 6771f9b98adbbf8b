"""MaskGen over ids and over continuous tokens: seeds, in-painting, training, files, text features."""

from __future__ import annotations

import open_clip
import pytest
import torch

from tessera.generators.masked.maskgen import MaskGenKL, MaskGenVQ, embed_text
from tessera.modalities.errors import InputError
from tessera.tests.tiny import streams
from tessera.weights.convert.maskgen import convert_state_dict
from tessera.weights.loading import load_strict

V, N, C, TEXT = 24, 8, 5, 12
SIZES = {"num_tokens": N, "dim": 32, "depth": 2, "heads": 4, "text_dim": TEXT, "micro_dim": 8}
KINDS = {
    "vq": (MaskGenVQ, {"vocab_size": V, "unused_ids": 3, "num_steps": 4, "guidance_scale": 4.0}),
    "kl": (
        MaskGenKL,
        {"latent_dim": C, "head_dim": 24, "head_depth": 2, "num_steps": 4, "diffusion_steps": 6},
    ),
}


def build(kind: str, **options) -> MaskGenVQ | MaskGenKL:
    torch.manual_seed(0)
    cls, sizes = KINDS[kind]
    return cls(**{**SIZES, **sizes, **options})


@pytest.fixture(scope="module", params=["vq", "kl"])
def model(request):
    """Every weight random, so that no path is zero."""
    model = build(request.param)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def text() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text_features": torch.randn(3, 6, TEXT, generator=generator),
        "pooled": torch.randn(3, TEXT, generator=generator),
        "aesthetic_score": torch.tensor([6.5, 5.0, 6.5]),
        "null_features": torch.randn(1, 6, TEXT, generator=generator),
        "null_pooled": torch.randn(1, TEXT, generator=generator),
    }


def one(text: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {k: v if k.startswith("null") else v[i : i + 1] for k, v in text.items()}


def tokens_of(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    if isinstance(model, MaskGenKL):
        return torch.randn(3, N, C, generator=generator)
    return torch.randint(0, V, (3, N), generator=generator)


def training_text(text: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [text[name] for name in ("text_features", "pooled", "aesthetic_score")]


def same(model, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Ids are exact; continuous tokens depend on the order of sums in products of other sizes.

    (They are large: an untrained head amplifies the noise of the first step.)
    """
    if isinstance(model, MaskGenVQ):
        return torch.equal(a, b)
    return bool((a - b).abs().max() < 1e-4 * b.abs().max())


def test_given_tokens_are_kept_and_do_not_depend_on_the_batch(model, text):
    """Items with different numbers of given tokens, all and none among them."""
    tokens = tokens_of(model)
    mask = torch.rand(3, N, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[1], mask[2] = True, False
    seen = list(model.stream(generators=streams(0, 1, 2), tokens=tokens, token_mask=mask, **text))
    assert len(seen) == 4
    for partial in seen:
        assert torch.equal(partial[mask], tokens[mask])
    for i in range(3):
        given = {"tokens": tokens[i : i + 1], "token_mask": mask[i : i + 1]}
        alone = model.generate(generators=streams(i), **given, **one(text, i))
        assert same(model, alone[0], seen[-1][i])
    free = model.generate(generators=streams(0, 1, 2), **text)
    assert same(model, free[2], seen[-1][2]) and not same(model, free[0], seen[-1][0])


def test_given_tokens_are_read(model, text):
    """What is given changes what is drawn beside it."""
    tokens, mask = tokens_of(model), torch.zeros(3, N).bool()
    mask[:, :5] = True
    settings = {"generators": streams(0, 1, 2), "token_mask": mask, **text}
    first = model.generate(tokens=tokens, **settings)
    other = tokens.roll(1, dims=0)
    second = model.generate(tokens=other, **{**settings, "generators": streams(0, 1, 2)})
    assert not same(model, first[~mask], second[~mask])


def test_text_pooled_text_and_score_are_read(model, text):
    expected = model.generate(generators=streams(0, 1, 2), **text)
    for name in ("text_features", "pooled", "aesthetic_score", "null_features", "null_pooled"):
        changed = {**text, name: text[name] + 1}
        assert not same(model, model.generate(generators=streams(0, 1, 2), **changed), expected)


def test_no_unconditional_half_runs_at_scale_1(model, text):
    rows = []
    hook = model.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    settings = {k: v for k, v in text.items() if not k.startswith("null")}
    model.generate(generators=streams(0, 1, 2), guidance_scale=1.0, **settings)
    model.generate(generators=streams(0, 1, 2), guidance_scale=2.0, **text)
    hook.remove()
    assert rows == [3] * 4 + [6] * 4


def test_continuous_tokens_appear_from_the_end_of_the_order(text):
    model = build("kl")
    orders = torch.stack([torch.randperm(N, generator=g) for g in streams(0, 1, 2)])
    counts = []
    for latents in model.stream(generators=streams(0, 1, 2), orders=orders, **text):
        there = latents.ne(0).any(-1)
        count = int(there[0].sum())
        assert there.gather(1, orders)[:, N - count :].all() and there.sum() == 3 * count
        counts.append(count)
    assert counts == [1, 3, 5, 8]


@pytest.mark.parametrize("tied", [True, False])
def test_weight_tying(tied, text):
    model = build("vq", weight_tying=tied)
    model.init_weights()
    assert ("head.weight" in model.state_dict()) != tied
    ids = model.generate(generators=streams(0, 1, 2), **text)
    assert ids.shape == (3, N) and ids.max() < V


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_training_lowers_the_loss_and_reaches_every_weight(kind, text):
    """The same draws at every step, and a few more after them."""
    model = build(kind)
    model.init_weights()
    tokens, inputs = tokens_of(model), training_text(text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss, parts = model(tokens, *inputs, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert set(parts) == ({"mse", "bound"} if kind == "kl" else {"masked_nll", "masked_accuracy"})
    for seed in range(1, 4):
        model(tokens, *inputs, generator=torch.Generator().manual_seed(seed))[0].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_save_and_load_are_exact(model, text, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    expected = model.generate(generators=streams(0, 1, 2), **text)
    assert torch.equal(again.generate(generators=streams(0, 1, 2), **text), expected)


def test_bfloat16_is_close(model, text):
    """Within 5 % of the largest logit or feature, and it samples."""
    half = type(model).from_config(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    tokens, masked = tokens_of(model), torch.arange(N).expand(3, N) < 3

    def run(model):
        condition = model.transformer.condition(*training_text(text))
        if isinstance(model, MaskGenKL):
            return model.features(tokens, masked, condition).float()
        return model.logits(tokens.masked_fill(masked, V), condition).float()

    expected = run(model)
    assert (run(half) - expected).abs().max() < 0.05 * expected.abs().max()
    drawn = half.generate(generators=streams(0, 1, 2), **text)
    assert drawn.shape == tokens.shape and drawn.dtype == tokens.dtype and drawn.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": 0}, "steps?.*, got 0"),
        ({"temperature": -1.0}, "Temperature must be 0"),
        ({"guidance_schedule": "steep"}, 'Unknown guidance schedule "steep"'),
        ({"generators": streams(0)}, "one random generator an item: 3, got 1"),
        ({"null_features": None}, "Guidance needs null_features"),
        ({"text_features": torch.zeros(3, 6, TEXT + 1)}, rf"\[batch, length, {TEXT}\]"),
        ({"pooled": torch.zeros(3, 1, TEXT)}, rf"\[3, {TEXT}\], got \[3, 1, {TEXT}\]"),
        ({"token_mask": torch.zeros(3, N).bool()}, "tokens together with token_mask"),
        (
            {"tokens": torch.zeros(3, N + 1).long(), "token_mask": torch.ones(3, N + 1).bool()},
            "tokens and token_mask must",
        ),
    ],
)
def test_illegal_settings_are_refused(model, text, settings, words):
    with pytest.raises(InputError, match=words):
        model.generate(**{"generators": streams(0, 1, 2), **text, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"num_steps": N + 1}, f"1 to {N} steps"), ({"diffusion_steps": 1}, "2 to 1000 steps, got 1")],
)
def test_illegal_steps_of_continuous_tokens_are_refused(text, settings, words):
    with pytest.raises(InputError, match=words):
        build("kl").generate(generators=streams(0, 1, 2), **text, **settings)


def test_weights_of_another_system_are_refused(model):
    with pytest.raises(InputError, match=r'"model\.lm_head\.weight" is not a weight'):
        convert_state_dict({"model.lm_head.weight": torch.zeros(2, 2)}, model.config)
    name = {"MaskGenKL": "decoder_pos_embed_learned", "MaskGenVQ": "pos_embed"}
    state = convert_state_dict({name[type(model).__name__]: torch.zeros(1, N, 32)}, model.config)
    with pytest.raises(InputError, match=" is missing"):
        load_strict(model, state)


@pytest.mark.parametrize("names", [["embeddings"], ["lm_head"], ["embeddings", "lm_head"]])
def test_a_tied_table_loads_under_either_name(names):
    table = torch.randn(V + 4, 32)
    config = build("vq").config
    state = convert_state_dict({f"{name}.weight": table for name in names}, config)
    assert set(state) == {"embedding.weight"} and torch.equal(state["embedding.weight"], table)


def test_text_features_are_those_before_the_last_layer():
    torch.manual_seed(0)
    text_cfg = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 3}
    clip = open_clip.CLIP(8, {"image_size": 32, "patch_size": 16, "layers": 1}, text_cfg).eval()
    features, pooled = embed_text(clip, ["a red heart", ""])
    seen = []
    clip.transformer.resblocks[1].register_forward_hook(lambda *call: seen.append(call[-1]))
    ids = open_clip.get_tokenizer("ViT-L-14-336-quickgelu", context_length=16)(["a red heart", ""])
    with torch.no_grad():
        expected = clip.encode_text(ids)
    assert features.shape == (2, 16, 24) and torch.allclose(features, seen[0], atol=1e-6)
    assert torch.allclose(pooled, expected, atol=1e-6)
