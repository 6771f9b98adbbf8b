"""Token mixers behind one interface, and the language models over them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tessera.generators.autoregressive.mamba import MambaLM
from tessera.generators.layers.attention_mixer import WindowAttention, grid_angles, windows_of
from tessera.generators.layers.hydra import Hydra
from tessera.generators.layers.lact import LaCT, orthogonalise
from tessera.generators.layers.mixer import MIXERS, ORDERS, build_mixer, scan_order
from tessera.modalities.errors import InputError
from tessera.weights.convert.mamba import convert_state_dict
from tessera.weights.registry import list_models, model_info

DIM = 16
CONFIGS = {
    "attention": {"head_dim": 16},
    "window_attention": {"head_dim": 16, "window": (2, 2, 2), "shifted": True},
    "ssd": {"d_state": 4, "headdim": 8},
    "s6": {"d_state": 4},
    "hydra": {"d_state": 4, "headdim": 8},
    "mate": {
        "head_dim": 16,
        "window": (2, 2, 2),
        "d_state": 4,
        "headdim": 8,
        "review_tokens_from": 1,
        "layer": 3,
    },
    # Muon magnifies rounding in directions that a small chunk does not span.
    "lact": {"head_dim": 8, "chunk": 8, "muon": False},
}
CAUSAL = {
    "ssd": CONFIGS["ssd"],
    "s6": CONFIGS["s6"],
    "attention": {**CONFIGS["attention"], "is_causal": True},
    "lact": {"head_dim": 8, "chunk": 8},
}


def build(name, config=None):
    torch.manual_seed(0)
    mixer = build_mixer(name, DIM, **(CONFIGS[name] if config is None else config)).double()
    for parameter in mixer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return mixer


def tokens(length, batch=2, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("name", MIXERS)
def test_lengths_and_layout(name):
    """Any length from 1; the layout in memory changes nothing."""
    mixer = build(name)
    for length in (1, 2, 7, 8, 63, 64, 65, 1000):
        x = tokens(length, batch=1)
        y = mixer(x, grid=(1, 1, length))
        assert y.shape == x.shape
        assert torch.isfinite(y).all()
        other = x.transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(mixer(other, grid=(1, 1, length)), y)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients(name):
    mixer = build(name)
    x = tokens(8, batch=1).requires_grad_()
    parameters = dict(mixer.named_parameters())

    def function(x, *values):
        arguments = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(mixer, arguments, (x,), {"grid": (2, 2, 2)})

    arguments = (x, *parameters.values())
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("name", MIXERS)
def test_compiles_into_one_graph(name):
    mixer, x, grid = build(name), tokens(18, batch=1), (3, 3, 2)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, grid=grid), mixer(x, grid=grid))


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_and_states(name):
    """Whole = any two parts = step by step; a later token changes nothing before it."""
    mixer, x = build(name, CAUSAL[name]).eval(), tokens(24)
    size = mixer.granularity
    with torch.no_grad():
        whole, final = mixer(x, return_state=True)
        for cut in (size, 16):
            first, state = mixer(x[:, :cut], return_state=True)
            second, state = mixer(x[:, cut:], state=state, return_state=True)
            torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
            for key, value in final.items():
                torch.testing.assert_close(state[key], value)
        state, outputs = mixer.init_state(2), []
        for start in range(0, 24, size):
            y, state = mixer.step(x[:, start : start + size], state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
        changed = torch.cat([x[:, :16], tokens(8, seed=2)], dim=1)
        torch.testing.assert_close(mixer(changed)[:, :16], whole[:, :16])
    rows = torch.tensor([1, 1])
    picked = final.index(rows)
    assert all(torch.equal(picked[k], final[k][rows]) for k in final)
    assert final.nbytes == sum(t.nbytes for t in final.values())
    assert not any(t.requires_grad for t in final.detach().values())


@pytest.mark.parametrize("name", ["attention", "window_attention", "ssd", "s6", "hydra"])
def test_packed_documents_do_not_mix(name):
    mixer, x = build(name), tokens(24)
    bounds = [0, 1, 3, 20, 24]
    index = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(bounds))])
    index = index.expand(2, -1)
    if name == "window_attention":
        packed = mixer(x, grid=(2, 3, 4), seq_idx=index)
        changed = torch.where(index[..., None] == 2, tokens(24, seed=3), x)
        other = mixer(changed, grid=(2, 3, 4), seq_idx=index)
        torch.testing.assert_close(other[index != 2], packed[index != 2])
        return
    packed = mixer(x, seq_idx=index)
    for start, stop in pairwise(bounds):
        torch.testing.assert_close(packed[:, start:stop], mixer(x[:, start:stop]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["ssd", "s6", "hydra"])
def test_scan_orders(order, name):
    """A scan in another order is the scan of permuted tokens; every order is a permutation."""
    grid, mixer = (3, 5, 2), build(name)
    x = tokens(30)
    places = scan_order(order, grid, x.device)
    places = torch.arange(30) if places is None else places
    assert torch.equal(places.sort().values, torch.arange(30))
    cube = torch.arange(30).view(grid).permute(["thw".index(axis) for axis in order])
    assert torch.equal(places, cube.flatten())
    torch.testing.assert_close(mixer(x, grid=grid, order=order)[:, places], mixer(x[:, places]))


def test_order_needs_a_grid():
    with pytest.raises(InputError, match="grid"):
        build("ssd")(tokens(4), order="hwt")
    with pytest.raises(InputError, match='"wth"'):
        build("ssd")(tokens(4), order="wth", grid=(1, 2, 2))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(5, 6, 3), (1, 6, 3), (4, 4, 4)])
def test_windows_equal_dense_masked_attention(shifted, grid):
    mixer = WindowAttention(DIM, 16, (2, 4, 2), shifted).double()
    x = tokens(grid[0] * grid[1] * grid[2])
    window_of = torch.zeros(x.shape[1], dtype=torch.int64)
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    for axis, size, width in zip(axes, grid, (2, 4, 2), strict=True):
        width = min(width, size)
        begin = width // 2 if shifted and width < size else 0
        window_of = window_of * 100 + (axis.flatten() + width - begin) // width
    tensors = []
    for places, _, kept in windows_of(grid, (2, 4, 2), shifted, torch.device("cpu")):
        tensors.append(places.flatten() if kept is None else places.flatten()[kept])
    assert torch.equal(torch.cat(tensors).sort().values, torch.arange(x.shape[1]))

    angles = grid_angles(grid, 16, x.device)
    q, k, v = (t.transpose(1, 2) for t in mixer.project(x, angles))
    mask = window_of[:, None] == window_of
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    dense = mixer.proj(dense.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, grid=grid), dense)


def test_mate_without_review_tokens_is_hydra_plus_windows():
    mixer, x = build("mate"), tokens(24)
    mixer.review_tokens_from = 10**9
    y = mixer(x, grid=(8, 3, 1))
    parts = mixer.scan(x, grid=(8, 3, 1), order="wht") + mixer.attention(x, grid=(8, 3, 1))
    assert torch.equal(y, parts)
    mixer.review_tokens_from = 1
    assert not torch.allclose(mixer(x, grid=(8, 3, 1)), y)
    # Grids of fewer than 8 frames, pictures among them, never have any.
    assert mixer.review(x, (4, 3, 2)) == (None, None)


def test_review_tokens_average_what_is_there():
    mixer, x = build("mate"), tokens(9 * 5 * 2)
    with torch.no_grad():
        mixer.review_embed.zero_()
        review, grid = mixer.review(x, (9, 5, 2))
    assert grid == (3, 2, 1)
    cube = x.unflatten(1, (9, 5, 2))
    torch.testing.assert_close(
        review.unflatten(1, grid)[:, 2, 1, 0], cube[:, 8:, 4:].mean((1, 2, 3))
    )


def test_prefix_comes_first_in_both_directions():
    """Every token but each direction's first reads the prefix; equal to states scanned before."""
    mixer, x = Hydra(DIM, d_state=4, headdim=8).double(), tokens(6)
    plain = mixer(x)
    prefixed = mixer(x, prefix=tokens(3, seed=5))
    changed = (prefixed - plain).abs().amax(dim=(0, 2))
    assert (changed > 1e-9).all()


