from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from tessera.benchmarks import bench_token_reduction as bench
from tessera.generators.next_scale.var import VAR
from tessera.kernels.tokens import matching, reference
from tessera.kernels.tokens.assignment import Assignment, compact, merge, unmerge
from tessera.kernels.tokens.attention import attention_columns, attention_sized
from tessera.kernels.tokens.dymu import (
    RunningThreshold,
    attention_virtual,
    match_batch,
    match_threshold,
    merge_batch,
)
from tessera.kernels.tokens.mustdrop import (
    final_kept,
    key_tokens,
    match_windows,
    select_attention,
    window_similarity,
)
from tessera.kernels.tokens.patch import apply_token_merging, remove_token_merging
from tessera.kernels.tokens.pitome import match_energy
from tessera.kernels.tokens.stc import NoveltyPruner, TokenCacher
from tessera.kernels.tokens.todre import central_token, select_diverse
from tessera.kernels.tokens.token_sparse_attention import (
    attention_token_sparse,
    coverage_count,
    select_tokens,
    token_scores,
)
from tessera.kernels.tokens.tome import match_bipartite, match_kth, match_random, merge_schedule
from tessera.kernels.tokens.tome_sd import match_grid
from tessera.modalities.errors import InputError
from tessera.tests.tiny import tiny_pipeline, tiny_tokenizer
from tessera.tokenizers.quantizers.residual import MultiScaleResidualVQ

