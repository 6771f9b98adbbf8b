"""Published RAR state dicts -> `RAR` (names of bytedance/1d-tokenizer's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .titok import apply_rules

_ANY = r"\.(weight|bias)"
_RULES = [
    (r"cls_token", r"cls_token"),
    (r"pos_embed", r"positions"),
    (r"target_aware_pos_embed", r"target_positions"),
    (r"timesteps_embeddings", r"timesteps"),
    (r"embeddings\.weight", r"embedding.weight"),
    (rf"blocks\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2){_ANY}", r"blocks.\1.\2.\3"),
    (rf"blocks\.(\d+)\.attn\.(qkv|q_norm|k_norm|proj){_ANY}", r"blocks.\1.attn.\2.\3"),
    (rf"blocks\.(\d+)\.adaLN_modulation\.1{_ANY}", r"blocks.\1.adaln.\2"),
    (rf"adaln_before_head\.adaLN_modulation\.1{_ANY}", r"head_adaln.\1"),
    (rf"lm_head{_ANY}", r"head.\1"),
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and cut the tables of positions to the rows that a sequence reaches.

    Args:
        config: arguments of `RAR`.

    Raises:
        InputError: a name that no published RAR has.
    """
    state = apply_rules(published, _RULES, "RAR")
    end = config["num_tokens"] + 2
    for name, rows in (
        ("cls_token", slice(None)),
        ("positions", slice(end)),
        ("target_positions", slice(2, end)),
        ("timesteps", slice(end)),
    ):
        if name in state:
            state[name] = state[name][0, rows].contiguous()
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"][0]
    return state
