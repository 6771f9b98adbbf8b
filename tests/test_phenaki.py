"""Phenaki: causal tokens, lookup-free ids, masked writing, stories."""

from __future__ import annotations

import itertools

import pytest
import torch

from tessera.generators.masked.phenaki import (
    Phenaki,
    Scene,
    hidden_count,
    scene_frames,
    tell_story,
)
from tessera.modalities.errors import InputError
from tessera.tokenizers.auto import AutoTokenizer
from tessera.tokenizers.quantizers.lfq import LFQ
from tessera.tokenizers.video.phenaki import (
    CViViT,
    PositionBias,
    alibi_slopes,
    causal_bias,
    patchify,
    unpatchify,
)
from tessera.training.losses import AdversarialLoss, PatchDiscriminator
from tessera.training.video_losses import VideoTokenizerLoss
from tessera.weights.convert.phenaki import convert_state_dict

SMALL = {
    "image_size": 16,
    "num_frames": 5,
    "patch_size": 8,
    "dim": 32,
    "spatial_depth": 1,
    "temporal_depth": 2,
    "heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}
TEXT = 12


def build_tokenizer(**changes):
    torch.manual_seed(0)
    return CViViT(**{**SMALL, **changes}).eval()


def build_model(**changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "max_tokens": 16, "dim": 32, "depth": 2, "heads": 2}
    return Phenaki(
        **{**settings, "head_dim": 16, "text_dim": TEXT, "num_steps": 4, **changes}
    ).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build_model()


def clip(frames, batch=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, 16, 16, generator=random) * 2 - 1


def text(batch=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[:, 3:] = False
    return torch.randn(batch, 5, TEXT, generator=random), mask


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def test_tokens_of_a_prefix_are_the_prefix_of_the_tokens(tokenizer):
    """Any length, also beyond that of training; a picture is a clip of one frame."""
    video = clip(11, batch=2)
    tokens = tokenizer.encode(video)
    assert tokens.shape == (2, 6 * 4)
    for frames, steps in ((1, 1), (3, 2), (7, 4)):
        assert torch.equal(tokenizer.encode(video[:, :, :frames]), tokens[:, : steps * 4])
    assert torch.equal(tokenizer.encode(video[:, :, 0]), tokens[:, :4])
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == video.shape
    part = tokenizer.decode(tokens[:, :8])
    torch.testing.assert_close(part, decoded[:, :, :3], atol=1e-5, rtol=1e-5)
    assert tokenizer.num_tokens == 3 * 4


def test_patches():
    video = torch.randn(2, 3, 4, 16, 24)
    patches = patchify(video, (2, 8, 4))
    assert patches.shape == (2, 2, 2, 6, 3 * 2 * 32)
    first = video[0, :, :2, :8, :4].flatten()
    torch.testing.assert_close(patches[0, 0, 0, 0], first)
    torch.testing.assert_close(unpatchify(patches, (2, 8, 4)), video)
    tokenizer = build_tokenizer(patch_size=(8, 4))
    assert tokenizer.grid == (3, 2, 4)
    assert tokenizer.decode(tokenizer.encode(clip(3))).shape == (1, 3, 3, 16, 16)


def test_position_bias_is_that_of_each_pair():
    bias = PositionBias(3, 8, 2)
    found = bias(2, 3, 2)
    places = list(itertools.product(range(2), range(3), range(2)))
    for i, j in ((0, 11), (7, 2), (5, 5)):
        offset = torch.tensor([a - b for a, b in zip(places[i], places[j], strict=True)]).float()
        expected = bias.net(offset.sign() * (offset.abs() + 1).log())
        torch.testing.assert_close(found[:, i, j], expected)


def test_causal_bias():
    assert alibi_slopes(4) == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert alibi_slopes(6) == [*alibi_slopes(4), 1 / 2, 1 / 8]
    bias = causal_bias(4, 3, torch.device("cpu"))
    assert bias[0].tolist() == [
        [0, -torch.inf, -torch.inf],
        [-0.25, 0, -torch.inf],
        [-0.5, -0.25, 0],
    ]


def test_lfq():
    lfq = LFQ(3)
    z = torch.tensor([[0.5, -0.1, 0.0], [-2.0, 3.0, 0.1]], requires_grad=True)
    codes, ids, _ = lfq(z)
    assert ids.tolist() == [0b100, 0b011]
    assert torch.equal(codes, lfq.ids_to_codes(ids))
    codes.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    # The entropies, over all codes at once.
    table = lfq.ids_to_codes(torch.arange(8))
    p = (-(z.detach()[:, None] - table).square().sum(-1)).softmax(-1)
    each = -(p * p.log()).sum(-1).mean()
    mean = p.mean(0)
    torch.testing.assert_close(lfq.entropy_loss(z.detach()), each + (mean * mean.log()).sum())


@pytest.mark.parametrize("quantization", ["lookup-free", "cosine", "fsq"])
def test_tokenizer_training_lowers_the_loss(quantization):
    """Squared error, a perceptual stand-in and a discriminator, on clips of two lengths."""
    tokenizer = build_tokenizer(quantization=quantization, code_dim=8, fsq_levels=(4, 4)).train()
    model = VideoTokenizerLoss(
        tokenizer,
        {"regularizer": 1.0, "gan": 0.1, "edges": 0.1},
        {"edges": lambda x, y: (x.diff(dim=-1) - y.diff(dim=-1)).abs().mean()},
        AdversarialLoss(PatchDiscriminator(32, 1, 4)),
        gan_start=3,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    video, lengths, errors = clip(3, batch=2), torch.tensor([3, 1]), []
    random = torch.Generator().manual_seed(0)
    for step in range(12):
        loss, parts = model(video, step, lengths, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(parts["l2"].item())
    assert errors[-1] < 0.9 * errors[0]
    assert {"edges", "psnr", "perplexity", "hinge"} <= parts.keys()
    assert int(tokenizer.encode(video).max()) < tokenizer.vocab_size


class Copy(torch.nn.Module):
    """A tokenizer that adds 0.2 to every frame."""

    def forward(self, video):
        return video + 0.2, video.new_ones(()), {}


def test_padding_frames_do_not_count():
    frames = []
    model = VideoTokenizerLoss(
        Copy(),
        {"regularizer": 2.0, "seen": 0.0},
        {"seen": lambda x, y: frames.append(y) or x.mean()},
        None,
        0,
    )
    video = torch.zeros(2, 3, 5, 16, 16)
    video[1, :, 3:] = torch.nan
    for seed in range(5):
        loss, parts = model(video, 0, torch.tensor([5, 3]), seeds(seed)[0])
        torch.testing.assert_close(loss, torch.tensor(0.01 + 2.0))
        torch.testing.assert_close(parts["psnr"], torch.tensor(20.0))
    assert not torch.cat(frames).isnan().any()
    l1 = VideoTokenizerLoss(Copy(), {"regularizer": 0.0}, {}, None, 0, distance="l1")
    torch.testing.assert_close(l1(video[:1], 0)[0], torch.tensor(0.1))
    with pytest.raises(InputError, match="l1, l2"):
        VideoTokenizerLoss(Copy(), {}, {}, None, 0, distance="l3")


def test_tokenizer_saves_and_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(clip(3)), tokenizer.encode(clip(3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode(clip(4)), "1 \\+ 2 k"),
        (lambda t: t.encode(torch.zeros(1, 3, 8, 8)), "16, 16"),
        (lambda t: t.decode(torch.zeros(1, 5, dtype=torch.int64)), r"\[1, 5\]"),
        (lambda t: t.decode(torch.full((1, 8), 64)), "0 to 63"),
        (lambda t: t.decode(torch.zeros(1, 8)), "whole numbers"),
        (lambda t: CViViT(quantization="other"), "lookup-free, cosine, fsq"),
        (lambda t: CViViT(vocab_size=100), "power of two"),
    ],
)
def test_tokenizer_errors(tokenizer, call, message):
    with pytest.raises(InputError, match=message):
        call(tokenizer)


def test_unknown_weights():
    with pytest.raises(InputError, match="critic"):
        convert_state_dict({"critic.weight": torch.zeros(1)}, {})


def test_generator_training_lowers_the_loss():
    model = build_model(text_dropout=0.5).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(12)[None].repeat(2, 1)
    random, losses = torch.Generator().manual_seed(0), []
    for _ in range(25):
        loss, _ = model(tokens, (3, 2, 2), *text(2), generator=random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_padded_items_read_as_if_alone(model):
    """Clips of several lengths in one batch: padding is neither seen nor scored."""
    features, mask = text(2)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(12) < torch.tensor([[12], [8]])
    both = model.logits(ids, (3, 2, 2), model.condition(features, mask), valid=valid)
    alone = model.logits(ids[1:, :8], (2, 2, 2), model.condition(features[1:], mask[1:]))
    torch.testing.assert_close(both[1:, :8], alone, atol=1e-5, rtol=1e-5)
    lengths = torch.tensor([12, 8])
    losses = []
    for filler in (0, 5):
        ids[1, 8:] = filler
        random = torch.Generator().manual_seed(3)
        losses.append(model(ids, (3, 2, 2), features, mask, lengths, random)[0])
    torch.testing.assert_close(*losses)


def test_hidden_counts():
    assert [hidden_count(12, step / 6) for step in range(6)] == [12, 12, 10, 8, 6, 3]
    assert hidden_count(2, 0.99) == 1


def test_items_have_seeds_of_their_own(model):
    features, mask = text(2)
    both = model.generate(features, mask, seeds(1, 2), (2, 2, 2))
    other = model.generate(features[1:], mask[1:], seeds(2), (2, 2, 2))
    assert torch.equal(both[1:], other)
    assert not torch.equal(both[1:], model.generate(features[1:], mask[1:], seeds(3), (2, 2, 2)))


def test_steps_and_prime(model):
    features, mask = text()
    prime = torch.tensor([[3, 1, 4, 1]])
    steps = list(model.stream(features, mask, seeds(0), (3, 2, 2), prime=prime, num_steps=3))
    assert [list(ids.shape) for ids in steps] == [[1, 12]] * 3
    assert all(torch.equal(ids[:, :4], prime) for ids in steps)
    free = model.generate(features, mask, seeds(0), (3, 2, 2), prime=prime, guidance_scale=1.0)
    assert torch.equal(free[:, :4], prime)


class Spy:
    """A tokenizer that remembers what it encoded."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, media):
        self.seen.append(media)
        return self.tokenizer.encode(media)


def test_story(model, tokenizer):
    """Scenes have their lengths, and each round starts from the last frames of the one before."""
    scenes = [Scene(*text(seed=1), 5), Scene(*text(seed=2), 8)]
    spy, progress = Spy(tokenizer), []
    rounds = list(
        tell_story(
            model, spy, scenes, seeds(0), prime_frames=3, callback=lambda *c: progress.append(c)
        )
    )
    # Four steps of tokens are all that the model holds: two of them are known in the second scene.
    assert [(part.scene, part.frames.shape[2]) for part in rounds] == [(0, 5), (1, 4), (1, 4)]
    assert progress == [(5, 13), (9, 13), (13, 13)]
    video = torch.cat([part.frames for part in rounds], dim=2)
    assert video.abs().max() <= 1
    for seen, end in zip(spy.seen, (5, 9), strict=True):
        assert torch.equal(seen, video[:, :, end - 3 : end])


def test_story_from_a_picture(model, tokenizer):
    start = clip(1)
    spy = Spy(tokenizer)
    parts = list(tell_story(model, spy, [Scene(*text(), 4)], seeds(0), prime_frames=1, start=start))
    assert torch.equal(spy.seen[0], start)
    assert sum(part.frames.shape[2] for part in parts) == 4
    other = clip(1, seed=5)
    changed = next(
        tell_story(model, tokenizer, [Scene(*text(), 4)], seeds(0), prime_frames=1, start=other)
    )
    assert not torch.equal(changed.frames, parts[0].frames)


def test_scene_frames():
    """Ends lie at the nearest step, so that durations do not drift."""
    assert scene_frames([1, 1, 1], fps=8, temporal_patch_size=2) == [9, 8, 8]
    assert scene_frames([1, 1, 1], fps=7.5, temporal_patch_size=2) == [7, 8, 8]
    assert scene_frames([0.01, 0.01], fps=8, temporal_patch_size=2) == [1, 2]
    assert scene_frames([1.0], fps=8, temporal_patch_size=2, continues=True) == [8]
    with pytest.raises(InputError, match="got 0"):
        scene_frames([0], 8, 2)


@pytest.mark.parametrize(
    ("frames", "settings", "message"),
    [
        ([], {}, "at least one scene"),
        ([4], {}, "1 \\+ 2 k frames, got 4"),
        ([5, 3], {}, "Scene 2 must have 2 k"),
        ([5], {"prime_frames": 4}, "got 4"),
        ([5], {"prime_frames": 7}, "leaves no room"),
    ],
)
def test_story_errors(model, tokenizer, frames, settings, message):
    scenes = [Scene(*text(), count) for count in frames]
    with pytest.raises(InputError, match=message):
        next(tell_story(model, tokenizer, scenes, seeds(0), **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (5, 2, 2)}, "20 tokens; this model holds 16"),
        ({"prime": torch.zeros(1, 3, dtype=torch.int64)}, "whole"),
        ({"prime": torch.full((1, 4), 64)}, "0 to 63"),
        ({"num_steps": 0}, "got 0"),
        ({"temperature": -1.0}, "got -1"),
        ({"text_features": torch.zeros(1, 5, 3)}, "length, 12"),
        ({"text_mask": torch.ones(1, 5)}, "must be bool"),
        ({"generators": []}, "one random generator an item"),
    ],
)
def test_generator_errors(model, change, message):
    features, mask = text()
    arguments = {"text_features": features, "text_mask": mask, "grid": (2, 2, 2)}
    with pytest.raises(InputError, match=message):
        model.generate(**{**arguments, "generators": seeds(0), **change})


def test_generator_saves_and_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = Phenaki.from_pretrained(tmp_path)
    features, mask = text()
    same = [m.generate(features, mask, seeds(0), (2, 2, 2)) for m in (model, again)]
    assert torch.equal(*same)
