"""ARDiT: the mask, cached steps against the two-copy pass, fill-in, lengths, a toy that is learned."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tessera.generators.flow.ardit import ARDiT, block_mask
from tessera.generators.sampling import draw
from tessera.modalities.errors import InputError

SIZE, WIDTH = 3, 2


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def tiny(**options) -> ARDiT:
    torch.manual_seed(0)
    options = {
        "symbols": list("abcdefghij"),
        "classes": ["x", "y"],
        "dim": 16,
        "depth": 2,
        "heads": 2,
        **options,
    }
    model = ARDiT(latent_dim=WIDTH, block_size=SIZE, mlp_ratio=2.0, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.set_statistics(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5]))
    return model


def texts():
    text = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    return {"text": text, "text_mask": text > 0}


def condition():
    return {**texts(), "labels": torch.tensor([0, 1])}


def test_mask_of_text_two_clean_and_three_noisy_blocks():
    step = torch.tensor([-1, 0, 0, 1, 0, 0, 1, 2])
    noisy = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).bool()
    valid = torch.ones(1, 8, dtype=torch.bool)
    mask = block_mask(step, noisy, valid)[0, 0].int()
    assert mask.tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 1, 0, 0, 0, 1],
    ]
    valid[0, 0] = valid[0, 5] = False
    mask = block_mask(step, noisy, valid)[0, 0]
    assert mask[0].tolist() == [True] + [False] * 7
    assert mask[4].tolist() == [False] * 4 + [True] + [False] * 3
    # One block over everything is plain flow matching: all see all.
    assert bool(block_mask(torch.zeros(5), torch.ones(5).bool(), torch.ones(1, 5).bool()).all())


@pytest.mark.parametrize("fill", [False, True])
def test_cached_blocks_are_those_of_the_two_copy_pass(fill):
    model, lengths = tiny(), torch.tensor([12, 8])
    settings = dict(lengths=lengths, num_steps=1, guidance_scale=1.0, **condition())
    order = torch.tensor([[0, 1, 2, 3]]).repeat(2, 1)
    if fill:
        tokens = torch.randn(2, 12, WIDTH, generator=seeds(9)[0])
        keep = torch.ones(2, 12, dtype=torch.bool)
        keep[0, 4:8] = keep[1, :2] = False
        settings |= {"tokens": tokens, "token_mask": keep}
        order = torch.tensor([[0, 3, 1, 2], [1, 2, 0, 3]])
    made = model.generate(seeds(1, 2), **settings)
    noise = [
        draw("normal", (1, SIZE, WIDTH), g, torch.device("cpu"))
        for g in [seeds(1, 2)]
        for _ in range(4)
    ]
    noise = torch.stack(noise, dim=1)[:, :, 0]
    row = torch.arange(2)[:, None]
    noise = noise[row, order]
    blocks = ((made - model.latent_mean) / model.latent_std).unflatten(1, (4, SIZE))[row, order]
    with torch.no_grad():
        v = model.velocities(blocks, noise, torch.ones(2, 4), order, lengths, **condition())
    real = (order[..., None] * SIZE + torch.arange(SIZE)) < lengths[:, None, None]
    if fill:
        kept = keep.unflatten(1, (4, SIZE))[row, order]
        assert torch.allclose(
            made[keep & (torch.arange(12) < lengths[:, None])],
            tokens[keep & (torch.arange(12) < lengths[:, None])],
            atol=1e-5,
        )
        # One step from noise: x = eps - v; of partly kept blocks too, whose kept latents are there.
        real = real & ~kept
    torch.testing.assert_close((noise - v)[real], blocks[real], atol=1e-5, rtol=1e-5)


def test_nothing_leaks_between_noisy_blocks():
    model = tiny()
    blocks = torch.randn(1, 3, SIZE, WIDTH, requires_grad=True)
    noisy = torch.randn(1, 3, SIZE, WIDTH, requires_grad=True)
    first = {name: value[:1] for name, value in condition().items()}
    order, lengths = torch.arange(3)[None], torch.tensor([9])
    v = model.velocities(blocks, noisy, torch.full((1, 3), 0.5), order, lengths, **first)
    clean, own = torch.autograd.grad(v[0, 1].sum(), (blocks, noisy))
    assert (clean[0].abs().amax((1, 2)) > 0).tolist() == [True, False, False]
    assert (own[0].abs().amax((1, 2)) > 0).tolist() == [False, True, False]


def test_items_do_not_depend_on_their_batch():
    model, lengths = tiny(), torch.tensor([11, 5])
    settings = dict(num_steps=2, sampler="euler-maruyama", guidance_scale=2.0)
    both = model.generate(seeds(1, 2), lengths=lengths, **settings, **condition())
    second = {name: value[1:] for name, value in condition().items()}
    second["text"], second["text_mask"] = second["text"][:, :2], second["text_mask"][:, :2]
    alone = model.generate(seeds(2), lengths=lengths[1:], **settings, **second)
    assert both.shape == (2, 11, WIDTH) and bool((both[1, 5:] == 0).all())
    torch.testing.assert_close(both[1:, :5], alone, atol=1e-5, rtol=1e-5)
    again = model.generate(seeds(1, 2), lengths=lengths, **settings, **condition())
    assert torch.equal(both, again)


def test_text_is_read_symbol_by_symbol():
    read = tiny().encode_text(["abcd", ["e", "?", "f"]])
    assert all(torch.equal(read[name], value) for name, value in texts().items())
    with pytest.raises(InputError, match="no symbol"):
        tiny().encode_text(["abc", "!?"])


def test_stream_grows_block_by_block_and_text_gives_the_length():
    model = tiny(latents_per_token=2.4)
    pieces = list(model.stream(seeds(1, 2), num_steps=1, **condition()))
    assert [int(p[0].abs().sum(1).gt(0).sum()) for p in pieces] == [3, 6, 9, 10]
    assert int(pieces[-1][1].abs().sum(1).gt(0).sum()) == 5
    for before, after in pairwise(pieces):
        made = before != 0
        assert torch.equal(before[made], after[made])


def test_a_model_without_training_passes_noise_through():
    model = tiny(symbols=(), classes=())
    model.init_weights()
    made = model.generate(seeds(3), lengths=torch.tensor([6]), num_steps=4)
    noise = torch.stack(
        [
            draw("normal", (1, SIZE, WIDTH), g, torch.device("cpu"))
            for g in [seeds(3)]
            for _ in range(2)
        ],
        1,
    )
    torch.testing.assert_close(made, noise.flatten(1, 3) * model.latent_std + model.latent_mean)


def test_a_toy_is_learned():
    torch.manual_seed(1)
    model = ARDiT(
        2,
        2,
        classes=["x", "y"],
        dim=32,
        depth=2,
        heads=2,
        mlp_ratio=2.0,
        context_dropout=0.0,
        fill=0.3,
    )
    model.init_weights()
    time = torch.arange(6.0)

    def batch(count):
        labels = torch.randint(2, (count,))
        sign = (2.0 * labels - 1)[:, None]
        phase = torch.randint(2, (count, 1)) * torch.pi  # Told by the first latents alone.
        wave = torch.stack([sign * (1 + 0 * time), torch.cos(time + phase)], dim=-1)
        return wave + 0.1 * torch.randn_like(wave), labels

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(250):
        latents, labels = batch(48)
        loss, parts = model(latents, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20]) and "mse_first_block" in parts
    model.eval()
    labels = torch.tensor([0, 1] * 8)
    made = model.generate(
        seeds(*range(16)),
        labels=labels,
        lengths=torch.full((16,), 6),
        num_steps=8,
        guidance_scale=1.0,
    )
    assert (made[..., 0] - (2.0 * labels - 1)[:, None]).abs().mean() < 0.3
    sign = made[:, 0, 1].sign()[:, None]
    assert (made[..., 1] - sign * torch.cos(time)).abs().mean() < 0.3
    # The middle is filled in to fit both sides.
    keep = torch.tensor([1, 1, 0, 0, 1, 1]).bool().repeat(16, 1)
    real, labels = batch(16)
    filled = model.generate(
        seeds(*range(16)),
        labels=labels,
        lengths=torch.full((16,), 6),
        num_steps=8,
        guidance_scale=1.0,
        tokens=real,
        token_mask=keep,
    )
    assert torch.allclose(filled[keep], real[keep], atol=1e-5)
    assert (filled - real)[~keep].abs().mean() < 0.35


def test_models_are_saved_with_their_statistics(tmp_path):
    model = tiny(latents_per_token=2.0)
    model.save_pretrained(tmp_path)
    again = ARDiT.from_pretrained(tmp_path).eval()
    one, other = (m.generate(seeds(1, 2), num_steps=2, **condition()) for m in (model, again))
    assert torch.equal(one, other)


def test_settings_that_mean_nothing():
    model, lengths = tiny(), torch.tensor([4, 4])
    with pytest.raises(InputError, match="takes text"):
        model.generate(seeds(1, 2), lengths=lengths, labels=torch.tensor([0, 1]))
    with pytest.raises(InputError, match="no labels"):
        tiny(classes=()).generate(seeds(1, 2), lengths=lengths, **condition())
    with pytest.raises(InputError, match="give lengths"):
        model.generate(seeds(1, 2), **condition())
    with pytest.raises(InputError, match="1 latent or more"):
        model.generate(seeds(1, 2), lengths=lengths - 4, **condition())
    with pytest.raises(InputError, match="guidance"):
        model.generate(seeds(1, 2), lengths=lengths, guidance_scale=0.5, **condition())
    with pytest.raises(InputError, match="one random generator an item"):
        model.generate(seeds(1), lengths=lengths, **condition())
    with pytest.raises(InputError, match="multiple of 4"):
        ARDiT(dim=20, heads=2)
