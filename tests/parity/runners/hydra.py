"""Hydra's block, forward and backward."""

from __future__ import annotations

import math

import torch

from tessera.generators.layers.hydra import Hydra
from tessera.weights.loading import load_strict


def build(case):
    names = ("d_state", "d_conv", "expand", "headdim", "ngroups", "bias", "conv_bias")
    least, greatest = case.config["dt_limit"]
    block = Hydra(
        case.config["d_model"],
        **{name: case.config[name] for name in names},
        learnable_init_states=case.config["learnable_init_states"],
        dt_limit=(least or 0.0, math.inf if greatest is None else greatest),
    ).eval()
    load_strict(block, case.state())
    return block


def forward(case):
    return {"y": build(case)(case.inputs["u"])}


@torch.enable_grad()
def backward(case):
    block, u = build(case), case.inputs["u"].requires_grad_()
    leaves = {"u": u, **dict(block.named_parameters())}
    leaves = {name: leaves[name] for name in case.outputs}
    loss = (block(u) * case.inputs["dy"]).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


RUNNERS = {"forward": forward, "forward_len1": forward, "backward": backward}
