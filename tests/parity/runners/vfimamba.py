"""VFIMamba: its scans, features and every mode of inference."""

from __future__ import annotations

import torch

from tessera.generators.linear_video.vfimamba import VFIMamba
from tessera.weights.convert.vfimamba import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    model = VFIMamba(dim=case.config["F"], depths=case.config["depth"]).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def find_block(model, name):
    """``feature_bone.block3.blocks.0`` and what lies below it -> the block."""
    _, stage, _, index = name.split(".")[:4]
    return model.features.blocks[int(stage.removeprefix("block"))][int(index)]


def images(case):
    parts = [case.inputs[name].float() / 255 for name in ("img0", "img1")]
    frames = torch.cat(parts, dim=1)
    factor = case.args.get("enlarge", 1)
    return frames.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


@torch.no_grad()
def ss2d(case):
    return {"y": find_block(build(case), case.args["module"]).scan(case.inputs["h"])}


@torch.no_grad()
def vss_block(case):
    return {"y": find_block(build(case), case.args["module"])(case.inputs["h"])}


@torch.no_grad()
def features(case):
    maps = build(case).features(torch.cat(images(case).chunk(2, dim=1)))
    return {f"stage{i}": maps[i] for i in case.args["maps"]}


@torch.no_grad()
def forward(case):
    model, frames, args = build(case), images(case), case.args
    local = "full" if args["local"] else "none"
    scale = args.get("down_scale") or args["scale"] or 1
    if "down_scale" in args and args["local"]:
        local = "reduced"
    motion, _ = model.motion(frames, args["timestep"], scale, local)
    settings = (args["timestep"], scale, local)
    predicted = model.predict(frames, *settings)
    if args.get("tta"):
        turned = model.predict(frames.flip(2, 3), *settings).flip(2, 3)
        predicted = (predicted + turned) / 2
    return {"flow": motion.flow, "mask": motion.mask.sigmoid(), "pred": predicted}


RUNNERS = {"ss2d": ss2d, "vss_block": vss_block, "features": features, "*": forward}
