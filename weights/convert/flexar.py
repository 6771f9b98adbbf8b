"""Published FlexAR state dicts -> `FlexAR`, `FlexARClass` (names of EPFL-VILAB's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .titok import apply_rules

_ANY = r"\.(weight|bias)"
_PRE = r"models\.ar_image_model\.preprocessor\."
_BLOCK = r"models\.ar_image_model\.trunk\.blocks\.(\d+)\."
_RULES = [
    (r"models\.text_encoder\.mlp\.(fc1|fc2)\.weight", r"text_projection.\1.weight"),
    (rf"{_PRE}embedding\.weight", r"embedding.weight"),
    (rf"{_PRE}cls_embedding\.weight", r"class_embedding.weight"),
    (rf"{_PRE}sos_token_embed", r"start"),
    (rf"{_PRE}positional_embedding", r"positions"),
    (rf"{_BLOCK}(norm_[123]){_ANY}", r"blocks.\1.\2.\3"),
    (rf"{_BLOCK}self_attn\.(qkv|proj|q_norm|k_norm){_ANY}", r"blocks.\1.self_attn.\2.\3"),
    (rf"{_BLOCK}self_attn\.([qkv])_proj{_ANY}", r"blocks.\1.self_attn.\2.\3"),
    (rf"{_BLOCK}cross_attn\.W([qkv]){_ANY}", r"blocks.\1.cross_attn.\2.\3"),
    (rf"{_BLOCK}cross_attn\.(proj|q_norm|k_norm){_ANY}", r"blocks.\1.cross_attn.\2.\3"),
    (rf"{_BLOCK}mlp\.(fc[123]){_ANY}", r"blocks.\1.mlp.\2.\3"),
    (rf"models\.ar_image_model\.trunk\.post_trunk_norm{_ANY}", r"norm.\1"),
    (r"models\.ar_image_model\.head\.linear\.weight", r"head.weight"),
]
_STACKS = [
    ("self_attn", ("q", "k", "v"), "qkv"),
    ("cross_attn", ("k", "v"), "kv"),
    ("mlp", ("fc1", "fc3"), "fc1_fc3"),
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and stack layers that read the same input.

    Left out: the tokenizer and the text encoder, which have checkpoints of their own.

    Args:
        config: arguments of `FlexAR` or `FlexARClass`.

    Raises:
        InputError: a name that no published FlexAR has.
    """
    others = ("models.image_tokenizer.", "models.text_encoder.")
    used = {
        name: value
        for name, value in published.items()
        if not name.startswith(others) or name.startswith("models.text_encoder.mlp.")
    }
    state = apply_rules(used, _RULES, "FlexAR")
    for layer in range(config["depth"]):
        for module, parts, whole in _STACKS:
            for kind in ("weight", "bias"):
                stem = f"blocks.{layer}.{module}."
                names = [f"{stem}{part}.{kind}" for part in parts]
                if all(name in state for name in names):
                    state[f"{stem}{whole}.{kind}"] = torch.cat([state.pop(n) for n in names])
        if "num_classes" in config:
            # Without cross-attention the second norm is that of the MLP.
            for kind in ("weight", "bias"):
                name = f"blocks.{layer}.norm_2.{kind}"
                if name in state:
                    state[f"blocks.{layer}.norm_3.{kind}"] = state.pop(name)
    if "start" in state:
        state["start"] = state["start"].flatten()
    return state
