"""ToMe: matching and merging, the variants, and a ViT."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer

from tessera.kernels.tokens.assignment import merge, unmerge
from tessera.kernels.tokens.tome import (
    bipartite_indices,
    match_bipartite,
    match_kth,
    match_random,
    merge_schedule,
)
from tessera.kernels.tokens.vit import classify, encode_reduced
from tessera.weights.loading import load_strict


def build_vit(config, state, **settings):
    """timm's ViT of a fixture's configuration; its state dicts have timm's names."""
    model = VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=config["num_classes"],
        class_token=config["class_token"],
        norm_layer=partial(torch.nn.LayerNorm, eps=config["norm_eps"]),
        qkv_bias=config.get("qkv_bias", True),
        **settings,
    ).eval()
    load_strict(model, state)
    return model


def bsm(case):
    x, metric = case.inputs["x"], case.inputs["metric"]
    flags = {"cls": case.args["class_token"], "distill": case.args["distill_token"]}
    a = match_bipartite(metric, case.args["r"], **flags)
    stay, sources, targets = bipartite_indices(metric, metric.shape[1] - a.rep.shape[1], **flags)
    results = {"unm_idx": stay, "src_idx": sources, "dst_idx": targets}
    results |= {mode: merge(x, a, mode=mode) for mode in ("mean", "sum", "amax")}
    if "unmerged_mean" in case.outputs:
        results["unmerged_mean"] = unmerge(results["mean"], a)
    if "wavg" in case.outputs:
        results["wavg"], results["size"] = merge(x, a, mode="wavg")
        b = match_bipartite(case.inputs["metric2"], case.args["r2"], **flags)
        results["wavg2"], results["size2"] = merge(
            results["wavg"], b, size=results["size"], mode="wavg"
        )
        results["source2"] = a.then(b).matrix()
    return results


def kth(case):
    x, metric, k = case.inputs["x"], case.inputs["metric"], case.args["k"]
    a = match_kth(metric, k)
    whole = len(metric[0]) - len(metric[0]) % k
    mean = merge(x, a)
    rows = a.row[:, :whole].unflatten(1, (-1, k))[..., :-1].flatten(1)
    return {"dst_idx": rows.long(), "mean": mean, "unmerged": unmerge(mean, a)[:, :whole]}


def random(case):
    x, metric, r = case.inputs["x"], case.inputs["metric"], case.args["r"]
    noise = case.inputs["noise"][..., 0]
    a = match_random(metric, r, noise=noise)
    sources = noise.argsort(dim=1)[:, :r]
    mean = merge(x, a)
    return {"dst_idx": a.row.long().gather(1, sources), "mean": mean, "unmerged": unmerge(mean, a)}


def parse_r(case):
    layers = int(case.inputs["L"])
    results = {}
    for name in case.outputs:
        r = case.args[name]
        if isinstance(r, list) and any(isinstance(value, float) for value in r):
            r = tuple(r)
        results[name] = torch.tensor(merge_schedule(r, layers))
    return results


def vit(case):
    model = build_vit(case.config["vit"], case.state())
    schedule, cls = (
        merge_schedule(case.args["r"], len(model.blocks)),
        case.config["vit"]["class_token"],
    )
    tokens = encode_reduced(
        model,
        case.inputs["image"],
        lambda layer, metric, valid: match_bipartite(metric, schedule[layer], cls=cls),
        prop_attn=case.args["prop_attn"],
    )
    return {
        "logits": classify(model, tokens),
        "size": tokens.size,
        "source": tokens.assignment.matrix(),
    }


RUNNERS = {
    "bsm": bsm,
    "bsm_cls": bsm,
    "bsm_distill": bsm,
    "bsm_clamped": bsm,
    "kth": kth,
    "random": random,
    "parse_r": parse_r,
    "vit": vit,
}