def test_mate_of_a_picture_ignores_the_temporal_part_of_the_window():
    x = tokens(12)
    video = build("mate", {**CONFIGS["mate"], "window": (16, 2, 2)})
    image = build("mate", {**CONFIGS["mate"], "window": (1, 2, 2)})
    torch.testing.assert_close(video(x, grid=(1, 4, 3)), image(x, grid=(1, 4, 3)))


def test_lact_updates_are_gradient_steps():
    """One update of the fast weights by automatic differentiation of ``-f(k) . v``."""
    mixer = LaCT(DIM, head_dim=8, chunk=4, muon=False).double()
    random = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 4, 8, generator=random, dtype=torch.float64)
    rates = torch.full((3, 1, 2, 4, 1), 0.3, dtype=torch.float64)
    state = mixer.init_state(1)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in state.items()}
    loss = -(mixer._read(leaves, k) * v).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for name, weight in mixer._update(state, k, v, rates).items():
        stepped = state[name] - 0.3 * gradients[name]
        torch.testing.assert_close(F.normalize(weight, dim=-1), F.normalize(stepped, dim=-1))
        torch.testing.assert_close(
            weight.norm(dim=-1), state[name].norm(dim=-1), rtol=1e-3, atol=1e-4
        )


def test_muon_brings_singular_values_near_one():
    random = torch.Generator().manual_seed(0)
    for shape in ((6, 12), (12, 6)):
        update = torch.randn(*shape, generator=random, dtype=torch.float64)
        values = torch.linalg.svdvals(orthogonalise(update))
        assert values.min() > 0.6 and values.max() < 1.4


