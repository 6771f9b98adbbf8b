"""Selective scan with all its options, its step, and the Mamba-1 block with its caches."""

from __future__ import annotations

import torch

from tessera.generators.layers.mamba import Mamba1
from tessera.kernels.selective_scan.ops import selective_scan, selective_scan_step
from tessera.weights.loading import load_strict


def scan_inputs(case):
    i = case.inputs
    inputs = {name: i[name] for name in ("u", "delta", "A", "B", "C")}
    inputs |= {name: i.get(name) for name in ("D", "z", "delta_bias")}
    if "group" in case.args:
        for name in ("B", "C"):
            inputs[name] = inputs[name][:, case.args["group"]]
    return {**inputs, "delta_softplus": case.args["delta_softplus"]}


def scan(case):
    y, state = selective_scan(**scan_inputs(case), return_final_state=True)
    return {"y": y, "last_state": state}


@torch.enable_grad()
def scan_backward(case):
    inputs = scan_inputs(case)
    leaves = {name: inputs[name].requires_grad_() for name in case.outputs}
    loss = (selective_scan(**inputs) * case.inputs["dy"]).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def state_update(case):
    inputs, time = scan_inputs(case), case.args["time"]
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name][..., time]
    state = case.inputs["state0"].clone()
    return {"y": selective_scan_step(state, **inputs), "state1": state}


def mamba1_block(case):
    config = dict(case.config["block"])
    block = Mamba1(config.pop("d_model"), **config).eval()
    load_strict(block, case.state())
    h, steps = case.inputs["h"], case.args["step_tokens"]
    prefill = h.shape[1] - steps
    y, state = block(h[:, :prefill], return_state=True)
    outputs = [y]
    for t in range(prefill, h.shape[1]):
        y, state = block.step(h[:, t : t + 1], state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), block(h), rtol=1e-4, atol=1e-5)
    return {
        "y": torch.cat(outputs, dim=1),
        "conv_state": state["conv"],
        "ssm_state": state["ssm"],
    }


RUNNERS = {
    "scan_grouped": scan,
    "scan_plain": scan,
    "scan_constant_BC": scan,
    "scan_backward": scan_backward,
    "state_update": state_update,
    "mamba1_block": mamba1_block,
}
