"""MaskGen over ids: logits and whole sampling runs, text features given."""

from __future__ import annotations

import torch

from tessera.generators.masked.maskgen import MaskGenVQ
from tessera.weights.convert.maskgen import convert_state_dict
from tessera.weights.loading import load_strict

# Published name of a schedule -> ours.
SCHEDULES = {
    "none": "constant",
    "linear": "linear",
    "cosine": "power-cosine",
    "flippedcosine": "flipped-cosine",
}


def build(case):
    c = case.config
    model = MaskGenVQ(
        vocab_size=c["codebook_size"],
        num_tokens=c["num_latent_tokens"],
        dim=c["decoder_embed_dim"],
        depth=c["decoder_depth"],
        heads=c["decoder_num_heads"],
        text_dim=c["text_embed_dim"],
        micro_dim=c["micro_condition_embed_dim"] if c["micro_condition"] else 0,
        unused_ids=c["condition_num_classes"] + 1,
        weight_tying=c["weight_tying"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def forward(case):
    model, inputs = build(case), case.inputs
    score = inputs["aesthetic"]
    condition = model.transformer.condition(inputs["condition"], inputs["pooled"][:, 0], score)
    return {
        "logits": model.logits(inputs["ids"].long(), condition),
        "micro": model.transformer.embed_score(score * case.args["aesthetic_factor"] / 100),
    }


def generate(case):
    model, args, inputs = build(case), case.args, case.inputs
    ids = model.generate(
        inputs["condition"],
        inputs["pooled"][:, 0],
        [torch.Generator() for _ in inputs["condition"]],
        null_features=inputs["null_condition"],
        null_pooled=inputs["null_pooled"][:, 0],
        aesthetic_score=args["aesthetic_score"],
        num_steps=args["num_sample_steps"],
        # The published scale g is g + 1 here: c + (c - u) g.
        guidance_scale=args["guidance_scale"] + 1,
        guidance_schedule=SCHEDULES[args["guidance_decay"]],
        guidance_power=args["guidance_decay_scale_pow"],
        temperature=args["randomize_temperature"],
        softmax_annealing=args["softmax_temperature_annealing"],
        confidence_noise=args["prob_sorting"],
        noise=(inputs["u_token"], inputs["u_conf"]),
    )
    return {"ids": ids}


RUNNERS = {"forward": forward, "generate": generate}
