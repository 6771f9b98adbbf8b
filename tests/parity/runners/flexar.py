"""FlexAR over given text features: logits, greedy runs, branching, filters."""

from __future__ import annotations

import torch

from tessera.generators.autoregressive.decoding import branch
from tessera.generators.autoregressive.flexar import FlexAR
from tessera.generators.sampling import probabilities
from tessera.weights.convert.flexar import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    multiple = c["multiple_of"]
    hidden = -(-int(2 * 4 * c["dim"] / 3) // multiple) * multiple
    model = FlexAR(
        vocab_size=c["vocab"],
        num_tokens=c["num_tokens"],
        dim=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        mlp_hidden=hidden,
        text_dim=c["text_dim"],
        bias=c["use_bias"],
        qk_norm=c["qk_norm"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def texts(case):
    """Features and mask of the prompts, then of the null prompt and the scale of guidance."""
    features, mask = case.inputs["text_feats"], case.inputs["text_mask"].bool()
    rows = case.args["prompts"]
    result = {"text_features": features[rows], "text_mask": mask[rows]}
    if "null_row" in case.args:
        null = [case.args["null_row"]]
        result |= {"null_features": features[null], "null_mask": mask[null]}
        scale = case.args["cfg_factor"]
        result["guidance_scale"] = 1.0 if scale is None else scale
    return result


def streams(case):
    return [torch.Generator() for _ in case.args["prompts"]]


def forward(case):
    model, text = build(case), texts(case)
    return {
        "logits": model.logits(case.inputs["ids"], **text),
        "text_proj": model.text_projection(text["text_features"]),
    }


def greedy(case):
    """With the summed log-probability where it is wanted."""
    model, count = build(case), case.args["num_tokens"]
    assert not case.args["sample"]
    ids = model.generate(generators=streams(case), num_tokens=count, temperature=0, **texts(case))
    if "logprob" not in case.outputs:
        return {"ids": ids}
    decoder = model.decoder(num_tokens=count, **texts(case))
    again, log_p = branch(decoder, streams(case), count, temperature=0)
    assert torch.equal(again, ids)
    return {"ids": ids, "logprob": log_p[:, None]}


def branching(case):
    model, args, prefix = build(case), case.args, case.inputs["prefix"]
    assert not args["sample"]
    count = prefix.shape[1] + args["new_tokens"]
    decoder = model.decoder(num_tokens=count, **texts(case))
    ids, log_p = branch(
        decoder, streams(case), count, args["num_samples"], prefix=prefix, temperature=0
    )
    return {"ids": ids, "logprob": log_p[:, None]}


def filtered(case):
    args = case.args
    logits = case.inputs["logits"][:, -1]
    return {
        "probs": probabilities(
            logits, args["temperature"], args["top_k"] or None, args["top_p"] or 1.0
        )
    }


RUNNERS = {
    "forward": forward,
    "greedy_cfg3": greedy,
    "greedy_nocfg": greedy,
    "branch4": branching,
    "filter_topk": filtered,
    "filter_topp": filtered,
}