LENGTHS = (1, 2, 7, 8, 63, 64, 65, 1000)
MODES = ("mean", "sum", "amax", "wavg", "prune")


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles far below the lengths, so that their seams are tested."""
    monkeypatch.setattr(matching, "SOURCE_TILE", 48)
    monkeypatch.setattr(matching, "TARGET_TILE", 56)


def assert_same_match(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=0)
    seen = torch.isfinite(found[0])
    assert torch.equal(found[1][seen], expected[1][seen])


@pytest.mark.parametrize("length", LENGTHS)
def test_best_match(length):
    metric = tokens(3, 20, length).transpose(1, 2)  # Not contiguous.
    position = torch.arange(length)
    valid = tokens(3, length, seed=1) > -0.5
    for mask in (None, valid):
        found = matching.best_match(metric, position[::2], position[1::2], mask)
        assert_same_match(found, reference.best_match(metric, position[::2], position[1::2], mask))
    order = tokens(3, length, seed=2).argsort(dim=1)  # Lists of each sample's own.
    lists = order[:, : length // 3 + 1], order[:, length // 3 + 1 :]
    assert_same_match(matching.best_match(metric, *lists), reference.best_match(metric, *lists))


@pytest.mark.parametrize("length", LENGTHS)
def test_similarity_energy(length):
    metric = tokens(2, 2 * length, 12)[:, ::2]
    for kernel in ("elu", "gauss"):
        torch.testing.assert_close(
            matching.similarity_energy(metric, kernel, 0.2, 0.8),
            reference.similarity_energy(metric, kernel, 0.2, 0.8),
            atol=1e-6,
            rtol=0,
        )


def test_bfloat16_is_matched_in_float32():
    metric = tokens(2, 200, 32).bfloat16()
    position = torch.arange(200)
    wide = matching.best_match(metric.float(), position[::2], position[1::2])
    half = matching.best_match(metric, position[::2], position[1::2])
    assert half[0].dtype == torch.float32
    assert torch.equal(half[0], wide[0]) and torch.equal(half[1], wide[1])
    assert torch.equal(
        matching.similarity_energy(metric, "elu", 0.5, 1.0),
        matching.similarity_energy(metric.float(), "elu", 0.5, 1.0),
    )
    a = match_bipartite(metric, 80)
    y, size = merge(metric, a, mode="wavg")
    assert y.dtype == torch.bfloat16 and size.dtype == torch.float32
    torch.testing.assert_close(
        y.float(), merge(metric.float(), a, mode="wavg")[0], atol=1e-2, rtol=1e-2
    )


def test_ties_go_to_the_lowest_index():
    metric = torch.eye(4)[torch.arange(400) % 4][None]  # Token i equals token i + 4.
    best, where = matching.best_match(metric, torch.arange(200, 208), torch.arange(200))
    assert torch.equal(best, torch.ones(1, 8))
    assert where.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    a, energy = match_energy(torch.ones(1, 400, 4), 0.75, 0.5)
    assert len(energy.unique()) == 1  # So the order is that of the tokens.
    assert a.rep[0, :200].tolist() == list(range(200, 400))
    assert a.rep[0, 200:].tolist() == list(range(1, 200, 2))
    zeros = torch.zeros(1, 10, 4)
    assert match_bipartite(zeros, 3).row[0].tolist() == [2, 2, 2, 3, 2, 4, 0, 5, 1, 6]


def test_zero_tokens_are_similar_to_none():
    metric = tokens(1, 20, 8)
    metric[0, 4] = 0
    best, _ = matching.best_match(metric, torch.arange(0, 20, 2), torch.arange(1, 20, 2))
    assert best[0, 2] == 0 and torch.isfinite(best).all()


def every_match(metric):
    """One assignment of each method, of tokens [B, 36, C]."""
    yield "tome", match_bipartite(metric, 11)
    yield "tome cls", match_bipartite(metric, 11, cls=True)
    yield "tome distill", match_bipartite(metric, 11, cls=True, distill=True)
    yield "kth", match_kth(metric, 5)
    yield "random", match_random(metric, 9, torch.Generator().manual_seed(0))
    yield "grid", match_grid(metric, (4, 9), 17, stride=(2, 2))
    for variant in ("split", "bsm", "text"):
        yield variant, match_energy(metric, 0.7, 0.5, variant=variant, cls=True)[0]
    yield "windows", match_windows(metric, (6, 6), (2, 3), 0.0, cls=False)
    yield "batch", match_batch(metric, r=8, cls=True)[0]
    yield "batch above", match_batch(metric, threshold=0.4, valid=tokens(2, 36, seed=5) > -1)[0]
    yield "one", match_threshold(metric[:1], 0.4)


def test_merge_then_unmerge_invariants():
    metric, x = tokens(2, 36, 6), tokens(2, 36, 5, seed=1)
    for name, a in every_match(metric):
        batch, rows = a.rep.shape
        kept = (a.row >= 0).sum(1)
        assert torch.equal(a.size.sum(1).int(), kept.int()), name
        assert torch.equal(a.valid.sum(1).int(), a.num), name
        assert rows == a.num.max(), name
        # A representative is in the row that it represents.
        at = torch.gather(a.row.long(), 1, a.rep.long().clamp(min=0))
        assert torch.equal(at[a.valid], torch.arange(rows).expand(batch, -1)[a.valid]), name
        y, size = merge(x[:batch], a, mode="wavg")
        alive = (a.row >= 0)[..., None]
        total = (x[:batch] * alive).sum(1)
        torch.testing.assert_close((y * size).sum(1), total, atol=1e-5, rtol=1e-5)
        back = unmerge(y, a)
        torch.testing.assert_close(back.sum(1), total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merge(back, a), y, atol=1e-6, rtol=1e-6)
        assert torch.equal(back[~alive[..., 0]], torch.zeros_like(back[~alive[..., 0]]))
        ordered = a.sorted()
        valid_reps = [row[row >= 0].tolist() for row in ordered.rep]
        assert all(row == sorted(row) for row in valid_reps), name
        torch.testing.assert_close(
            unmerge(merge(x[:batch], ordered), ordered), unmerge(merge(x[:batch], a), a)
        )


@pytest.mark.parametrize("mode", MODES)
def test_merge_and_gradient(mode):
    metric, x = tokens(2, 36, 6), tokens(2, 5, 36, seed=1).transpose(1, 2)
    size = tokens(2, 36, 1, seed=2).abs() + 0.5
    for name, a in every_match(metric):
        batch = len(a.row)
        weights = tokens(*a.rep.shape, 5, seed=3)
        results = []
        for function in (merge, reference.merge):
            z = x[:batch].clone().requires_grad_()
            y = function(z, a, size=size[:batch], mode=mode)
            y = y[0] if mode == "wavg" else y
            (grad,) = torch.autograd.grad((y * weights).sum(), z)
            results.append((y, grad))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=f"{name} {mode}")


def test_merge_and_unmerge_gradcheck():
    a = match_batch(tokens(2, 9, 4), r=3)[0]
    x = tokens(2, 9, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: merge(z, a), x)
    assert torch.autograd.gradcheck(lambda z: merge(z, a, mode="wavg")[0], x)
    y = tokens(*a.rep.shape, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: unmerge(z, a), y)
    torch.testing.assert_close(unmerge(y, a), reference.unmerge(y, a))


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(length):
    metric, x = tokens(2, length, 8), tokens(2, length, 3, seed=1)
    most = length // 2
    assert match_bipartite(metric, length).rep.shape[1] == length - most
    assert match_bipartite(metric, length, cls=True).rep.shape[1] == length - (length - 1) // 2
    assert match_grid(metric, (1, length), length, stride=(1, 1)).rep.shape[1] == length
    a, energy = match_energy(metric, 0.5, 0.5)
    assert energy.shape == (2, length) and a.rep.shape[1] == length - most
    batch, found = match_batch(metric, r=length)
    assert found >= 0 and int(batch.num.sum()) >= 2 * (length - (length + 1) // 2)
    k = max(1, length // 3)
    pivot = central_token(x)
    for objective in ("sum", "max"):
        picks = select_diverse(x, k, pivot, objective=objective)
        assert torch.equal(picks, reference.select_diverse(x.double(), k, pivot, objective))
    for assignment in (a, batch):
        assert unmerge(merge(x, assignment), assignment).shape == x.shape


def test_ratio_zero_is_the_identity():
    metric, x = tokens(2, 36, 6), tokens(2, 36, 4, seed=1)
    assignments = [
        match_bipartite(metric, 0),
        match_grid(metric, (6, 6), 0),
        match_energy(metric, 1.0, 0.5)[0],
        match_random(metric, 0),
        match_batch(metric, r=0)[0].sorted(),
        match_batch(metric, threshold=1.0)[0].sorted(),
        match_threshold(metric[:1], 1.0),
        match_windows(metric, (6, 6), (2, 2), 1.1, cls=False),
    ]
    for a in assignments:
        part = x[: len(a.row)]
        for mode in ("mean", "sum", "amax", "prune"):
            assert torch.equal(merge(part, a.sorted(), mode=mode), part)


def test_composition():
    metric = tokens(2, 40, 8)
    first = match_bipartite(metric, 12)
    x, size = merge(metric, first, mode="wavg")
    second = match_bipartite(x, 9)
    both = first.then(second)
    y, total = merge(x, second, size=size, mode="wavg")
    once, counts = merge(metric, both, mode="wavg")
    torch.testing.assert_close(once, y)
    assert torch.equal(counts, total) and torch.equal(both.size[..., None], total)


def test_compact_keeps_the_order():
    x = torch.arange(8.0).view(2, 4, 1)
    valid = torch.tensor([[False, True, False, True], [True, True, True, False]])
    y, front = compact(x, valid)
    assert y[..., 0].tolist() == [[1, 3, 0], [4, 5, 6]]
    assert front.tolist() == [[True, True, False], [True, True, True]]


def test_thresholds():
    running = RunningThreshold()
    assert running.value == 1.0
    assert [round(running.update(t), 6) for t in (0.5, 0.7, 0.9)] == [0.5, 0.6, 0.7]
    metric = tokens(3, 24, 6)
    a, found = match_batch(metric, r=4)
    assert int(a.num.sum()) == 3 * 24 - 3 * 4
    again, _ = match_batch(metric, threshold=float(found))
    assert torch.equal(again.row, a.row)  # The found threshold is the first pair not merged.
    capped, _ = match_batch(metric, r=4, max_r=4)
    assert capped.num.tolist() == [20, 20, 20]
    one = match_threshold(metric[:1], float(found))
    alone, _ = match_batch(metric[:1], threshold=float(found))
    assert torch.equal(one.row, alone.row)
    y, size = merge_batch(metric, a)
    torch.testing.assert_close(y, merge(metric, a), atol=1e-3, rtol=1e-3)
    assert torch.equal(size[..., 0], a.size)


def test_sized_attention_equals_repeated_keys():
    q, k, v = tokens(2, 3, 5, 8), tokens(2, 3, 4, 8, seed=1), tokens(2, 3, 4, 8, seed=2)
    a = Assignment.from_mapping(torch.tensor([[0, 1, 1, 2, 3, 3, 3], [3, 2, 1, 0, 0, 0, 0]]), 4)
    index = a.row.long()[:, None, :, None].expand(-1, 3, -1, 8)
    expected = reference.attention(q, k.gather(2, index), v.gather(2, index))
    torch.testing.assert_close(attention_sized(q, k, v, a.size), expected)
    mask = torch.tensor([True, True, False, True])
    repeated = mask[a.row.long()][:, None, None]
    bias = torch.zeros(repeated.shape).masked_fill(~repeated, -torch.inf)
    expected = reference.attention(q, k.gather(2, index), v.gather(2, index), bias)
    torch.testing.assert_close(attention_sized(q, k, v, a.size, mask[None, None, None]), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_virtual_attention(causal):
    q, k, v = (tokens(2, 3, 5, 8, seed=i) for i in range(3))
    mapping = torch.stack([torch.arange(11) % 5, torch.arange(10, -1, -1) // 3 % 5])
    mapping[1, -1] = 4
    a = Assignment.from_mapping(mapping, 5)
    angles = torch.arange(11)[:, None] * (0.5 ** torch.arange(4)).repeat(2)
    results = []
    for function in (attention_virtual, reference.attention_virtual):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = function(*leaves, a, angles.cos(), angles.sin(), causal=causal)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        each = function(q, k, v, a, angles.cos(), angles.sin(), causal=causal, merge_back=False)
        results[-1] += (each,)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_attention_columns():
    q, k = tokens(2, 4, 12, 8), tokens(2, 2, 12, 8, seed=1)
    keys = k.repeat_interleave(2, 1)
    scores = (q @ keys.transpose(2, 3)) * 8**-0.5
    for causal in (True, False):
        masked = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
        expected = (masked if causal else scores).softmax(-1).mean(1)[:, 9:, 2:7]
        found = attention_columns(q[:, :, 9:], k, slice(2, 7), causal=causal)
        torch.testing.assert_close(found, expected)


def test_select_diverse_against_the_reference():
    x = tokens(2, 130, 16)
    valid = tokens(2, 130, seed=1) > -0.5
    pivot = central_token(x, valid)
    assert valid.gather(1, pivot[:, None]).all()
    for objective in ("sum", "max"):
        for k in (5, 60):  # With and without the matrix of all pairs.
            found = select_diverse(x, k, objective=objective, valid=valid)
            expected = reference.select_diverse(x.double(), k, pivot, objective, valid)
            assert torch.equal(found, expected)
    same = torch.ones(1, 6, 4)
    assert select_diverse(same, 4, torch.tensor([2])).tolist() == [[2, 0, 1, 3]]
    # All pairs in bfloat16 would tie; they are compared in float32.
    half = x.bfloat16()
    assert torch.equal(
        select_diverse(half, 9, pivot), reference.select_diverse(half.double(), 9, pivot)
    )


def test_windows():
    x = tokens(2, 48, 7).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(
        window_similarity(x, (6, 8), (3, 2)), reference.window_similarity(x, (6, 8), (3, 2))
    )
    x = torch.cat([tokens(1, 1, 7), tokens(1, 36, 7)], 1)
    x[:, 1 + 0], x[:, 1 + 1], x[:, 1 + 6], x[:, 1 + 7] = (x[:, 1] * s for s in (1, 2, 3, 4))
    a = match_windows(x, (6, 6), (2, 2), 0.99)
    assert a.rep[0, :3].tolist() == [0, 8, 3] and a.size[0, :3].tolist() == [1, 4, 1]


def test_mustdrop_filters():
    attention = torch.tensor([[[0.5, 0.01, 0.001, 0.3], [0.4, 0.01, 0.2, 0.3]]])
    assert select_attention(attention, 0.05, 0.05).tolist() == [[True, False, True, True]]
    protect = torch.tensor([[1]])
    assert select_attention(attention, 0.05, 0.05, protect).all()
    assert key_tokens(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.3).tolist() == [[1, 3]]
    kept = [torch.tensor([0, 2, 3, 5]), torch.tensor([1, 2]), torch.tensor([1])]
    assert [k.tolist() for k in final_kept(kept)] == [[3], [2], [1]]


def siglip_layer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Module()
    layer.layer_norm1, layer.layer_norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
    layer.self_attn = nn.Module()
    layer.self_attn.num_heads = 2
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(layer.self_attn, name, nn.Linear(16, 16))
    layer.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    return layer


@torch.no_grad()
def test_cacher_and_pruner():
    layer, x = siglip_layer(), tokens(4, 9, 16)
    everything = TokenCacher(layer, ratio=1.0)
    full = TokenCacher(layer, interval=1)
    everything(x[:2]), full(x[:2])
    torch.testing.assert_close(everything(x[2:]), full(x[2:]))
    # A chunk that equals the reference frame changes nothing, however few tokens are run.
    cacher = TokenCacher(layer, ratio=0.2)
    y = cacher(x[:1])
    torch.testing.assert_close(cacher(x[:1]), y)
    pruner = NoveltyPruner(tokens=9, keep=3)
    kept = pruner(x.flatten(0, 1))
    assert kept.shape == (4, 3) and torch.equal(kept // 9, torch.arange(4)[:, None].expand(-1, 3))
    still = torch.ones(18, 16)
    still[4], still[9 + 7] = -1, -1  # One token of each frame is unlike the others.
    novel = NoveltyPruner(tokens=9, keep=1)(still)
    assert novel.tolist() == [[4], [16]]


@pytest.mark.parametrize("causal", [False, True])
def test_token_sparse_attention(causal):
    q, k, v = tokens(2, 4, 50, 8), tokens(2, 2, 50, 8, seed=1), tokens(2, 2, 50, 8, seed=2)
    q[1] *= 4  # Sharper attention: the samples keep different numbers of tokens.
    index = select_tokens(q, k, window=6, pool_kernel=3, min_tokens=10, coverage=0.3)
    assert (index < 0).any() and (index >= 44).sum() == 2 * 4 * 6
    results = []
    for function in (attention_token_sparse, reference.attention_token_sparse):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = function(*leaves, index, causal=causal)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert select_tokens(q, k, window=6, min_tokens=44, coverage=0.3) is None
    dense = attention_token_sparse(q, k, v, None, causal=causal)
    every = torch.arange(50).expand(2, 4, -1)
    torch.testing.assert_close(dense, attention_token_sparse(q, k, v, every, causal=causal))


def test_token_scores_and_coverage():
    q, k = tokens(1, 2, 20, 8), tokens(1, 2, 20, 8, seed=1)
    scores = (q @ k.transpose(2, 3)) * 8**-0.5
    scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1)[:, :, 15:, :15].mean(2)
    torch.testing.assert_close(token_scores(q, k, 5), expected)
    flat = torch.tensor([[[0.4, 0.1, 0.3, 0.2]], [[0.7, 0.1, 0.1, 0.1]]])
    assert coverage_count(flat, 0.35).tolist() == [3, 4]
    assert coverage_count(flat, 0.05).tolist() == [0, 0]


def test_schedules():
    assert merge_schedule(8, 3) == [8, 8, 8]
    assert merge_schedule((8, -1.0), 5) == [16, 12, 8, 4, 0]
    assert merge_schedule([3, 2], 4) == [3, 2, 0, 0]
    assert merge_schedule((5, 0.0), 1) == [5]


def flow_inputs():
    decoder = tiny_tokenizer().decoder
    condition = decoder.condition(tokens(2, 6, 3, seed=1))
    return decoder, (tokens(2, 4, 16, 16), torch.tensor([0.3, 0.9]), *condition)


@torch.no_grad()
def test_apply_to_a_flow_decoder_and_remove():
    decoder, inputs = flow_inputs()
    before = decoder(*inputs)
    state = set(decoder.state_dict())
    for method in ("tome_sd", "pitome"):
        merging = apply_token_merging(decoder, method, 0.5, merge_mlp=True, min_tokens=0)
        assert merging.blocks == 1 and merging.merged == 0
        merged = decoder(*inputs)
        assert merging.merged == 1 and not torch.equal(merged, before)
        assert torch.isfinite(merged).all() and merged.shape == before.shape
    assert set(decoder.state_dict()) == state
    remove_token_merging(decoder)
    assert torch.equal(decoder(*inputs), before)
    assert "forward" not in vars(decoder.blocks[0].attn)
    with apply_token_merging(decoder, "tome_sd", 0.0, min_tokens=0) as merging:
        assert torch.equal(decoder(*inputs), before) and merging.merged == 0
    with apply_token_merging(decoder, "tome_sd", 0.75) as merging:  # 16 tokens: never pays.
        assert torch.equal(decoder(*inputs), before) and merging.merged == 0
    one = [x[:1] for x in inputs]
    with apply_token_merging(decoder, "dymu", 0.4, threshold=-1.0, min_tokens=0) as merging:
        decoder(*one)
        assert merging.merged == 1
    assert torch.equal(decoder(*inputs), before)


@torch.no_grad()
def test_patches_that_are_equal_merge_without_a_loss():
    decoder, (_, *rest) = flow_inputs()
    decoder.patch_embed.positions.zero_()
    flat = torch.ones(2, 4, 16, 16)
    before = decoder(flat, *rest)
    with apply_token_merging(
        decoder, "tome_sd", 0.5, merge_attn=False, merge_mlp=True, min_tokens=0
    ):
        torch.testing.assert_close(decoder(flat, *rest), before)


@torch.no_grad()
def test_apply_to_diffusers_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(BasicTransformerBlock(16, 2, 8, activation_fn="geglu") for _ in range(3))
    )
    x = tokens(2, 64, 16)
    before = model(x)
    outputs = []
    for reuse in (1, 3):
        merging = apply_token_merging(model, ratio=0.5, min_tokens=0, reuse=reuse)
        outputs.append(model(x))
        assert merging.merged == 3
    assert not torch.equal(*outputs)
    draws = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        apply_token_merging(model, ratio=0.5, min_tokens=0, generator=generator)
        draws.append(model(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    # Blocks two levels below the latents stay as they are by default.
    merging = apply_token_merging(model, ratio=0.5, min_tokens=0, hw=(16, 16))
    assert torch.equal(model(x), before) and merging.merged == 0
    merging = apply_token_merging(model, ratio=0.5, min_tokens=0, hw=(16, 16), max_downsample=2)
    assert not torch.equal(model(x), before) and merging.merged == 3
    with pytest.raises(InputError, match="hw"):
        apply_token_merging(model, min_tokens=0)
        model(tokens(2, 60, 16))
    remove_token_merging(model)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_apply_to_var_merges_the_last_scale():
    model = VAR(
        vocab_size=16, code_dim=4, patch_nums=(1, 2, 4), num_classes=3, dim=32, depth=2, heads=2
    ).eval()
    model.init_weights()
    quantizer = MultiScaleResidualVQ(16, 4, (1, 2, 4))

    def logits():
        found = []
        hook = model.head.register_forward_hook(lambda module, args, y: found.append(y))
        draws = [torch.Generator().manual_seed(0)]
        ids = model.generate(
            torch.tensor([1]), draws, quantizer, top_k=quantizer.vocab_size, top_p=1.0
        )
        hook.remove()
        return [ids, *found]

    before = logits()
    with apply_token_merging(model, "tome_sd", 0.5, merge_mlp=True, min_tokens=16) as merging:
        after = logits()
        assert merging.merged == 2  # Both blocks, at 4 x 4 tokens alone.
    assert all(torch.equal(a, b) for a, b in zip(before[1:3], after[1:3], strict=True))
    assert not torch.equal(before[3], after[3])
    assert all(torch.equal(a, b) for a, b in zip(before, logits(), strict=True))


BAD = [
    lambda m: match_bipartite(m, -1),
    lambda m: match_bipartite(m[0], 1),
    lambda m: match_bipartite(m.long(), 1),
    lambda m: match_kth(m, 1),
    lambda m: match_random(m, 36),
    lambda m: merge_schedule([1, 2, 3], 2),
    lambda m: merge_schedule((4, 1.5), 2),
    lambda m: match_grid(m, (5, 7), 3),
    lambda m: match_grid(m, (6, 6), 3, stride=(7, 1)),
    lambda m: match_grid(m, (6, 6), 3, offset=torch.zeros(2, 2, dtype=torch.int64)),
    lambda m: match_energy(m, 0.0, 0.5),
    lambda m: match_energy(m, 0.5, 0.5, variant="other"),
    lambda m: match_energy(m, 0.5, 1.0, variant="text"),
    lambda m: match_threshold(m, 0.5),
    lambda m: match_threshold(m[:1], 0.5, order="other"),
    lambda m: match_batch(m),
    lambda m: match_batch(m, r=1, valid=torch.ones(2, 5, dtype=torch.bool)),
    lambda m: match_windows(m, (6, 6), (4, 4), cls=False),
    lambda m: match_windows(m, (6, 6), (2, 2), cls=True),
    lambda m: select_attention(m[0], 0.1, 0.1),
    lambda m: select_diverse(m, 0),
    lambda m: select_diverse(m, 37),
    lambda m: select_diverse(m, 3, objective="other"),
    lambda m: merge(m[:, :5], match_bipartite(m, 3)),
    lambda m: merge(m, match_bipartite(m, 3), mode="other"),
    lambda m: unmerge(m, match_bipartite(m, 3)),
    lambda m: compact(m, torch.ones(2, 3, dtype=torch.bool)),
    lambda m: TokenCacher(siglip_layer(), ratio=0),
    lambda m: NoveltyPruner(5, 6),
    lambda m: NoveltyPruner(5, 2)(m[0]),
    lambda m: token_scores(m[:, None], m[:, None], 36),
    lambda m: select_tokens(m[:, None], m[:, None], pool_kernel=4),
    lambda m: attention_token_sparse(m[:, None], m[:, None], m[:, None], torch.zeros(2, 2, 5)),
    lambda m: apply_token_merging(tiny_tokenizer(), "other"),
    lambda m: apply_token_merging(tiny_tokenizer(), ratio=1.0),
    lambda m: apply_token_merging(tiny_tokenizer(), reuse=0),
    lambda m: apply_token_merging(BasicTransformerBlock(16, 2, 8), merge_attn=False),
    lambda m: apply_token_merging(tiny_pipeline().generator),  # FlexAR: one token at a time.
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_arguments(number):
    with pytest.raises(InputError):
        BAD[number](tokens(2, 36, 6))


def test_attention_with_a_mask_by_query_is_refused():
    model = BasicTransformerBlock(16, 2, 8)
    mask = torch.zeros(2, 16, 16)
    with (
        apply_token_merging(model, min_tokens=0),
        pytest.raises(InputError, match="differs by query"),
    ):
        model(tokens(2, 16, 16), attention_mask=mask)


def test_custom_ops_and_compile():
    metric, position = tokens(2, 40, 8), torch.arange(40)
    lists = position[::2].expand(2, -1), position[1::2].expand(2, -1)
    torch.library.opcheck(torch.ops.tessera.best_match.default, (metric, *lists, None))
    torch.library.opcheck(torch.ops.tessera.similarity_energy.default, (metric, "elu", 0.5, 1.0))

    def run(x):
        a = match_bipartite(x, 10)
        return unmerge(merge(x, a), a)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(metric), run(metric))


def test_triton_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "tessera.tests.token_reduction_triton"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "all equal"


@torch.no_grad()
def test_published_forms_of_the_benchmark():
    metric = tokens(2, 64, 16)
    pairs = [
        (bench.published_tome(metric, 20), merge(metric, match_bipartite(metric, 20))),
        (bench.published_tome_sd(metric, 8, 20), merge(metric, match_grid(metric, (8, 8), 20))),
        (
            bench.published_pitome(metric, 20, 0.5),
            merge(metric, match_energy(metric, 44 / 64, 0.5)[0]),
        ),
    ]
    for published, ours in pairs:
        torch.testing.assert_close(ours, published, atol=1e-6, rtol=1e-6)
    picks = select_diverse(metric[:1], 9, torch.tensor([0]), objective="max")[0].tolist()
    assert bench.published_diverse_loop(metric[0], 9, 0) == picks
    assert bench.published_diverse_matrix(metric[0], 9, 0) == picks


def test_benchmark_counts_memory_and_writes_tables():
    held = bench.extra_bytes(lambda: (torch.ones(250_000) * 2).sum(), "cpu")
    assert 2_000_000 <= held < 2_001_000  # The ones and the twos.
    sizes = bench.Sizes(
        batch=1, side=8, channels=16, features=(24, 8), picks=4, blocks=(64,), width=64,
        models=(16,), depth=1,
    )  # fmt: skip
    rows, blocks = bench.measure(sizes, repeats=1), bench.measure_blocks(sizes, repeats=1)
    models = bench.measure_models(sizes, repeats=1)
    machine = {
        "device": "cpu",
        "name": "a CPU",
        "threads": 1,
        "torch": "2",
        "width": 64,
        "depth": 1,
    }
    table = bench.markdown({"machine": machine, "rows": rows, "blocks": blocks, "models": models})
    assert len(rows) == 5 and len(blocks) == 4 and len(models) == 2
    for row in [*rows, *blocks, *models]:
        assert table.count(row.get("case", row.get("method"))) >= 1
    assert all(row["published_extra_mb"] > 0 for row in rows)
