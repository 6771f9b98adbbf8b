"""ToMe for Stable Diffusion: matching over a grid, and a patched diffusers block."""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock

from tessera.kernels.tokens.assignment import merge, unmerge
from tessera.kernels.tokens.patch import apply_token_merging
from tessera.kernels.tokens.tome_sd import grid_indices, grid_split, match_grid
from tessera.weights.loading import load_strict


def match(case):
    x, metric, offset = (case.inputs[name] for name in ("x", "metric", "offset"))
    hw, stride = (case.args["h"], case.args["w"]), (case.args["sy"], case.args["sx"])
    a = match_grid(metric, hw, case.args["r"], stride=stride, offset=offset)
    sources, targets = grid_split(hw, stride, offset)
    r = metric.shape[1] - a.rep.shape[1]
    stay, merged, target = grid_indices(metric, r, sources, targets)
    y = merge(x, a)
    return {
        "src": sources,
        "dst": targets,
        "unm_idx": stay,
        "src_idx": merged,
        "dst_idx": target,
        "merged": y,
        "unmerged": unmerge(y, a),
        "unmerged_tanh": unmerge(y.tanh(), a),
    }


def block(case):
    c, args = case.config["block"], case.args
    model = BasicTransformerBlock(
        c["dim"],
        c["num_heads"],
        c["head_dim"],
        cross_attention_dim=c["cross_attention_dim"],
        activation_fn=c["ff"],
    ).eval()
    load_strict(model, case.state())
    apply_token_merging(
        model,
        "tome_sd",
        args["ratio"],
        hw=(args["h"], args["w"]),
        stride=(args["sy"], args["sx"]),
        generator=torch.Generator().manual_seed(0) if args["use_rand"] else None,
        merge_attn=args["merge_attn"],
        merge_crossattn=args["merge_crossattn"],
        merge_mlp=args["merge_mlp"],
        max_downsample=args["max_downsample"],
        min_tokens=0,
    )
    return {"hidden": model(case.inputs["hidden"], encoder_hidden_states=case.inputs["context"])}


RUNNERS = {"*": match, "block": block, "block_all": block}
