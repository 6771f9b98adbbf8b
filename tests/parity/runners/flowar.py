"""FlowAR: pyramid, features, flow head, sampling."""

from __future__ import annotations

import torch

from tessera.generators.next_scale.flowar import FlowAR
from tessera.weights.convert.flowar import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = FlowAR(
        latent_dim=c["vae_embed_dim"],
        patch_nums=c["scale"],
        num_classes=c["class_num"],
        dim=c["encoder_embed_dim"],
        encoder_depth=c["encoder_depth"],
        decoder_depth=c["decoder_depth"],
        heads=c["encoder_num_heads"],
        flow_dim=c["diffloss_w"],
        flow_depth=c["diffloss_d"],
        cross_attention=c["cross"],
        mlp_ratio=c["mlp_ratio"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def targets(case):
    model = build(case)
    pyramid = model.pyramid(case.inputs["latent"].flatten(2).transpose(1, 2))
    flat = [image.flatten(2).transpose(1, 2) for image in pyramid]
    return {"targets": torch.cat(flat, dim=1), "inputs": model.next_inputs(pyramid)}


def condition(case):
    return {"z": build(case).features(case.inputs["inputs"], case.inputs["labels"])}


def flow(case):
    x, t, z = (case.inputs[name] for name in ("x", "t", "z"))
    return {"v": build(case).velocity(x, t, z, case.args["scale_index"])}


def sample(case):
    model, labels, args = build(case), case.inputs["labels"], case.args
    latents = model.generate(
        labels,
        [torch.Generator() for _ in labels],
        num_steps=args["num_steps"],
        guidance_scale=args["cfg"],
        guidance_schedule=args["cfg_schedule"],
        guidance_high=args["guidance_high"],
        noise=[draw[None] for draw, *_ in case.noise],
    )
    side = model.config.patch_nums[-1]
    return {"latents": latents.transpose(1, 2).unflatten(2, (side, side))}


RUNNERS = {"targets": targets, "condition": condition, "flow": flow, "sample": sample}
