"""C-ViViT: clips and their prefixes to ids, ids to clips."""

from __future__ import annotations

import torch

from tessera.tokenizers.video.phenaki import CViViT
from tessera.weights.convert.phenaki import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = CViViT(
        patch_size=c["patch_size"],
        temporal_patch_size=c["temporal_patch_size"],
        dim=c["dim"],
        spatial_depth=c["spatial_depth"],
        temporal_depth=c["temporal_depth"],
        heads=c["heads"],
        head_dim=c["dim_head"],
        quantization=c["quantizer"],
        vocab_size=c["codebook_size"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


@torch.no_grad()
def encode(case):
    latents = (model := build(case)).encode_latents(case.inputs["video"] * 2 - 1)
    return {"latent": latents, "ids": model.quantize(latents)[1]}


@torch.no_grad()
def decode(case):
    return {"video": (build(case).decode_grid(case.inputs["ids"].long()) + 1) / 2}


@torch.no_grad()
def shorter(case):
    model, video = build(case), case.inputs["video"] * 2 - 1
    names = zip(("image_ids", "short_ids"), case.args["frames"], strict=True)
    return {name: model.quantize_video(video[:, :, :count]) for name, count in names}


RUNNERS = {"encode": encode, "decode": decode, "shorter": shorter}
