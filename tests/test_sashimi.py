"""S4: the convolution is the recurrence. SaShiMi: sampling, classes, prefixes, training."""

from __future__ import annotations

import re

import pytest
import torch

from tessera.generators.autoregressive.sashimi import SaShiMi
from tessera.generators.layers.s4 import S4, final_state, hippo_legs, long_conv, s4_kernel
from tessera.modalities.errors import InputError
from tessera.tokenizers.audio.sample_quantizer import SampleQuantizer
from tessera.weights.convert.sashimi import convert_state_dict
from tessera.weights.loading import load_published
from tessera.weights.registry import model_info


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def tiny(**options) -> SaShiMi:
    torch.manual_seed(0)
    options = {"dim": 8, "depth": 1, "pool": (2, 2), "d_state": 8, "bits": 4, **options}
    return SaShiMi(**options).eval()


@pytest.mark.parametrize("mode", ["diagonal", "dplr"])
@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_kernel_and_state_against_the_recurrence(mode, length):
    torch.manual_seed(1)
    layer = S4(3, 8, mode).double()
    dA, dB, C = layer.discretize()
    u = torch.randn(2, 3, length, dtype=torch.float64)
    s, outputs = dB.new_zeros(2, *dB.shape), []
    for t in range(length):
        s = (dA * s if mode == "diagonal" else (dA @ s[..., None])[..., 0]) + dB * u[:, :, t, None]
        outputs.append((C[0] * s).sum(-1).real)
    y = long_conv(u, s4_kernel(dA, dB, C, length))
    torch.testing.assert_close(y, torch.stack(outputs, dim=-1), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(final_state(dA, dB, u), s, atol=1e-10, rtol=1e-8)


def test_long_kernel_stays_exact_in_float32():
    torch.manual_seed(2)
    layer = S4(2, 16)
    kernel = s4_kernel(*layer.discretize(), 50000)[0]
    A = torch.complex(-layer.log_A_real.double().exp(), layer.A_imag.double())
    dt = layer.log_dt.double().exp()[:, None]
    B, C = (torch.view_as_complex(t.double()) for t in (layer.B, layer.C[0]))
    places = torch.tensor([0, 1, 777, 49999]).double()
    powers = torch.exp((dt * A)[..., None] * places)
    expected = 2 * ((C * B * (torch.exp(dt * A) - 1) / A)[..., None] * powers).sum(1).real
    torch.testing.assert_close(kernel[:, places.long()], expected, atol=1e-9, rtol=1e-7)


def test_bidirectional_kernel_reads_from_the_next_sample():
    u = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([[[1.0, 0, 0, 0, 0, 0]], [[0.0, 5, 0, 0, 0, 0]]])
    expected = u + 5 * torch.nn.functional.pad(u, (0, 2))[..., 2:]
    torch.testing.assert_close(long_conv(u, k), expected)


def test_hippo_legs_has_the_transfer_function_of_its_matrix():
    n = 4
    index = torch.arange(2 * n, dtype=torch.float64)
    b = (2 * index + 1).sqrt()
    matrix = -((b[:, None] * b).tril(-1) + torch.diag(index + 1))
    A, P, B = hippo_legs(n)
    A, P, B = (torch.cat([t, t.conj()]) for t in (A, P, B))
    mine = torch.diag(A) - P[:, None] * P.conj()
    p = (index + 0.5).sqrt()
    for z in (0.0, 1.0, 3.5):
        one = z * torch.eye(2 * n, dtype=torch.float64)
        expected = p @ torch.linalg.solve(one - matrix, b)
        got = P.conj() @ torch.linalg.solve(one - mine, B)
        torch.testing.assert_close(got.real, expected)
        assert got.imag.abs() < 1e-9
    assert torch.linalg.eigvals(mine).real.max() < 0


def test_converter_undoes_the_length_of_a_published_kernel():
    torch.manual_seed(3)
    layer = S4(4, 8, "dplr")
    dA, _, C = layer.discretize()
    length = 24
    shortened = C[0] - (C[0][:, None] @ torch.linalg.matrix_power(dA, length))[:, 0]
    n = layer.A_imag.shape[1]
    stored = torch.stack([shortened[:, :n], -shortened[:, n:]], dim=-1)[None] / 2
    prefix = "model.c_layers.0.layer."
    published = {  # as version 3 names them
        f"{prefix}kernel.kernel.log_dt": layer.log_dt,
        f"{prefix}kernel.kernel.inv_w_real": layer.log_A_real,
        f"{prefix}kernel.kernel.w_imag": layer.A_imag,
        f"{prefix}kernel.kernel.B": layer.B[None],
        f"{prefix}kernel.kernel.P": layer.P[None],
        f"{prefix}kernel.kernel.C": stored.float(),
        f"{prefix}kernel.kernel.L": torch.tensor(length),
        f"{prefix}D": layer.D[None],
        "encoder.0.weight": torch.ones(5, 3),
        "decoder.0.bias": torch.ones(5),
    }
    published = {name: value.detach() for name, value in published.items()}
    state = convert_state_dict(published, {"pool": [4, 4], "depth": 1})
    for name in ("log_dt", "log_A_real", "A_imag", "B", "P", "C", "D"):
        got = state[f"backbone.middle.0.layer.{name}"]
        torch.testing.assert_close(got, getattr(layer, name).detach(), atol=1e-4, rtol=1e-4)
    assert {"embedding.weight", "head.bias"} < set(state)
    with pytest.raises(InputError, match="q_layers"):
        convert_state_dict({"q_layers.0.linear.weight": torch.ones(1)}, {"pool": [4], "depth": 1})


def published_name(name: str) -> str:
    """A name of ours as the checkpoints of version 3 have it."""
    for pattern, replacement in (
        (r"^backbone\.", "model."),
        (r"^embedding\.", "encoder.0."),
        (r"^head\.", "decoder.0.output_transform."),
        (r"\.middle\.", ".c_layers."),
        (r"\.tiers\.(\d)\.down\.", r".d_layers.\1.linear."),
        (r"\.tiers\.(\d)\.up\.", lambda m: f".u_layers.{1 - int(m[1])}.0.linear."),
        (
            r"\.tiers\.(\d)\.layers\.(\d+)\.",
            lambda m: f".u_layers.{1 - int(m[1])}.{int(m[2]) + 1}.",
        ),
        (r"\.layer\.(log_dt|B|C|P)$", r".layer.kernel.kernel.\1"),
        (r"\.layer\.log_A_real$", ".layer.kernel.kernel.inv_w_real"),
        (r"\.layer\.A_imag$", ".layer.kernel.kernel.w_imag"),
        (r"\.layer\.output\.", ".layer.output_linear.0."),
        (r"\.layer\.fc1\.", ".layer.ff.0.0."),
        (r"\.layer\.fc2\.", ".layer.ff.2."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def test_published_files_load(tmp_path):
    info = model_info("sashimi-sc09")
    torch.manual_seed(4)
    model = SaShiMi(**info.config).eval()
    published = {}
    for name, value in model.state_dict().items():
        if name.endswith((".layer.B", ".layer.P", ".layer.D")):
            value = value[None]
        elif re.search(r"\.(up|down|fc1|fc2)\.weight$", name):
            value = value[..., None]
        published[published_name(name)] = value
    torch.save(published, tmp_path / "sashimi_sc09.pt")
    loaded = load_published(info, [tmp_path / "sashimi_sc09.pt"])
    tokens = torch.randint(256, (1, 1, 32))
    with torch.no_grad():
        assert torch.equal(loaded.logits(tokens), model.logits(tokens))


def test_converter_spreads_shared_parameters():
    published = {
        "c_layers.0.layer.layer.kernel.inv_dt": torch.zeros(6, 1),
        "c_layers.0.layer.layer.kernel.A_real": torch.arange(8.0).view(2, 4),
        "c_layers.0.layer.layer.kernel.A_imag": torch.ones(2, 4),
    }
    state = convert_state_dict(published, {"pool": [4], "depth": 1})
    assert state["middle.0.layer.log_A_real"][:, 0].tolist() == [0, 4, 0, 4, 0, 4]


@pytest.mark.parametrize("mode", ["diagonal", "dplr"])
@pytest.mark.parametrize("classes", [0, 3])
def test_steps_give_the_logits_of_the_parallel_pass(mode, classes):
    model = tiny(mode=mode, classes=list("abc")[:classes])
    labels = torch.tensor([1, 2]) if classes else None
    tokens = torch.randint(16, (2, 1, 22), generator=seeds(0)[0])
    with torch.no_grad():
        wanted = model.logits(tokens, labels)
        state, ids = model.backbone.init_state(2), torch.full((2, 1), 8)
        ids = torch.cat([ids, tokens[:, 0]], dim=1)
        embedded = model.embed(ids, labels)
        got = [model.head(model.backbone.step(embedded[:, t], state)) for t in range(22)]
    torch.testing.assert_close(torch.stack(got, dim=1), wanted, atol=2e-5, rtol=2e-5)


def test_sampling_goes_on_from_a_prefix_and_is_causal():
    model = tiny()
    whole = model.generate(seeds(5, 6), 40, temperature=0)
    assert whole.shape == (2, 1, 40) and whole.dtype == torch.int64
    for known in (3, 16, 21):
        rest = model.generate(seeds(5, 6), 40 - known, prefix=whole[..., :known], temperature=0)
        assert torch.equal(rest, whole[..., known:])
    changed = whole.clone()
    changed[..., 30] = 15 - changed[..., 30]
    with torch.no_grad():
        same = (model.logits(whole) - model.logits(changed)).abs().amax((0, 2)) < 1e-5
    assert bool(same[:31].all()) and not bool(same[31:].all())


def test_items_have_their_own_seeds_and_pieces_add_up():
    model = tiny(classes=list("abc"))
    labels = torch.tensor([0, 2])
    both = model.generate(seeds(1, 2), 20, labels=labels, guidance_scale=2.0, piece=7)
    alone = model.generate(seeds(2), 20, labels=labels[1:], guidance_scale=2.0)
    assert torch.equal(both[1:], alone)
    pieces = list(model.stream(seeds(1, 2), 20, labels=labels, guidance_scale=2.0, piece=7))
    assert [p.shape[-1] for p in pieces] == [7, 7, 6]


def test_training_lowers_the_loss_and_models_are_saved(tmp_path):
    model = tiny(dim=16).train()
    t = torch.arange(64)
    tokens = (8 + 6 * torch.sin(t * torch.tensor([[0.4], [0.9]]))).round().long()[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss, parts = model(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0] and set(parts) == {"bits_per_sample"}
    model.eval().save_pretrained(tmp_path)
    again = SaShiMi.from_pretrained(tmp_path)
    assert torch.equal(model.logits(tokens), again.logits(tokens))


def test_quantizer_rounds_to_its_levels():
    for kind in ("mu-law", "linear"):
        quantizer = SampleQuantizer(16000, 8, kind, normalize=False)
        ids = torch.arange(256)[None, None]
        audio = quantizer.decode(ids)
        assert bool((audio.diff() > 0).all()) and audio[..., 0] == -1 and audio[..., 128] == 0
        assert (quantizer.encode(audio) - ids).abs().max() <= 1
        error = (quantizer.decode(quantizer.encode(audio * 0.99)) - audio * 0.99).abs()
        # A level of mu-law is as wide as its loudness times ln(256) / 128, of linear 1 / 128.
        allowed = audio.abs() * 0.05 + 0.0005 if kind == "mu-law" else 1 / 128
        assert bool((error <= allowed).all())
    normalized = SampleQuantizer(16000).encode(torch.tensor([[[0.0, 0.1, 0.2]]]))
    assert normalized.flatten().tolist() == [0, 127, 255]


def test_settings_that_mean_nothing():
    model = tiny(classes=list("abc"))
    with pytest.raises(InputError, match="labels of 0 to 2"):
        model.generate(seeds(0), 4)
    with pytest.raises(InputError, match="no labels"):
        tiny().generate(seeds(0), 4, labels=torch.tensor([0]))
    with pytest.raises(InputError, match="guidance"):
        tiny().generate(seeds(0), 4, guidance_scale=2.0)
    with pytest.raises(InputError, match="mu-law, linear"):
        SampleQuantizer(16000, 8, "a-law")
    with pytest.raises(InputError, match="mode of S4"):
        S4(4, mode="dense")
    with pytest.raises(InputError, match="takes no steps"):
        S4(4, bidirectional=True).init_state(1)
    with pytest.raises(InputError, match="multiple of 4"):
        tiny().backbone(torch.zeros(1, 6, 8))
