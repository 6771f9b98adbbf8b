"""Published VFIMamba state dicts -> `VFIMamba` (names of MCG-NJU's checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError

_RENAME = [
    (r"^feature_bone\.patch_embed(\d)\.", r"features.downs.\1."),
    (r"^feature_bone\.block(\d)\.(?:conv|blocks)\.", r"features.blocks.\1."),
    (r"^block\.", "flow_blocks."),
    (r"^local_block\.(\d)\.conv0\.", r"local_blocks.\1.down."),
    (r"^local_block\.(\d)\.convblock\.", r"local_blocks.\1.body."),
    (r"^local_block\.(\d)\.lastconv\.", r"local_blocks.\1.up."),
    (r"^unet\.down(\d)\.conv1\.", r"refinement.downs.\1.0."),
    (r"^unet\.down(\d)\.conv2\.", r"refinement.downs.\1.1."),
    (r"^unet\.up(\d)\.", r"refinement.ups.\1."),
    (r"^unet\.conv\.", "refinement.conv."),
    (r"\.skip_scale$", ".scale1"),
    (r"\.skip_scale2$", ".scale2"),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.", ".scan."),
    (r"\.conv2d\.", ".conv."),
    (r"\.x_proj_weight$", ".x_proj"),
    (r"\.dt_projs_weight$", ".dt_proj"),
    (r"\.dt_projs_bias$", ".dt_bias"),
    (r"\.A_logs$", ".A_log"),
    (r"\.Ds$", ".D"),
    (r"\.conv_blk\.cab\.", ".conv."),
    (r"\.attention\.", "."),
]
_PARTS = ("features.", "flow_blocks.", "local_blocks.", "refinement.")
# Tables of the published window code, which nothing reads.
_IGNORED = re.compile(r"attn_mask|HW")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; the scans' tables get an axis of their four directions.

    In the published files the weights' names begin with ``module.``, and what does not is left out.

    Raises:
        InputError: a name that no published VFIMamba has.
    """
    if any(name.startswith("module.") for name in published):
        published = {
            name.removeprefix("module."): value
            for name, value in published.items()
            if name.startswith("module.")
        }
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if _IGNORED.search(name):
            continue
        new = name
        for pattern, replacement in _RENAME:
            new = re.sub(pattern, replacement, new)
        if not new.startswith(_PARTS):
            raise InputError(f'"{name}" is not a weight of a published VFIMamba checkpoint.')
        if new.endswith((".scan.A_log", ".scan.D")):
            value = value.unflatten(0, (4, -1))
        state[new] = value
    return state
