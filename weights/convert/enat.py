"""Published ENAT state dicts -> `ENAT` (names of LeapLabTHU/ENAT's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .titok import apply_rules

_ANY = r"\.(weight|bias)"
_RULES = [
    (r"x_embedder\.word_embeddings\.weight", r"embedding.weight"),
    (r"x_embedder\.position_embeddings\.weight", r"positions"),
    (rf"x_embedder\.LayerNorm{_ANY}", r"input_norm.\1"),
    (r"y_embedder\.embedding_table\.weight", r"class_embedding.weight"),
    (rf"prev_proj\.norm{_ANY}", r"reuse_norm.\1"),
    (rf"prev_proj\.mlp\.(fc1|fc2){_ANY}", r"reuse_mlp.\1.\2"),
    (rf"blocks\.(\d+)\.attn\.(q|kv\.B){_ANY}", r"blocks.\1.\2.\3"),
    (rf"blocks\.(\d+)\.attn\.kv\.A{_ANY}", r"blocks.\1.context_kv.\2"),
    (rf"blocks\.(\d+)\.attn\.proj{_ANY}", r"blocks.\1.proj.\2"),
    (rf"blocks\.(\d+)\.mlp\.(fc1|fc2){_ANY}", r"blocks.\1.mlp.\2.\3"),
    (rf"blocks\.(\d+)\.adaLN_modulation\.1{_ANY}", r"blocks.\1.adaln.\2"),
    (rf"norm{_ANY}", r"norm.\1"),
    (rf"mlm_layer\.fc{_ANY}", r"head.\1"),
    (rf"mlm_layer\.ln{_ANY}", r"head_norm.\1"),
    (r"mlm_layer\.bias", r"head_bias"),
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, split the blocks into encoder and decoder, stack queries on the tokens' own keys.

    Left out: ``prev_embedder``, which nothing uses, and the bias of the hidden token's column.

    Args:
        config: arguments of `ENAT`.

    Raises:
        InputError: a name that no published ENAT has.
    """
    used = {n: v for n, v in published.items() if not n.startswith("prev_embedder.")}
    renamed = apply_rules(used, _RULES, "ENAT")
    if "head_bias" in renamed:
        renamed["head_bias"] = renamed["head_bias"].flatten()[: config["vocab_size"]].clone()
    for name in [name for name in renamed if ".kv.B." in name]:
        parts = [name.replace("kv.B", "q"), name]
        parts = [renamed.pop(part) for part in parts if part in renamed]
        renamed[name.replace("kv.B", "qkv")] = torch.cat(parts)
    depth = config["encoder_depth"]
    state = {}
    for name, value in renamed.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            part, shift = ("encoder", 0) if int(index) < depth else ("decoder", depth)
            name = f"{part}.{int(index) - shift}.{rest}"
        state[name] = value
    return state
