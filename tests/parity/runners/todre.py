"""ToDRE: diverse selection, and the attention between text and vision."""

from __future__ import annotations

import torch

from tessera.kernels.tokens.todre import cross_modal_attention, select_diverse


def select(case):
    pivot = case.inputs["cls_attention"].flatten().argmax()[None]
    picks = select_diverse(
        case.inputs["features"][None], case.args["k"], pivot, objective=case.args["similarity"]
    )[0]
    return {"selection": picks, "kept": picks.sort().values}


def relevance(case):
    attention = case.inputs["attn"].mean(dim=0)
    text, vision = cross_modal_attention(attention, case.args["system"], case.args["visual"])
    tau = torch.tensor(case.args["tau"])
    return {
        "alpha_t2v": text,
        "alpha_v2t": vision,
        "drop": (text < tau) & (vision < tau),
    }


RUNNERS = {"*": select, "relevance": relevance}
