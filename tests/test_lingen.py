"""LinGen: linear cost and memory, any length, progressive training, guidance."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tessera.generators.linear_video.lingen import (
    LinGen,
    Stage,
    grid_positions,
    linear_quadratic_times,
    training_shape,
)
from tessera.kernels.ssd import chunked, ops
from tessera.modalities.errors import InputError

TEXT = 12
SMALL = {
    "latent_channels": 4,
    "dim": 32,
    "depth": 2,
    "head_dim": 16,
    "text_dim": TEXT,
    "window": (4, 2, 2),
    "review_window": (2, 2, 2),
    "review_tokens_from": 64,
    "d_state": 8,
    "headdim": 16,
    "num_steps": 3,
}


def build(**changes):
    torch.manual_seed(0)
    model = LinGen(**{**SMALL, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            # What training starts from zero must show in the results.
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


def text(batch=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[:, 4:] = False
    return torch.randn(batch, 5, TEXT, generator=random), mask


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors alive at a time, of those made inside."""

    def __enter__(self):
        self.live = self.peak = 0
        self.known = set()
        return super().__enter__()

    def release(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.release, key, size)
        return out


def plain_scan(x, d, A, B, C, initial, segments, order, reverse, shift, backend):
    """The torch path outside of its operator, so that its parts are seen."""
    return chunked.forward(x, d, A, B, C, initial, segments, order, reverse, shift)


@torch.no_grad()
def test_cost_and_memory_are_linear(monkeypatch):
    monkeypatch.setattr(ops, "scan", plain_scan)
    model = build()
    condition = model.condition(*text())
    flops, memory = [], []
    for frames in (8, 16, 32, 64):
        x = torch.zeros(1, 4, frames, 16, 16)
        model.velocity(x, torch.ones(1), condition)  # Tables of the grid are made once.
        with FlopCounterMode(display=False) as counter:
            model.velocity(x, torch.ones(1), condition)
        with PeakMemory() as meter:
            model.velocity(x, torch.ones(1), condition)
        flops.append(counter.get_total_flops())
        memory.append(meter.peak)
    for counts in (flops, memory):
        # Windows that the border cuts weigh more in short clips.
        assert 6 < counts[3] / counts[0] < 8.2
        assert 3.5 < counts[3] / counts[1] < 4.1
        assert 1.9 < counts[3] / counts[2] < 2.05
    stated = [model.flops((frames, 16, 16), 5) for frames in (8, 64)]
    assert 7.9 < stated[1] / stated[0] < 8.1


