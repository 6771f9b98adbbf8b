"""Published state dicts of DyMU's vision towers -> `DyMUEncoder` (timm's names, thresholds stacked)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...modalities.errors import InputError

# open_clip's own vision transformer -> timm's.
_RENAME = [
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
    (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
    (r"^transformer\.resblocks\.(\d+)\.threshold$", r"blocks.\1.threshold"),
]
_KNOWN = re.compile(r"(blocks|patch_embed|norm_pre|norm|attn_pool|head)\.|(cls_token|pos_embed)$")
_WRAPPERS = ("state_dict.", "module.")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, from timm's or open_clip's names; the text tower beside a vision tower is left out.

    Raises:
        InputError: a name that no vision tower has.
    """
    names = {}
    for name, value in published.items():
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        names[name] = value
    if any(name.startswith("visual.") for name in names):
        names = {
            name.removeprefix("visual.").removeprefix("trunk."): value
            for name, value in names.items()
            if name.startswith("visual.")
        }
    state: dict[str, Tensor] = {}
    thresholds: dict[int, Tensor] = {}
    for name, value in names.items():
        new = name
        for pattern, replacement in _RENAME:
            new = re.sub(pattern, replacement, new)
        if found := re.fullmatch(r"blocks\.(\d+)\.threshold", new):
            thresholds[int(found[1])] = value.float().reshape(())
            continue
        if not _KNOWN.match(new):
            raise InputError(f'"{name}" is not a weight of a vision tower of DyMU.')
        if name == "class_embedding":
            value = value.reshape(1, 1, -1)
        elif name == "positional_embedding":
            value = value[None]
        elif name == "proj":
            value = value.T.contiguous()
            state["vit.head.bias"] = value.new_zeros(len(value))  # timm's head has one.
        state[f"vit.{new}"] = value
    if thresholds:
        state["thresholds"] = torch.stack([thresholds[i] for i in sorted(thresholds)])
    return state
