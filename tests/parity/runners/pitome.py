"""PiToMe: energies, the three variants, plain ToMe by a keep ratio, and a ViT."""

from __future__ import annotations

import math
import sys

from tessera.kernels.tokens.assignment import merge
from tessera.kernels.tokens.pitome import energy_indices, match_energy
from tessera.kernels.tokens.tome import match_bipartite
from tessera.kernels.tokens.vit import classify, encode_reduced

cases = sys.modules["tessera_parity_cases"]
tome = cases.load_module(cases.HERE / "runners" / "tome.py")


def match(case):
    x, metric, args = case.inputs["x"], case.inputs["metric"], case.args
    cls = args["class_token"]
    variant = "bsm" if args.get("use_bsm") else "split"
    variant = "text" if case.name == "text" else variant
    alpha = args.get("alpha", 1.0)
    a, energy = match_energy(
        metric, args["ratio"], args["margin"], alpha=alpha, variant=variant, cls=cls
    )
    r = metric.shape[1] - a.rep.shape[1]
    m = energy_indices(metric[:, int(cls) :], r, args["margin"], alpha, variant)
    results = {
        "energy": energy,
        "indices": m["order"],
        "a_idx": m["a"],
        "b_idx": m["b"],
        "dst_idx": m["target"],
        "unm_idx": m["stay"],
        "src_idx": m["merged"],
        "source": a.matrix(),
    }
    results |= {mode: merge(x, a, mode=mode) for mode in ("mean", "sum", "prune")}
    results["wavg"], results["size"] = merge(x, a, mode="wavg")
    return {name: results[name] for name in case.outputs}


def bsm_ratio(case):
    x, metric = case.inputs["x"], case.inputs["metric"]
    tokens = metric.shape[1]
    r = math.floor(tokens - tokens * case.args["ratio"])
    a = match_bipartite(metric, r, cls=case.args["class_token"])
    return {mode: merge(x, a, mode=mode) for mode in case.outputs}


def vit(case):
    c = case.config["vit"]
    model = tome.build_vit(c, case.state())

    def match_layer(layer, metric, valid):
        return match_energy(
            metric,
            case.args["ratio"],
            c["margins"][layer],
            variant="bsm" if c["use_bsm"][layer] else "split",
            cls=c["class_token"],
        )[0]

    tokens = encode_reduced(
        model, case.inputs["image"], match_layer, prop_attn=case.args["prop_attn"]
    )
    return {
        "logits": classify(model, tokens),
        "size": tokens.size,
        "source": tokens.assignment.matrix(),
    }


RUNNERS = {"*": match, "bsm_ratio": bsm_ratio, "vit": vit}
