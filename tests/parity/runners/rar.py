"""RAR: teacher forcing in raster and permuted order, sampling with and without cache."""

from __future__ import annotations

import torch

from tessera.generators.autoregressive.rar import RAR
from tessera.generators.sampling import guide, probabilities
from tessera.generators.schedules import guidance_weight
from tessera.weights.convert.rar import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = RAR(
        vocab_size=c["codebook_size"],
        num_tokens=c["image_seq_len"],
        num_classes=c["condition_num_classes"],
        dim=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_hidden=c["intermediate_size"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def forward(case):
    model, labels = build(case), case.inputs["labels"].long()
    if case.args["drop_label"]:
        labels = torch.full_like(labels, model.config.num_classes)
    tokens, orders = case.inputs["ids"].long(), case.inputs.get("orders")
    if orders is None:
        return {"logits": model.logits(tokens, labels)}
    tokens = tokens.gather(1, orders.long())
    return {"logits": model.logits(tokens, labels, orders.long()), "labels_permuted": tokens}


def generate(case):
    model, args = build(case), case.args
    assert args["order"] == "raster"
    labels = case.inputs["labels"].long()
    # The published code writes 0 for no guidance.
    scale = args["guidance_scale"] or 1.0
    power, temperature = args["guidance_scale_pow"], args["randomize_temperature"]
    if not args["kv_cache"]:
        return {"ids": recompute(model, labels, scale, power, temperature, case)}
    ids = model.generate(
        labels,
        [torch.Generator() for _ in labels],
        guidance_scale=scale,
        guidance_power=power,
        temperature=temperature,
        noise=case.inputs["exp_noise"],
    )
    return {"ids": ids}


def recompute(model, labels, scale, power, temperature, case):
    """Sampling that runs the whole sequence at every step."""
    null = torch.full_like(labels, model.config.num_classes)
    ids = labels.new_empty(len(labels), 0)
    for step, noise in enumerate(case.inputs["exp_noise"]):
        logits = model.logits(ids, labels)[:, -1]
        weight = guidance_weight("power-cosine", scale, step / model.config.num_tokens, power)
        logits = guide(logits, model.logits(ids, null)[:, -1], weight)
        new = (probabilities(logits, temperature) / noise).argmax(-1)
        ids = torch.cat([ids, new[:, None]], dim=1)
    return ids


RUNNERS = {
    "forward_raster": forward,
    "forward_uncond": forward,
    "forward_permuted": forward,
    "generate_cfg": generate,
    "generate_nocfg": generate,
    "generate_nocache": generate,
}
