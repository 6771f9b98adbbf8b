"""Published state dicts of VAR (var_d16.pth ...) -> `VAR`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError

_RENAME = [
    (r"^pos_start$", "start"),
    (r"^pos_1LC$", "positions"),
    (r"^class_emb\.", "class_embedding."),
    (r"^lvl_embed\.", "level_embedding."),
    (r"^word_embed\.", "code_embed."),
    (r"^shared_ada_lin\.1\.", "adaln."),
    (r"^head_nm\.ada_lin\.1\.", "head_adaln."),
    (r"^head\.", "head."),
    (r"^blocks\.(\d+)\.attn\.scale_mul_1H11$", r"blocks.\1.attn.log_scale"),
    (r"^blocks\.(\d+)\.attn\.mat_qkv\.", r"blocks.\1.attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.(q_bias|v_bias|proj\.)", r"blocks.\1.attn.\2"),
    (r"^blocks\.(\d+)\.ffn\.", r"blocks.\1.mlp."),
    (r"^blocks\.(\d+)\.ada_lin\.1\.", r"blocks.\1.adaln."),
    (r"^blocks\.(\d+)\.ada_gss$", r"blocks.\1.modulation"),
]
# Tables that follow from the configuration, and zeros.
_IGNORED = re.compile(r"^lvl_1L$|^attn_bias_for_masking$|\.zero_k_bias$")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and drop axes of length 1.

    Raises:
        InputError: a name that no published VAR has.
    """
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if _IGNORED.search(name):
            continue
        rule = next((rule for rule in _RENAME if re.search(rule[0], name)), None)
        if rule is None:
            raise InputError(f'"{name}" is not a weight of a published VAR transformer.')
        new = re.sub(*rule, name)
        if new.endswith(("start", ".modulation")):
            value = value.flatten()
        elif new.endswith(("positions", ".log_scale")):
            value = value[0]
        state[new] = value
    return state
