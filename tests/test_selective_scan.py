"""Selective scan: every path against the recurrence, forward and backward."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tessera.kernels.selective_scan.ops import (
    scan,
    scan_backward,
    selective_scan,
    selective_scan_step,
)
from tessera.kernels.selective_scan.reference import (
    selective_scan_reference,
    selective_scan_step_reference,
)
from tessera.modalities.errors import InputError

TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ["torch", *(["triton"] if TRITON else [])]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 2, 7, 8, 63, 64, 65, 1000)
DIRECTIONS = ("forward", "reverse", "both")


def inputs(length, direction="forward", batch=1, dim=4, groups=1, state=2, seed=0):
    """Float64 arguments with every optional one."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    two = (2,) if direction == "both" else ()
    return {
        "u": draw(batch, dim, length),
        "delta": draw(*two, batch, dim, length),
        "A": -draw(dim, state).exp(),
        "B": draw(*two, batch, groups, state, length),
        "C": draw(*two, batch, groups, state, length),
        "D": draw(dim),
        "z": draw(batch, dim, length),
        "delta_bias": draw(dim),
        "initial_state": draw(*two, batch, dim, state),
    }


def differentiate(function, tensors, options):
    """y, the final state, and gradients of a fixed function of both."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, state = function(**leaves, **options)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    loss = (y * weights).sum() + (state * state).sum() / 8
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "state": state, **dict(zip(leaves, gradients, strict=True))}


def check(tensors, options, backend, dtype=torch.float32, tolerance=3e-5):
    """The path equals the recurrence in float64: ``|difference| <= tolerance max(1, |reference|)``."""
    tensors = {name: t.to(DEVICE, dtype) for name, t in tensors.items()}
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    double = {k: t.double() for k, t in tensors.items()}
    expected = differentiate(selective_scan_reference, double, options)

    def path(**arguments):
        return selective_scan(**arguments, return_final_state=True, backend=backend)

    found = differentiate(path, tensors, options)
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.promote_types(dtype, torch.float32)
    for name, value in expected.items():
        difference = (found[name].detach().double() - value.detach()).abs().max()
        scale = max(1.0, float(value.detach().abs().max()))
        assert difference <= tolerance * scale, f"{name}: {difference:.2g} of {scale:.2g}"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reference_gradients(direction):
    tensors = {name: t.requires_grad_() for name, t in inputs(3, direction).items()}

    def function(*values):
        arguments = dict(zip(tensors, values, strict=True))
        return selective_scan_reference(**arguments, delta_softplus=True, direction=direction)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_torch(length, direction):
    tensors = inputs(length, direction, batch=2, dim=6, groups=2)
    options = {"delta_softplus": True, "direction": direction}
    check(tensors, options, "torch", torch.float64, 1e-10)


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("length", LENGTHS)
def test_triton(length):
    direction = ("forward", "reverse")[LENGTHS.index(length) % 2]
    check(inputs(length, direction), {"delta_softplus": True, "direction": direction}, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_order_and_documents(backend, direction):
    length = 37
    options = {
        "delta_softplus": True,
        "direction": direction,
        "order": torch.randperm(length, generator=torch.Generator().manual_seed(1)),
        # Indices that come back: equal ones are not always the same document.
        "seq_idx": (torch.arange(length) // 5 % 2)[None],
    }
    check(inputs(length, direction, groups=2), options, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Channels-last tensors are taken as they are, and y is laid out like u."""
    tensors = {name: t.to(DEVICE, torch.float32) for name, t in inputs(9, batch=2).items()}
    last = {
        name: t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if name in ("u", "delta", "B", "C")
        else t
        for name, t in tensors.items()
    }
    y = selective_scan(**last, backend=backend)
    torch.testing.assert_close(y, selective_scan(**tensors, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    check(inputs(33), {"delta_softplus": True}, backend, torch.bfloat16, 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_decays(backend):
    """Steps that forget everything, that forget nothing, and that write nothing."""
    tensors = inputs(33)
    tensors["delta"] = tensors["delta"].abs()
    tensors["delta"][..., ::3] = 0.0
    tensors["delta"][..., ::7] = 50.0
    tensors["A"][::2] = -1e6
    tensors["A"][1::2] = -1e-6
    for name in ("u", "B", "C"):
        tensors[name] /= 10
    del tensors["delta_bias"]
    check(tensors, {}, backend, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["one group", "constant"])
def test_forms_of_B_and_C(kind):
    tensors = inputs(9, batch=2)
    for name in ("B", "C"):
        t = tensors[name]
        tensors[name] = t[:, 0] if kind == "one group" else t[0, 0, :, :4].T.contiguous()
    check(tensors, {"delta_softplus": True}, "torch", torch.float64, 1e-10)


@pytest.mark.parametrize("cut", [1, 16, 32])
def test_state_is_handed_over(cut):
    tensors = inputs(33)
    whole, final = selective_scan(**tensors, return_final_state=True)
    timed = ("u", "delta", "B", "C", "z")
    first = {k: t[..., :cut] if k in timed else t for k, t in tensors.items()}
    second = {k: t[..., cut:] if k in timed else t for k, t in tensors.items()}
    y, second["initial_state"] = selective_scan(**first, return_final_state=True)
    rest, state = selective_scan(**second, return_final_state=True)
    torch.testing.assert_close(torch.cat([y, rest], dim=2), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_equal_the_whole(backend):
    tensors = {k: t.to(DEVICE, torch.float32) for k, t in inputs(4, batch=2, groups=2).items()}
    whole, final = selective_scan(**tensors, delta_softplus=True, return_final_state=True)
    state = tensors.pop("initial_state").clone()
    reference = state.clone()
    timed = ("u", "delta", "B", "C", "z")
    for t in range(4):
        now = {k: v[..., t] if k in timed else v for k, v in tensors.items()}
        y = selective_scan_step(state, **now, delta_softplus=True, backend=backend)
        expected, reference = selective_scan_step_reference(reference, **now, delta_softplus=True)
        torch.testing.assert_close(y, whole[..., t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph():
    tensors = {k: t.float() for k, t in inputs(9, "both").items()}

    def function(tensors):
        return selective_scan(**tensors, direction="both", delta_softplus=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), function(tensors))


def test_operators_are_registered_correctly():
    t = {k: v.float() for k, v in inputs(9).items()}
    arguments = [t["u"], t["delta"][None].abs(), t["A"][None], t["B"][None], t["C"][None]]
    options = (t["initial_state"][None], None, None, False, "torch")
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
        selective_scan(**tensors, direction="sideways")
    with pytest.raises(InputError, match="3 groups"):
        selective_scan(**{**tensors, "B": torch.zeros(1, 3, 2, 3)})
