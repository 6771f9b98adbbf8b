"""Published TA-TiTok state dicts -> `TATiTok` (names of bytedance/1d-tokenizer's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .titok import RENAME, SINGLE_STAGE, apply_rules, model_node, shared_config

_TEXT = [
    (r"decoder\.text_guidance_proj\.(weight|bias)", r"text_proj.\1"),
    (r"decoder\.text_guidance_positional_embedding", r"text_positional_embedding"),
]
# Running usage of the codes, of use in training only.
_IGNORED = "quantize.embed_prob"


def read_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """What a published config.json states of the arguments of `TATiTok`.

    Raises:
        InputError: an unknown size, or patches of two sizes.
    """
    node = model_node(published)
    names = ("text_context_length", "text_embed_dim")
    return shared_config(published) | {name: node[name] for name in names if name in node}


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """As for TiTok, with the text's projection and positions.

    Raises:
        InputError: a name that no published TA-TiTok has.
    """
    kept = {name: value for name, value in published.items() if name != _IGNORED}
    return apply_rules(kept, RENAME + SINGLE_STAGE + _TEXT, "TA-TiTok")
