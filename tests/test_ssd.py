"""SSD: every path against the recurrence, forward and backward."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tessera.kernels.ssd.ops import scan, scan_backward, ssd, ssd_step
from tessera.kernels.ssd.reference import ssd_reference, ssd_step_reference
from tessera.modalities.errors import InputError

TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ["torch", *(["triton"] if TRITON else [])]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 2, 7, 8, 63, 64, 65, 1000)
DIRECTIONS = ("forward", "reverse", "both")


def inputs(length, direction="forward", batch=1, heads=2, head_dim=4, groups=1, state=4, seed=0):
    """Float64 arguments with every optional one."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    two = (2,) if direction == "both" else ()
    return {
        "x": draw(batch, length, heads, head_dim),
        "dt": draw(*two, batch, length, heads),
        "A": -draw(heads).exp(),
        "B": draw(*two, batch, length, groups, state),
        "C": draw(*two, batch, length, groups, state),
        "D": draw(heads),
        "z": draw(batch, length, heads, head_dim),
        "dt_bias": draw(heads),
        "initial_state": draw(*two, batch, heads, head_dim, state),
    }


def differentiate(function, tensors, options):
    """y, the final state, and gradients of a fixed function of both."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, state = function(**leaves, **options)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    loss = (y * weights).sum() + (state * state).sum() / 8
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {"y": y, "state": state, **dict(zip(leaves, gradients, strict=True))}


def check(tensors, options, backend, dtype=torch.float32, tolerance=1e-4):
    """The path equals the recurrence in float64: ``|difference| <= tolerance max(1, |reference|)``."""
    tensors = {name: t.to(DEVICE, dtype) for name, t in tensors.items()}
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = differentiate(ssd_reference, {k: t.double() for k, t in tensors.items()}, options)

    def path(**arguments):
        return ssd(**arguments, return_final_state=True, backend=backend)

    found = differentiate(path, tensors, options)
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.promote_types(dtype, torch.float32)
    for name, value in expected.items():
        difference = (found[name].detach().double() - value.detach()).abs().max()
        scale = max(1.0, float(value.detach().abs().max()))
        assert difference <= tolerance * scale, f"{name}: {difference:.2g} of {scale:.2g}"


def documents(length):
    """Indices that come back, so that equal ones are not always the same document."""
    return (torch.arange(length) // 5 % 2)[None]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reference_gradients(direction):
    tensors = inputs(3, direction, head_dim=2, state=2)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    options = {"dt_softplus": True, "direction": direction, "shift": direction == "both"}

    def function(*values):
        return ssd_reference(**dict(zip(tensors, values, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_torch(length, direction):
    tensors = inputs(length, direction, batch=2, heads=4, groups=2)
    options = {"dt_softplus": True, "direction": direction}
    check(tensors, options, "torch", torch.float64, 1e-10)


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("length", LENGTHS)
def test_triton(length):
    direction = DIRECTIONS[LENGTHS.index(length) % 3]
    check(inputs(length, direction), {"dt_softplus": True, "direction": direction}, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shift", [False, True])
def test_order_and_documents(backend, direction, shift):
    length = 70
    options = {
        "dt_softplus": True,
        "dt_limit": (0.1, 1.5),
        "direction": direction,
        "shift": shift,
        "order": torch.randperm(length, generator=torch.Generator().manual_seed(1)),
        "seq_idx": documents(length),
    }
    check(inputs(length, direction, heads=4, groups=2), options, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Slices of one projection, a transposed dt and a broadcast C are taken as they are."""
    tensors = inputs(9, batch=2)
    joint = torch.cat([tensors["x"].flatten(2), tensors["B"].flatten(2)], dim=2).float()
    x, B = joint.split([8, 4], dim=2)
    tensors = {name: t.float() for name, t in tensors.items()}
    tensors |= {
        "x": x.unflatten(2, (2, 4)),
        "B": B.unflatten(2, (1, 4)),
        "dt": tensors["dt"].transpose(1, 2).contiguous().transpose(1, 2),
        "C": tensors["C"][:, :1].expand(-1, 9, -1, -1),
    }
    tensors = {name: t.to(DEVICE) for name, t in tensors.items()}
    y = ssd(**tensors, backend=backend)
    whole = ssd(**{name: t.contiguous() for name, t in tensors.items()}, backend=backend)
    torch.testing.assert_close(y, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    check(inputs(70), {"dt_softplus": True}, backend, torch.bfloat16, 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_decays(backend, direction):
    """Steps that forget everything, that forget nothing, and that write nothing."""
    tensors = inputs(70, direction)
    tensors["dt"] = tensors["dt"].abs()
    tensors["dt"][..., ::3, :] = 0.0
    tensors["dt"][..., ::7, :] = 50.0
    tensors["A"] = torch.tensor([-1e6, -1e-6], dtype=torch.float64)
    for name in ("x", "B", "C"):
        tensors[name] /= 10
    del tensors["dt_bias"]
    check(tensors, {"direction": direction}, backend, tolerance=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_and_state_sizes(backend):
    """Head sizes above one tile and state sizes that are no power of two."""
    check(
        inputs(20, heads=1, head_dim=72, state=24), {"dt_softplus": True}, backend, tolerance=1e-4
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_documents_do_not_see_each_other(backend, direction):
    tensors = inputs(70, direction)
    for name in ("D", "z", "initial_state"):
        del tensors[name]
    tensors = {name: t.to(DEVICE, torch.float32) for name, t in tensors.items()}
    options = {"direction": direction, "shift": True, "dt_softplus": True, "backend": backend}
    index = torch.tensor([[0] * 3 + [1] * 1 + [2] * 66], device=DEVICE)
    packed = ssd(**tensors, seq_idx=index, **options)
    for start, stop in ((0, 3), (3, 4), (4, 70)):
        part = {
            name: t if name in ("A", "dt_bias") else t.narrow(t.ndim - 3, start, stop - start)
            for name, t in tensors.items()
            if name != "dt"
        }
        part["dt"] = tensors["dt"].narrow(-2, start, stop - start)
        torch.testing.assert_close(
            packed[:, start:stop], ssd(**part, **options), rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize("cut", [1, 63, 64, 69])
def test_state_is_handed_over(cut):
    tensors = inputs(70)
    whole, final = ssd(**tensors, return_final_state=True)
    timed = ("x", "dt", "B", "C", "z")
    first = {k: t[:, :cut] if k in timed else t for k, t in tensors.items()}
    second = {k: t[:, cut:] if k in timed else t for k, t in tensors.items()}
    y, second["initial_state"] = ssd(**first, return_final_state=True)
    rest, state = ssd(**second, return_final_state=True)
    torch.testing.assert_close(torch.cat([y, rest], dim=1), whole)
    torch.testing.assert_close(state, final)


def test_states_at_document_ends():
    tensors = inputs(12)
    options = {"seq_idx": torch.tensor([[0] * 5 + [1] * 7]), "dt_softplus": True}
    y, states = ssd(**tensors, cu_seqlens=[0, 5, 9, 12], return_final_state=True, **options)
    whole, final = ssd(**tensors, return_final_state=True, **options)
    torch.testing.assert_close(y, whole)
    assert states.shape == (3, 2, 4, 4)
    torch.testing.assert_close(states[-1:], final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_equal_the_whole(backend):
    tensors = {k: t.to(DEVICE, torch.float32) for k, t in inputs(5, batch=2).items()}
    options = {"dt_softplus": True, "dt_limit": (0.2, 1.0)}
    whole, final = ssd(**tensors, return_final_state=True, **options)
    state = tensors.pop("initial_state").clone()
    reference = state.clone()
    for t in range(5):
        now = {k: v[:, t] if k in ("x", "dt", "B", "C", "z") else v for k, v in tensors.items()}
        y = ssd_step(state, **now, **options, backend=backend)
        expected, reference = ssd_step_reference(reference, **now, **options)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph():
    tensors = {k: t.float().requires_grad_() for k, t in inputs(9, "both").items()}

    def function(tensors):
        return ssd(**tensors, direction="both", shift=True, dt_softplus=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(tensors)
    expected = function(tensors)
    torch.testing.assert_close(compiled, expected)
    leaves = list(tensors.values())
    for found, value in zip(
        torch.autograd.grad(compiled.sum(), leaves, allow_unused=True),
        torch.autograd.grad(expected.sum(), leaves, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(found, value)


def test_operators_are_registered_correctly():
    t = {k: v.float() for k, v in inputs(9).items()}
    arguments = [t["x"], t["dt"][None].abs(), t["A"][None], t["B"][None], t["C"][None]]
    options = (t["initial_state"][None], None, None, False, False, "torch")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [a.clone().requires_grad_() for a in arguments]
    torch.library.opcheck(scan, (*leaves, *options), test_utils=checks)
    y, final = scan(*arguments, *options)
    torch.library.opcheck(
        scan_backward, (y, final, *arguments, *options), test_utils=("test_schema", checks[2])
    )


def test_bad_arguments():
    tensors = inputs(3)
    with pytest.raises(InputError, match='"sideways"'):
        ssd(**tensors, direction="sideways")
    with pytest.raises(InputError, match="3 groups"):
        ssd(**{**tensors, "B": torch.zeros(1, 3, 3, 4), "C": torch.zeros(1, 3, 3, 4)})
    with pytest.raises(InputError, match="cu_seqlens"):
        ssd(**tensors, direction="reverse", cu_seqlens=[0, 3])
    with pytest.raises(InputError, match=r"from 0 to the length 3, got \[0, 2, 2, 3\]"):
        ssd(**tensors, cu_seqlens=[0, 2, 2, 3])
    with pytest.raises(InputError, match='"cuda"'):
        ssd(**tensors, backend="cuda")
