from __future__ import annotations

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.tokenizers.audio.patterns import (
    apply_template,
    deinterleave,
    delay,
    delay_mask,
    delay_template,
    flatten,
    interleave,
    parallel,
    split_parallel,
    undelay,
    unflatten,
)


def tokens(batch=2, rows=3, frames=5, vocab=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, rows, frames), generator=generator)


def test_delay_by_hand():
    sequence = delay(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), fill=9)
    assert sequence.tolist() == [[[1, 2, 3, 9], [9, 4, 5, 6]]]
    assert delay_mask(2, 3).tolist() == [[True, True, True, False], [False, True, True, True]]


def test_flatten_by_hand():
    sequence = flatten(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), vocab_size=10)
    assert sequence.tolist() == [[1, 14, 2, 15, 3, 16]]


def test_interleave_by_hand():
    a, b = torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]])
    assert interleave([a, b]).tolist() == [[[1, 3, 2, 4]]]
    assert interleave([b, a]).tolist() == [[[3, 1, 4, 2]]]
    assert [track.tolist() for track in deinterleave(torch.tensor([[[1, 3, 2]]]), 2)] == [
        [[[1]]],
        [[[3]]],
    ]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (2, 4, 1), (3, 8, 5)], ids=str)
def test_every_pattern_is_undone(shape):
    batch, rows, frames = shape
    x, y = tokens(*shape), tokens(*shape, seed=1)
    assert torch.equal(undelay(delay(x, 99)), x)
    assert (delay(x, 99)[:, delay_mask(rows, frames)] < 10).all()
    assert (delay(x, 99)[:, ~delay_mask(rows, frames)] == 99).all()
    assert torch.equal(unflatten(flatten(x, 10), rows, 10), x)
    assert flatten(x, 10).shape == (batch, rows * frames)
    for forward, back in ((parallel, split_parallel), (interleave, deinterleave)):
        a, b = back(forward([x, y]), 2)
        assert torch.equal(a, x) and torch.equal(b, y)
    assert torch.equal(parallel([x]), x)


def test_unflatten_of_broken_sequences():
    sequence = flatten(tokens(1, 3, 2), 10)
    assert torch.equal(unflatten(sequence[:, :-1], 3, 10), tokens(1, 3, 2)[:, :, :1])
    with pytest.raises(InputError, match="another codebook"):
        unflatten(sequence.flip(1), 3, 10)
    with pytest.raises(InputError, match="no whole frame"):
        undelay(tokens(1, 3, 2))
    with pytest.raises(InputError, match="one number of frames"):
        interleave([tokens(1, 1, 2), tokens(1, 1, 3)])
    with pytest.raises(InputError, match="tracks"):
        split_parallel(tokens(1, 3, 2), 2)


def test_template_by_hand():
    b, p = 8, 9
    start = torch.full((1, 3, 1), b)
    assert delay_template(start, 6, b, p).tolist() == [
        [[b, -1, -1, -1, p, p], [b, b, -1, -1, -1, p], [b, b, b, -1, -1, -1]]
    ]
    prompt = torch.tensor([[[b, 1, 2], [b, 3, 4], [b, 5, 6]]])
    template = delay_template(prompt, 7, b, p)
    assert template.tolist() == [
        [[b, 1, 2, -1, -1, p, p], [b, b, 3, 4, -1, -1, p], [b, b, b, 5, 6, -1, -1]]
    ]
    assert (delay_template(start, 4, b, p) == -1).all()
    written = apply_template(torch.zeros(1, 3, 4, dtype=torch.long), template)
    assert written.tolist() == [[[b, 1, 2, 0], [b, b, 3, 4], [b, b, b, 5]]]
