"""LARP's generators: teacher forcing, guided greedy decoding, sampling with given noise."""

from __future__ import annotations

import torch

from tessera.generators.autoregressive.larp_ar import LARPGenerator
from tessera.weights.convert.larp_ar import convert_state_dict, read_config
from tessera.weights.loading import load_strict


def build(case):
    model = LARPGenerator(**read_config(case.config)).eval()
    assert model.start_length == case.config["cls_token_num"]
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def condition(case, model):
    if model.config.frame_prediction:
        given = case.inputs["cond"].long()
        assert (given[:, -1] == model.vocab_size).all()
        return given[:, :-1]
    if "cond" in case.inputs:
        labels = case.inputs["cond"].long()
    else:
        labels = torch.full((len(case.inputs["tokens"]),), case.args["label"])
    return torch.where(labels < 0, model.config.num_classes, labels)


def forward(case):
    model = build(case)
    tokens = case.inputs["tokens"].long()
    return {"logits": model.logits(tokens[:, :-1], condition(case, model))}


def generate(case):
    model, args = build(case), case.args
    given = condition(case, model)
    tokens = model.generate(
        given,
        [torch.Generator() for _ in given],
        guidance_scale=max(1.0, args["cfg_scale"]),
        guided_tokens=args["cfg_interval"] + 2 if args["cfg_interval"] > -1 else None,
        temperature=args["temperature"] if args["sample"] else 0,
        top_k=args["top_k"] or None,
        top_p=args["top_p"],
        noise=case.inputs.get("noise"),
    )
    return {"tokens": tokens}


RUNNERS = {"forward": forward, "forward_uncond": forward, "*": generate}
