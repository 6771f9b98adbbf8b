"""ENAT: passes with and without reuse, whole sampling runs."""

from __future__ import annotations

import torch

from tessera.generators.masked.enat import ENAT
from tessera.weights.convert.enat import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    assert c["mask_id"] == c["codebook_size"] and c["null_label"] == c["num_classes"]
    model = ENAT(
        vocab_size=c["codebook_size"],
        num_tokens=c["input_size"] ** 2,
        num_classes=c["num_classes"],
        dim=c["hidden_size"],
        encoder_depth=c["enc_dec"][0],
        decoder_depth=c["enc_dec"][1],
        heads=c["num_heads"],
        mlp_hidden=c["hidden_size"] * c["mlp_ratio"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def forward(case):
    """The earlier steps first, each reusing the features of the one before."""
    model, before, seen, kept = build(case), None, None, None
    for each in (*case.after, case):
        ids = each.inputs["ids"].long()
        labels = each.inputs["labels"].long()
        hidden = ids == model.config.vocab_size
        old = torch.zeros_like(hidden) if seen is None else seen
        new = (~hidden & ~old).nonzero()[:, 1].view(len(ids), -1)
        masked = hidden.nonzero()[:, 1].view(len(ids), -1)
        kept = new if before is None else torch.cat([kept, new], dim=1)
        before, features = model.features(ids, new, masked, model.modulations(labels), before)
        seen = ~hidden
    places = torch.cat([kept, masked], dim=1)[..., None]
    features = torch.cat([before, features], dim=1)
    features = torch.zeros_like(features).scatter(1, places.expand_as(features), features)
    results = {"logits": model.to_logits(features), "feat": features}
    return {name: results[name] for name in case.outputs}


def sample_greedy(case):
    model, args = build(case), case.args
    assert args["token_choice"] == "argmax" and args["mask_temp"] == 0
    labels = case.inputs["labels"].long()
    ids = model.generate(
        labels,
        [torch.Generator() for _ in labels],
        num_steps=args["steps"],
        guidance_scale=1 + args["cfg_scale"],
        temperature=0.0,
        mask_temperature=args["mask_temp"],
    )
    side = case.config["input_size"]
    return {"ids": ids.view(-1, side, side)}


RUNNERS = {
    "step0": forward,
    "step1": forward,
    "step2": forward,
    "full": forward,
    "sample_greedy": sample_greedy,
}
