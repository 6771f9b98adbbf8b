"""Published MaskGIT generators over TiTok -> `MaskGIT` (names of bytedance/1d-tokenizer's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .titok import apply_rules

_ANY = r"\.(weight|bias)"
_LAYER = r"model\.encoder\.layer\.(\d+)\."
_BERT = [
    (r"model\.embeddings\.word_embeddings\.weight", r"embedding.weight"),
    (r"model\.embeddings\.position_embeddings\.weight", r"positions"),
    (r"model\.embeddings\.token_type_embeddings\.weight", r"types"),
    (rf"model\.embeddings\.LayerNorm{_ANY}", r"transformer.norm.\1"),
    (rf"{_LAYER}attention\.self\.(query|key|value){_ANY}", r"transformer.blocks.\1.attn.\2.\3"),
    (rf"{_LAYER}attention\.output\.dense{_ANY}", r"transformer.blocks.\1.attn.proj.\2"),
    (rf"{_LAYER}attention\.output\.LayerNorm{_ANY}", r"transformer.blocks.\1.norm1.\2"),
    (rf"{_LAYER}intermediate\.dense{_ANY}", r"transformer.blocks.\1.mlp.fc1.\2"),
    (rf"{_LAYER}output\.dense{_ANY}", r"transformer.blocks.\1.mlp.fc2.\2"),
    (rf"{_LAYER}output\.LayerNorm{_ANY}", r"transformer.blocks.\1.norm2.\2"),
    (rf"model\.lm_head{_ANY}", r"head.\1"),
]
_UVIT = [
    (r"embeddings\.weight", r"embedding.weight"),
    (r"pos_embed", r"positions"),
    (
        rf"((?:in|out)_blocks\.\d+|mid_block)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2){_ANY}",
        r"transformer.\1.\2.\3",
    ),
    (rf"out_blocks\.(\d+)\.skip_linear{_ANY}", r"transformer.skips.\1.\2"),
    (rf"norm{_ANY}", r"transformer.norm.\1"),
    (rf"lm_head{_ANY}", r"head.\1"),
]
# Position numbers 0, 1, 2, ... that old files hold.
_IGNORED = "model.embeddings.position_ids"


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; of BERT also stack q, k, v, and add the one token type in use to the positions.

    Args:
        config: arguments of `MaskGIT`.

    Raises:
        InputError: a name that no published generator with this trunk has.
    """
    if config["trunk"] == "uvit":
        state = apply_rules(published, _UVIT, "MaskGIT over TiTok")
        if "positions" in state:
            state["positions"] = state["positions"][0]
        return state
    kept = {name: value for name, value in published.items() if name != _IGNORED}
    state = apply_rules(kept, _BERT, "MaskGIT over TiTok")
    if "types" in state and "positions" in state:
        state["positions"] = state["positions"] + state.pop("types")[0]
    for name in [n for n in state if ".attn.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in state for part in parts):
            state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(n) for n in parts])
    return state
