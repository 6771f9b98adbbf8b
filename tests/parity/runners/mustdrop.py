"""MustDrop: windows of the vision encoder, the filter of the prefill."""

from __future__ import annotations

import torch

from tessera.kernels.tokens.assignment import merge
from tessera.kernels.tokens.mustdrop import match_windows, select_attention


def pool(case):
    x, grid, window = case.inputs["x"], case.args["grid"], case.args["window"]
    a = match_windows(x, (grid, grid), (window, window), case.args["threshold"])
    merged, size = merge(x, a, mode="wavg")
    removed = x.shape[1] - a.rep.shape[1]
    return {"r": torch.tensor(removed // (window**2 - 1)), "merged": merged, "size": size}


def dual(case):
    args = case.args
    text, vision = (
        args["system"] + args["visual"],
        slice(args["system"], args["system"] + args["visual"]),
    )
    attention = case.inputs["attn"].mean(dim=1)[:, text:, vision]
    keep = select_attention(attention, args["global_thr"], args["individual_thr"])
    return {"keep": keep[0].nonzero().flatten()}


RUNNERS = {"pool3": pool, "pool2": pool, "*": dual}
