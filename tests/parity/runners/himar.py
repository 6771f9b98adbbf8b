"""Hi-MAR: both phases of the transformer, both heads, whole sampling runs."""

from __future__ import annotations

import torch

from tessera.generators.flow.diffusion import spaced_timesteps
from tessera.generators.masked.himar import PICTURE, PIVOTS, HiMAR
from tessera.weights.convert.himar import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    assert c["ratio"] == 4 and c["cond_dim"] == c["vae_embed_dim"]
    model = HiMAR(
        latent_dim=c["vae_embed_dim"],
        num_pivots=c["cond_scale"] ** 2,
        num_tokens=c["seq_len"],
        num_classes=c["class_num"],
        encoder_dim=c["encoder_embed_dim"],
        encoder_depth=c["encoder_depth"],
        encoder_heads=c["encoder_num_heads"],
        decoder_dim=c["decoder_embed_dim"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_num_heads"],
        mlp_ratio=c["mlp_ratio"],
        buffer_size=c["buffer_size"],
        head_dim=c["diffloss_w"],
        head_depth=c["diffloss_d"],
        dit_dim=c["gdm_w"],
        dit_depth=c["gdm_d"],
        dit_heads=c["head"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def visible_places(mask):
    """Of a mask ``[B, N]`` with equally many zeros in every row: where they are."""
    return (mask == 0).nonzero()[:, 1].view(len(mask), -1)


def respacing(case):
    total = case.args["num_train_timesteps"]
    return {f"n{n}": torch.tensor(spaced_timesteps(n, total)) for n in case.args["counts"]}


def stage1(case):
    model, inputs = build(case), case.inputs
    pivots = inputs["cond_tokens"]
    every = torch.arange(pivots.shape[1]).expand(len(pivots), -1)
    visible = visible_places(inputs["mask"][:, : pivots.shape[1]])
    classes = model.classes(inputs["labels"].long())
    z = model.pivot_features(pivots, visible, every, classes, model.modulations(PIVOTS))
    return {"z": z}


def stage2(case):
    model, inputs = build(case), case.inputs
    visible = visible_places(inputs["mask"][:, model.config.num_pivots :])
    pivots = model.pivot_feature_proj(inputs["small_z"])
    classes = model.classes(inputs["labels"].long())
    modulations = model.modulations(PICTURE)
    return {"z": model.token_features(pivots, inputs["tokens"], visible, classes, modulations)}


def mlp_head(case):
    inputs = case.inputs
    return {"out": build(case).head(inputs["x"], inputs["t"], inputs["c"])}


def dit_head(case):
    inputs = case.inputs
    x = inputs["x"].flatten(2).transpose(1, 2)
    noise = build(case).dit_head(x, inputs["t"], inputs["z"])
    return {"eps": noise.transpose(1, 2).view_as(inputs["x"])}


def sample(case):
    model, args, inputs = build(case), case.args, case.inputs
    assert args["diffusion_steps"] == len(args["timesteps"])
    first, second = args["phase1_iterations"], args["phase2_iterations"]
    noise = []
    for part in range(first + second):
        draws = torch.stack([draw for draw, _, at, _ in case.noise if at == part])
        noise.append(draws if part < first else draws.flatten(3).transpose(2, 3))
    labels = inputs["labels"].long()
    results = list(
        model.stream(
            labels,
            [torch.Generator() for _ in labels],
            pivot_steps=first,
            num_steps=second,
            pivot_guidance_scale=args["re_cfg"],
            guidance_scale=args["cfg"],
            guidance_schedule=args["cfg_schedule"],
            temperature=args["temperature"],
            pivot_diffusion_steps=args["timesteps"],
            diffusion_steps=args["timesteps"],
            orders=inputs["orders"].long(),
            noise=noise,
        )
    )
    assert len(results) == first + second
    maps = {}
    for name, tokens in (("small", results[first - 1]), ("latents", results[-1])):
        side = round(tokens.shape[1] ** 0.5)
        tokens = tokens * model.config.scale_factor
        maps[name] = tokens.transpose(1, 2).unflatten(2, (side, side))
    return maps


RUNNERS = {
    "respacing": respacing,
    "stage1": stage1,
    "stage2": stage2,
    "mlp_head": mlp_head,
    "dit_head": dit_head,
    "sample": sample,
}
