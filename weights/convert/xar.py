"""Published state dicts of xAR (xAR-B.pth ...) -> `XAR`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...modalities.errors import InputError

_ANY = r"\.(weight|bias)"
# What xAR and FlowAR share.
TRANSFORMER = [
    (r"class_emb\.weight", r"class_embedding.weight"),
    (rf"z_proj{_ANY}", r"input_proj.\1"),
    (r"z_proj_ln\.weight", r"transformer.input_norm.weight"),
    (r"(encoder|decoder)_pos_embed_learned", r"transformer.\1_positions"),
    (r"(encoder|decoder)_norm\.weight", r"transformer.\1_norm.weight"),
    (rf"decoder_embed{_ANY}", r"transformer.decoder_embed.\1"),
    (rf"((?:en|de)coder_blocks\.\d+)\.attn\.(qkv|proj){_ANY}", r"transformer.\1.attn.\2.\3"),
    (rf"((?:en|de)coder_blocks\.\d+)\.mlp\.(fc1_g|fc1_x|fc2){_ANY}", r"transformer.\1.mlp.\2.\3"),
    (rf"((?:en|de)coder_blocks\.\d+)\.ada_lin\.1{_ANY}", r"transformer.\1.adaln.\2"),
]
_XAR = [
    *TRANSFORMER,
    (rf"time_embed\.mlp\.0{_ANY}", r"time.fc1.\1"),
    (rf"time_embed\.mlp\.2{_ANY}", r"time.fc2.\1"),
    (rf"pred{_ANY}", r"output.\1"),
]
# Tables that follow from the configuration.
_IGNORED = re.compile(r"mask|.+\.rope\.\w+")


def convert(
    published: Mapping[str, Tensor], rules: list[tuple[str, str]], model: str
) -> dict[str, Tensor]:
    """Rename, drop axes of length 1 of tables, and stack the two input layers of gated MLPs.

    Of a training checkpoint the averaged weights are taken.

    Raises:
        InputError: a name that no rule knows.
    """
    for wrapper in ("model_ema.", "model."):
        inside = {n: v for n, v in published.items() if n.startswith(wrapper)}
        if inside:
            published = {name.removeprefix(wrapper): value for name, value in inside.items()}
            break
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if _IGNORED.fullmatch(name):
            continue
        rule = next((rule for rule in rules if re.fullmatch(rule[0], name)), None)
        if rule is None:
            raise InputError(f'"{name}" is not a weight of a published {model}.')
        state[re.sub(*rule, name)] = value[0] if name.endswith("pos_embed_learned") else value
    for gate in [name for name in state if ".fc1_g." in name]:
        value = gate.replace(".fc1_g.", ".fc1_x.")
        if value in state:
            both = torch.cat([state.pop(gate), state.pop(value)])
            state[gate.replace(".fc1_g.", ".fc1.")] = both
    return state


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """See `convert`.

    Raises:
        InputError: a name that no published xAR has.
    """
    return convert(published, _XAR, "xAR")
