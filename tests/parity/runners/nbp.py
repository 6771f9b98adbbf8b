"""NBP's tokenizer: clips and pictures to ids, ids to clips, the codes of ids."""

from __future__ import annotations

import torch

from tessera.tokenizers.video.nbp import NBPTokenizer
from tessera.weights.convert.nbp import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = NBPTokenizer(
        c["image_size"], c["frames"], c["channels"], c["blocks_per_stage"], c["fsq_levels"]
    ).eval()
    assert model.quantizer.dim == c["embed_dim"]
    state = {f"module.{name}": value for name, value in case.state().items()}
    load_strict(model, convert_state_dict(state, dict(model.config)))
    return model


def encode(case):
    model, video = build(case), case.inputs["video"] * 2 - 1
    latents = model.encode_latents(video)
    codes, ids = model.quantizer(latents)
    assert torch.equal(model.encode(video), ids.flatten(1))
    return {
        "latent": latents.movedim(-1, 1),
        "quantized": codes.movedim(-1, 1),
        "indices": ids,
    }


def decode(case):
    ids = case.inputs["indices"].long().flatten(1)
    return {"video": (build(case).decode(ids) + 1) / 2}


def image(case):
    model = build(case)
    video = case.inputs["video"][:, :, : case.args["frames"]] * 2 - 1
    return {"indices": model.encode(video).unflatten(1, (-1, *model.grid[1:]))}


def fsq(case):
    args = case.args
    ids = torch.arange(args["start"], args["stop"], args["step"])
    return {"codes": build(case).quantizer.ids_to_codes(ids)}


RUNNERS = {"encode": encode, "decode": decode, "image": image, "fsq": fsq}
