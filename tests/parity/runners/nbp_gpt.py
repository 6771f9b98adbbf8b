"""NBP: teacher forcing with its mask, greedy blocks, sampling with given noise."""

from __future__ import annotations

import torch

from tessera.generators.next_block.nbp import NBP
from tessera.weights.convert.nbp_gpt import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    assert not c["vtokens_pos"] and c["hybrid"] == (c["cond_token_num"] > 0)
    model = NBP(
        vocab_size=c["video_vocab"],
        block_size=c["token_number_per_step"],
        text_vocab_size=c["text_vocab"],
        text_length=c["cond_token_num"],
        max_positions=c["block_size"],
        dim=c["n_embd"],
        depth=c["n_layer"],
        heads=c["n_head"],
        top_k=None,
        top_p=1.0,
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def forward(case):
    model, tokens = build(case), case.inputs["z"].long()
    text = case.inputs["c"].long() if model.hybrid else None
    logits = model.logits(tokens, text)
    length = model.config.text_length + logits.shape[1]
    results = {"logits": logits, "mask": model.mask(length).to(torch.uint8)}
    return results | {"target": tokens[:, -logits.shape[1] :] + model.first_video}


def generate(case):
    model, args = build(case), case.args
    condition = case.inputs["c" if model.hybrid else "prefix"].long()
    count = args.get("num_tokens") or args["num_blocks"] * model.config.block_size
    for ids in model.stream_joint(
        condition,
        [torch.Generator() for _ in condition],
        count,
        args["temperature"] if args["sample"] else 0,
        args["top_k"] or None,
        args["top_p"],
        noise=case.inputs.get("noise"),
    ):
        raw = ids
    tokens = (raw - model.first_video).clamp(0, model.vocab_size - 1)
    return {"raw": raw, "tokens": tokens}


RUNNERS = {"forward": forward, "*": generate}