def test_mixers_that_see_everything_take_no_steps():
    for name in ("hydra", "mate", "window_attention", "attention"):
        mixer = build(name)
        assert not mixer.causal
        with pytest.raises(InputError):
            mixer.init_state(1)
        with pytest.raises(InputError):
            mixer.step(tokens(1), None)
    with pytest.raises(InputError, match='"rnn"'):
        build_mixer("rnn", DIM)


@pytest.mark.parametrize("name", MIXERS)
def test_flops_grow_linearly_but_for_attention(name):
    mixer = build(name)
    growth = mixer.flops(40000) / mixer.flops(10000)
    assert growth > 15 if name == "attention" else growth == pytest.approx(4, rel=0.01)


def tiny_lm(**config):
    torch.manual_seed(0)
    model = MambaLM(
        dim=16, depth=2, vocab_size=11, mixer_config={"d_state": 4, "headdim": 8}, **config
    )
    model.init_weights()
    return model.eval()


def test_language_model_learns_from_packed_documents():
    model, ids = tiny_lm(mlp_hidden=16), torch.randint(0, 11, (1, 12))
    index = torch.tensor([[0] * 5 + [1] * 7])
    loss, parts = model(ids, index)
    a, b = (model(ids[:, s])[0] for s in (slice(0, 5), slice(5, 12)))
    torch.testing.assert_close(loss, (a * 4 + b * 6) / 10)
    torch.testing.assert_close(parts["nll"], loss.detach())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_language_model_round_trip_and_draws(tmp_path):
    model, prompt = tiny_lm(tie_embeddings=False), torch.randint(0, 11, (2, 4))

    def draw(model, prompt, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return model.generate(prompt, generators, 6, top_k=5)

    model.save_pretrained(tmp_path)
    again = MambaLM.from_pretrained(tmp_path)
    ids = draw(again, prompt, (3, 4))
    assert torch.equal(ids, draw(model, prompt, (3, 4)))
    assert torch.equal(ids[1:], draw(model, prompt[1:], (4,)))
    assert ids.max() < 11
    with pytest.raises(InputError, match="empty"):
        draw(model, prompt[:, :0], (0, 0))


def test_converter_refuses_other_models():
    with pytest.raises(InputError, match=r"backbone\.layers\.0\.attention"):
        convert_state_dict({"backbone.layers.0.attention.weight": torch.zeros(1)}, {})


@pytest.mark.parametrize("name", ["mamba-130m", "mamba-1.4b", "mamba2-370m", "mamba2-2.7b"])
def test_registered_models_have_the_published_size(name):
    info = model_info(name)
    with torch.device("meta"):
        model = info.model_class()(**info.config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(info.parameters, abs=1)


def test_language_models_are_listed():
    assert len(list_models("*mamba*", task="language-model")) == 11