def test_any_length_after_short_training():
    """A few steps on pictures and 2 frames; then 24 frames, with review tokens, are drawn."""
    torch.manual_seed(0)
    model = LinGen(**SMALL, text_dropout=0.5).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stages = [Stage(10, 1, 4, 1.0), Stage(30, 2, 4, 0.3)]
    random = torch.Generator().manual_seed(0)
    pattern = torch.randn(1, 4, 1, 4, 4, generator=random)
    losses, shapes = [], set()
    for step in range(40):
        frames, size = training_shape(stages, step, random)
        shapes.add(frames)
        latents = pattern.expand(4, -1, frames, size, size)
        loss, _ = model(latents, *text(4), generator=random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert shapes == {1, 2}
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    drawn = model.eval().generate(*text(), seeds(1), (24, 4, 4), num_steps=8, guidance_scale=1.0)
    assert drawn.shape == (1, 4, 24, 4, 4)
    distance = (drawn - pattern).square().mean()
    noise = (torch.randn(drawn.shape, generator=random) - pattern).square().mean()
    assert distance < 0.9 * noise


def test_all_weights_get_gradients():
    model = build(review_tokens_from=1).train()
    loss, _ = model(torch.randn(2, 4, 8, 4, 4), *text(2), generator=torch.Generator())
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= {"null_text"}


def test_training_shape():
    stages = [Stage(2, 4, 8, 0.0), Stage(2, 16, 16, 0.5)]
    random = torch.Generator().manual_seed(0)
    assert [training_shape(stages, step, random) for step in (0, 1)] == [(4, 8)] * 2
    later = {training_shape(stages, step, random) for step in range(2, 30)}
    assert later == {(1, 16), (16, 16)}


def test_times():
    times = linear_quadratic_times(10, 100)
    assert len(times) == 11
    assert (times[0], times[-1]) == (1, 0)
    steps = [a - b for a, b in pairwise(times)]
    torch.testing.assert_close(torch.tensor(steps[:5]), torch.full((5,), 0.01))
    assert all(b > a for a, b in pairwise(steps[5:]))
    assert linear_quadratic_times(1) == [1, 0]
    assert linear_quadratic_times(4, 4) == [1, 0.75, 0.5, 0.25, 0]


def test_positions_tell_places_apart():
    table = grid_positions((3, 2, 2), 32, torch.device("cpu"))
    assert table.shape == (12, 32)
    assert len({tuple(row) for row in table.tolist()}) == 12
    longer = grid_positions((5, 2, 2), 32, torch.device("cpu"))
    torch.testing.assert_close(longer[:12], table)


def test_items_have_seeds_of_their_own(model):
    features, mask = text(2)
    both = model.generate(features, mask, seeds(1, 2), (2, 4, 4))
    other = model.generate(features[1:], mask[1:], seeds(2), (2, 4, 4))
    torch.testing.assert_close(both[1:], other, atol=1e-4, rtol=1e-4)
    third = model.generate(features[1:], mask[1:], seeds(3), (2, 4, 4))
    assert not torch.allclose(third, other, atol=1e-2)


def test_guidance(model):
    """Scale 1 is the text alone, 0 the unconditional text; a negative text takes its place."""
    features, mask = text()
    shape = (2, 4, 4)
    empty = torch.zeros_like(mask)
    plain = model.generate(features, mask, seeds(1), shape, guidance_scale=1.0)
    zero = model.generate(features, mask, seeds(1), shape, guidance_scale=0.0)
    none = model.generate(features, empty, seeds(1), shape, guidance_scale=1.0)
    torch.testing.assert_close(zero, none, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, none, atol=1e-3)
    same = model.generate(
        features, mask, seeds(1), shape, guidance_scale=4.0, null_features=features, null_mask=mask
    )
    torch.testing.assert_close(same, plain, atol=1e-3, rtol=1e-3)


def test_padding_of_texts_is_not_read(model):
    features, mask = text()
    changed = features.masked_fill(~mask[..., None], 9.0)
    x = torch.randn(1, 4, 2, 4, 4, generator=seeds(1)[0])
    a, b = (model.velocity(x, torch.ones(1), model.condition(f, mask)) for f in (features, changed))
    torch.testing.assert_close(a, b)


def test_clips_are_continued(model):
    features, mask = text()
    known = torch.randn(1, 4, 1, 4, 4, generator=seeds(7)[0])
    steps = list(model.stream(features, mask, seeds(1), (3, 4, 4), known=known))
    assert len(steps) == SMALL["num_steps"]
    assert all(torch.equal(x[:, :, :1], known) for x in steps)
    other = model.generate(features, mask, seeds(1), (3, 4, 4), known=-known)
    assert not torch.allclose(other[:, :, 1:], steps[-1][:, :, 1:], atol=1e-3)


def test_known_frames_are_shown_free_of_noise():
    model = build(known_share=1.0)
    seen = []
    model.input.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    latents = torch.randn(2, 4, 3, 4, 4, generator=seeds(1)[0])
    frame = model.grid(latents.shape[2:])[1] * model.grid(latents.shape[2:])[2]
    features, mask = text(2)
    model.train()(latents, features, mask, seeds(3)[0])
    clear = latents.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6).flatten(4)
    clear = clear.flatten(1, 3)
    assert torch.equal(seen[0][:, :frame], clear[:, :frame])
    assert not torch.isclose(seen[0][:, 2 * frame :], clear[:, 2 * frame :]).all(-1).any()
    # Sampling does the same, at every step and in both halves of guidance.
    seen.clear()
    known = latents[:, :, :1]
    made = model.eval().generate(features, mask, seeds(1, 2), (3, 4, 4), known=known)
    assert len(seen) == SMALL["num_steps"]
    assert all(torch.equal(x[:, :frame], clear[:, :frame].repeat(2, 1, 1)) for x in seen)
    assert torch.equal(made[:, :, :1], known)


@pytest.mark.parametrize(("frame", "counts"), [(0, False), (1, True)])
def test_frames_that_are_shown_are_not_counted(frame, counts):
    model, (features, mask) = build(known_share=1.0).train(), text()
    latents = torch.randn(1, 4, 2, 4, 4, generator=seeds(1)[0])
    plain, _ = model(latents, features, mask, seeds(3)[0])
    wrong = torch.zeros(8, 1)
    wrong[4 * frame : 4 * frame + 4] = 1.0
    model.output.register_forward_hook(lambda _, inputs, output: output + wrong)
    assert torch.equal(model(latents, features, mask, seeds(3)[0])[0], plain) != counts


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = LinGen.from_pretrained(tmp_path)
    drawn = [m.generate(*text(), seeds(1), (2, 4, 4)) for m in (model, again)]
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (2, 3, 4)}, "multiples of 2, got 2 frames of 4x3"),
        ({"shape": (0, 4, 4)}, "1 frame or more"),
        ({"num_steps": 0}, "got 0"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"text_features": torch.zeros(1, 5, 3)}, "length, 12"),
        ({"text_mask": torch.ones(1, 5)}, "must be bool"),
        ({"generators": seeds(1, 2)}, "one random generator an item"),
        ({"known": torch.zeros(1, 4, 2, 4, 4)}, "1 to 1"),
        ({"null_features": torch.zeros(1, 3, TEXT)}, "shapes of the text's"),
    ],
)
def test_errors(model, change, message):
    features, mask = text()
    arguments = {"text_features": features, "text_mask": mask, "shape": (2, 4, 4)}
    with pytest.raises(InputError, match=message):
        model.generate(**{**arguments, "generators": seeds(1), **change})
