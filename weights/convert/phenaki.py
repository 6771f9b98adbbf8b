"""State dicts of the open reading of Phenaki (lucidrains/phenaki-pytorch) -> `CViViT` and `Phenaki`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...modalities.errors import InputError

_RENAME = [
    (r"^(?:spatial_rel_pos_bias|continuous_pos_bias)\.net\.0\.0\.", "position_bias.net.0."),
    (r"^(?:spatial_rel_pos_bias|continuous_pos_bias)\.net\.1\.0\.", "position_bias.net.2."),
    (r"^(?:spatial_rel_pos_bias|continuous_pos_bias)\.net\.2\.", "position_bias.net.4."),
    (r"^(enc|dec)_(spatial|temporal)_transformer\.", r"\1oder_\2."),
    (r"^vq\.project_in\.", "to_codes."),
    (r"^vq\.project_out\.", "from_codes."),
    (r"^to_pixels_first_frame\.0\.", "to_pixels_first."),
    (r"^to_pixels\.0\.", "to_pixels."),
    (r"^token_emb\.weight$", "embedding.weight"),
    (r"^pos_emb\.weight$", "positions"),
    (r"^to_logits\.", "head."),
    (r"(\.|^)norm_out\.gamma$", r"\1norm.weight"),
    (r"\.layers\.(\d+)\.0\.dsconv\.", r".blocks.\1.peg.conv."),
    (r"\.layers\.(\d+)\.1\.", r".blocks.\1.attn."),
    (r"\.layers\.(\d+)\.2\.", r".blocks.\1.cross."),
    (r"\.layers\.(\d+)\.3\.0\.", r".blocks.\1.mlp.norm."),
    (r"\.layers\.(\d+)\.3\.1\.", r".blocks.\1.mlp.fc1."),
    (r"\.layers\.(\d+)\.3\.4\.", r".blocks.\1.mlp.fc2."),
    (r"norm\.gamma$", "norm.weight"),
    (r"\.to_(q|kv)\.", r".\1."),
    (r"\.to_out\.", ".proj."),
    (r"^encoder_spatial", "encoder_space"),
    (r"^encoder_temporal", "encoder_time"),
    (r"^decoder_spatial", "decoder_space"),
    (r"^decoder_temporal", "decoder_time"),
]
_PARTS = re.compile(
    r"^(position_bias\.net|encoder_(space|time)|decoder_(space|time)|to_codes|from_codes"
    r"|to_pixels(_first)?|embed(_first)?\.\d|transformer|head)\.|^embedding\.weight$|^positions$"
)
# Constant zeros, the table of bits, and what self-attention has but does not read.
_IGNORED = re.compile(r"norm(_out)?\.beta$|^vq\.mask$|\.layers\.\d+\.1\.(context_norm|null_kv)")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; null keys and values, which take turns in the published table, get an axis of their own.

    Raises:
        InputError: a name that the open reading does not have.
    """
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if _IGNORED.search(name):
            continue
        new = name
        found = re.match(r"^to_patch_emb(_first_frame)?\.([123])\.", name)
        if found:
            part = "embed_first" if found[1] else "embed"
            new = f"{part}.{int(found[2]) - 1}.{name[found.end() :]}"
        for pattern, replacement in _RENAME:
            new = re.sub(pattern, replacement, new)
        if not _PARTS.search(new):
            raise InputError(f'"{name}" is not a weight of the open reading of Phenaki.')
        if new.endswith(".null_kv"):
            value = torch.stack([value[:, 0::2], value[:, 1::2]])
        state[new] = value
    return state
