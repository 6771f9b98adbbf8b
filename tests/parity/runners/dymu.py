"""DyMU: thresholds for one image and for batches, virtual unmerging, two encoders."""

from __future__ import annotations

import sys

import torch

from tessera.kernels.tokens.assignment import Assignment, merge, unmerge
from tessera.kernels.tokens.dymu import (
    attention_virtual,
    match_batch,
    match_threshold,
    merge_batch,
)
from tessera.kernels.tokens.reference import virtual_scores
from tessera.kernels.tokens.tome import bipartite_indices
from tessera.kernels.tokens.vit import classify, encode_reduced

cases = sys.modules["tessera_parity_cases"]
tome = cases.load_module(cases.HERE / "runners" / "tome.py")


def single(case):
    x, metric, cls = case.inputs["x"], case.inputs["metric"], case.args["class_token"]
    a = match_threshold(metric, case.inputs["threshold"], cls=cls, order="reference")
    r = metric.shape[1] - a.rep.shape[1]
    stay, sources, targets = bipartite_indices(metric, r, cls=cls)
    y, size = merge(x, a, mode="wavg")
    return {
        "r": torch.tensor(r),
        "unm_idx": stay,
        "src_idx": sources,
        "dst_idx": targets,
        "x": y,
        "size": size,
        "pos": a.matrix().int(),
        "mapping": a.row[0].long(),
        "unmerged": unmerge(y, a),
        "repeated": y[:, a.row[0].long()],
    }


def batch(case):
    x, metric, args = case.inputs["x"], case.inputs["metric"], case.args
    cls, results = args["class_token"], {}

    def store(number, a, total, y, size, threshold):
        results.update(
            {
                f"threshold{number}": threshold,
                f"x{number}": y,
                f"size{number}": size,
                f"pad{number}": (~a.valid).float(),
                f"pos{number}": total.matrix().int(),
            }
        )

    first, threshold = match_batch(metric, r=args["r"], cls=cls)
    y, size = merge_batch(x, first)
    store(1, first, first, y, size, threshold)
    results["threshold"] = threshold
    second = case.inputs["metric2"]
    for number, settings in ((2, {"r": args["r2"]}), (3, {"threshold": args["threshold3"]})):
        a, found = match_batch(second, cls=cls, valid=first.valid, **settings)
        store(number, a, first.then(a), *merge_batch(y, a, size), found)
    capped, found = match_batch(metric, r=args["r"], cls=cls, max_r=args["max_r_per_instance4"])
    store(4, capped, capped, *merge_batch(x, capped), found)
    return {name: results[name] for name in case.outputs}


def vtu(case):
    q, k, v, mapping = (case.inputs[name] for name in ("q", "k", "v", "mapping"))
    count, dim = case.args["positions"], q.shape[-1]
    frequencies = case.args["rope_base"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(count)[:, None] * frequencies.repeat(2)
    cos, sin = angles.cos().float(), angles.sin().float()
    a = Assignment.from_mapping(mapping[None], q.shape[2])
    scale = case.args["scale"]
    results = {"scores": virtual_scores(q, k, mapping[None], cos, sin, scale)}
    for name, causal in (("causal", True), ("full", False)):
        settings = {"scale": scale, "causal": causal}
        results[f"merged_out_{name}"] = attention_virtual(q, k, v, a, cos, sin, **settings)
        results[f"out_{name}"] = attention_virtual(
            q, k, v, a, cos, sin, merge_back=False, **settings
        )
    return results


def encode(model, c, images):
    cls, one = c["class_token"], len(images) == 1

    def match(layer, metric, valid):
        threshold, r = c["thresholds"][layer], c["r_per_layer"][layer]
        if r == 0:
            return None
        if one:
            return match_threshold(metric, threshold, cls=cls, order="reference")
        return match_batch(metric, threshold=threshold, r=r, cls=cls, valid=valid)[0]

    average = {} if one else {"average": merge_batch}
    return encode_reduced(model, images, match, **average)


def vit(case):
    name = case.args["model"]
    c, image = case.config[name], case.inputs["image"]
    model = tome.build_vit(
        c,
        case.state(f"{name}."),
        global_pool=c["global_pool"],
        pre_norm=c.get("pre_norm", False),
    )
    results = {}
    for suffix, images in (("", image), ("_b1", image[:1])):
        tokens = encode(model, c, images)
        results |= {
            f"features{suffix}": model.norm(tokens.x),
            f"size{suffix}": tokens.size,
            f"pos{suffix}": tokens.assignment.matrix().int(),
            f"pad{suffix}": (~tokens.assignment.valid).float(),
            f"logits{suffix}": classify(model, tokens),
        }
    return {name: results[name] for name in case.outputs}


RUNNERS = {
    "single": single,
    "single_cls": single,
    "batch": batch,
    "batch_cls": batch,
    "vtu": vtu,
    "vit": vit,
    "vit_nocls": vit,
}
