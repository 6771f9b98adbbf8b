"""Published transformers of NBP -> `NBP` (names of RenShuhuai-Andy/NBP's checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .titok import apply_rules

_ANY = r"\.(weight|bias)"
_RULES = [
    (r"tok_emb\.weight", r"embedding.weight"),
    (r"pos_emb", r"positions"),
    (rf"blocks\.(\d+)\.ln([12]){_ANY}", r"blocks.\1.norm\2.\3"),
    (rf"blocks\.(\d+)\.attn\.(query|key|value){_ANY}", r"blocks.\1.\2.\3"),
    (rf"blocks\.(\d+)\.attn\.proj{_ANY}", r"blocks.\1.proj.\2"),
    (rf"blocks\.(\d+)\.mlp\.([02]){_ANY}", r"blocks.\1.mlp.\2.\3"),
    (rf"ln_f{_ANY}", r"norm.\1"),
    (r"head\.weight", r"head.weight"),
]
# A copy of the tokenizer, tables of masks, and the state of training around the weights.
_IGNORED = re.compile(r"^first_stage_model\.|mask|^transformer\.uncond_embedding$")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and join query, key and value into ``qkv``.

    Raises:
        InputError: a name that no published transformer of NBP has.
    """
    if any(name.startswith("state_dict.") for name in published):
        published = {
            name.removeprefix("state_dict."): value
            for name, value in published.items()
            if name.startswith("state_dict.")
        }
    names = {name.removeprefix("module."): value for name, value in published.items()}
    kept = {
        name.removeprefix("transformer."): value
        for name, value in names.items()
        if not _IGNORED.search(name)
    }
    state = apply_rules(kept, _RULES, "NBP transformer")
    for name in [name for name in state if ".query." in name]:
        parts = [state.pop(name.replace(".query.", f".{w}.")) for w in ("query", "key", "value")]
        state[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    if "positions" in state:
        state["positions"] = state["positions"][0].contiguous()
    return state
