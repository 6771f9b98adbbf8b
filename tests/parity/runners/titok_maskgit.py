"""MaskGIT over TiTok's tokens, with either trunk: logits and whole sampling runs."""

from __future__ import annotations

import torch

from tessera.generators.masked.maskgit import MaskGIT
from tessera.weights.convert.maskgit import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = MaskGIT(
        vocab_size=c["codebook_size"],
        num_tokens=c["image_seq_len"],
        num_classes=c["condition_num_classes"],
        trunk={"ViT": "bert", "UViT": "uvit"}[c["model_type"]],
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
    return {"logits": model.logits(case.inputs["ids"].long(), labels)}


def generate(case):
    args, labels = case.args, case.inputs["labels"].long()
    schedule = args["guidance_decay"]
    # c + (c - u) g is a scale of g + 1; the published power-cosine schedule is u + (c - u) g.
    scale = args["guidance_scale"] + (schedule != "power-cosine")
    ids = build(case).generate(
        labels,
        [torch.Generator() for _ in labels],
        num_steps=args["num_sample_steps"],
        guidance_scale=scale,
        guidance_schedule=schedule,
        guidance_power=args.get("guidance_scale_pow"),
        temperature=args["randomize_temperature"],
        softmax_annealing=args["softmax_temperature_annealing"],
        noise=(case.inputs["u_token"], case.inputs["u_conf"]),
    )
    return {"ids": ids}


RUNNERS = {
    "forward": forward,
    "forward_uncond": forward,
    "generate_linear": generate,
    "generate_constant": generate,
    "generate_power_cosine": generate,
}
