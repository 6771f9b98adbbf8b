"""Published T5 checkpoints -> `T5Encoder` (names of google-t5/t5-*, google/flan-t5-*).

Their decoders are left out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...modalities.errors import InputError

_BLOCK = r"encoder\.block\.(\d+)\.layer"
_RULES = [
    # The two are one table, of which a file holds either or both.
    (r"shared\.weight|encoder\.embed_tokens\.weight", "embedding.weight"),
    (rf"{_BLOCK}\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    (rf"{_BLOCK}\.0\.SelfAttention\.([qkv])\.weight", r"blocks.\1.qkv.weight#\2"),
    (rf"{_BLOCK}\.0\.SelfAttention\.o\.weight", r"blocks.\1.proj.weight"),
    (
        r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        "relative_bias.weight",
    ),
    (rf"{_BLOCK}\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    (rf"{_BLOCK}\.1\.DenseReluDense\.wi\.weight", r"blocks.\1.fc1.weight"),
    (rf"{_BLOCK}\.1\.DenseReluDense\.wi_([01])\.weight", r"blocks.\1.fc1.weight#\2"),
    (rf"{_BLOCK}\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.fc2.weight"),
    (r"encoder\.final_layer_norm\.weight", "norm.weight"),
]


def read_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments in a published config.json.

    Raises:
        InputError: the configuration of something else.
    """
    from ...generators.conditioning.t5 import T5Encoder

    if published.get("model_type") != "t5":
        raise InputError(f'This configuration is of "{published.get("model_type")}", not of a T5.')
    return {
        name: published[name]
        for name in inspect.signature(T5Encoder).parameters
        if name in published
    }


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and join the projections of attention and of the gated feed-forward.

    Raises:
        InputError: a name that no published T5 has.
    """
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in published.items():
        if name.startswith(("decoder.", "lm_head.")):
            continue
        for pattern, replacement in _RULES:
            match = re.fullmatch(pattern, name)
            if match:
                new, _, part = match.expand(replacement).partition("#")
                break
        else:
            raise InputError(f'"{name}" is not a weight of a published T5.')
        if part:
            parts.setdefault(new, {})[part] = value
        else:
            state[new] = value
    for name, rows in parts.items():
        state[name] = torch.cat([rows[part] for part in sorted(rows, key="qkv01".index)])
    return state
