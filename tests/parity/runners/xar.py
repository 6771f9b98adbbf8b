"""xAR: cells, parallel velocities, steps with a cache, sampling."""

from __future__ import annotations

import torch

from tessera.generators.autoregressive.xar import XAR
from tessera.weights.convert.xar import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    side = c["img_size"] // (c["vae_stride"] * c["patch_size"])
    model = XAR(
        latent_dim=c["vae_embed_dim"],
        grid_size=side,
        cell_size=side // round(c["clusters"] ** 0.5),
        num_classes=c["class_num"],
        dim=c["encoder_embed_dim"],
        encoder_depth=c["encoder_depth"],
        decoder_depth=c["decoder_depth"],
        heads=c["encoder_num_heads"],
        mlp_ratio=c["mlp_ratio"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def tokens(latent):
    return latent.flatten(2).transpose(1, 2)


def cells(case):
    return {"cells": build(case).cells(tokens(case.inputs["latent"]))}


def velocity(case):
    model, times = build(case), case.inputs["t"]
    x0 = model.cells(tokens(case.inputs["latents"]))
    (noise, *_), share = case.noise[0], times[..., None, None]
    x = (1 - share) * x0 + share * noise
    return {"velocity": model.velocity(x, times, case.inputs["labels"])}


class Run:
    """The calls of a sampling run one by one: one model and one cache, conditional rows, then null."""

    def __init__(self, case):
        self.model = build(case)
        labels = case.inputs["labels"]
        self.labels = torch.cat([labels, torch.full_like(labels, case.config["null_label"])])
        self.cache = self.model.transformer.new_cache(len(self.labels))

    def cell(self, x, cell, time):
        model = self.model
        condition = model.class_embedding(self.labels) + model.time(torch.tensor([time]))
        modulations = model.transformer.modulations(condition[:, None])
        position = cell * model.cell_tokens
        h = model.transformer(model.input_proj(x), modulations, cache=self.cache, position=position)
        return model.output(h)

    def call(self, case):
        args, x = case.args, case.inputs["x"]
        time = float(case.inputs["t"]) if "t" in case.inputs else args["time"]
        if "clean_time" in args:
            clean, x = x.chunk(2, dim=1)
            self.cell(clean, args["cell"] - 1, args["clean_time"])
        return self.cell(x, args["cell"], time)


@torch.no_grad()
def step(case):
    run = Run(case)
    for before in case.after:
        run.call(before)
    return {"v": run.call(case)}


def sample(case):
    model, labels, args = build(case), case.inputs["labels"], case.args
    draws: dict[int, list] = {}
    for draw, _, part, _ in case.noise:
        draws.setdefault(part, []).append(draw)
    latents = model.generate(
        labels,
        [torch.Generator() for _ in labels],
        num_steps=args["num_steps"],
        guidance_scale=args["cfg"],
        sampler=args["sampler"].replace("_", "-"),
        noise=[torch.stack(draws[part]) for part in sorted(draws)],
    )
    side = model.config.grid_size
    return {"latents": latents.transpose(1, 2).unflatten(2, (side, side))}


RUNNERS = {
    "cells": cells,
    "velocity": velocity,
    "step_first": step,
    "step_clean_plus_noisy": step,
    "step_cached": step,
    "sample_sde": sample,
    "sample_ode": sample,
}
