"""Published state dicts of TokenBridge (checkpoint-last.pth) -> `TokenBridge`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError

_RENAME = [
    (r"^class_emb\.", "class_embedding."),
    (r"^fake_latent$", "null_class"),
    (r"^z_proj\.", "token_embed."),
    (r"^z_proj_ln\.", "token_norm."),
    (r"^(encoder|decoder)_pos_embed_learned$", r"\1_positions"),
    (r"^output_pos_embed$", "output_positions"),
    (r"^(encoder_norm|decoder_norm|decoder_embed|encoder_blocks|decoder_blocks)\.", r"\1."),
    (r"^mask_token$", "mask_token"),
    (r"^reconstruction_values$", "quantizer.reconstruction_values"),
    (r"^condition_proj\.", "head.condition."),
    (r"^channel_embed$", "head.positions"),
    (r"^timesteps_embeddings$", "head.timesteps"),
    (r"^token_embeddings\.", "head.embeddings."),
    (r"^channel_blocks\.(\d+)\.adaLN_modulation\.1\.", r"head.blocks.\1.adaln."),
    (r"^channel_blocks\.(\d+)\.(attn|mlp|norm1|norm2)\.", r"head.blocks.\1.\2."),
    (r"^channel_norm\.", "head.norm."),
    (r"^channel_final\.adaLN_modulation\.1\.", "head.final_adaln."),
    (r"^channel_heads\.", "head.outputs."),
]
# Tables that follow from the configuration.
_IGNORED = ("channel_mask", "boundaries")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and drop axes of length 1; of a training checkpoint the averaged weights are taken.

    Raises:
        InputError: a name that no published TokenBridge has.
    """
    for wrapper in ("model_ema.", "model."):
        inside = {n: v for n, v in published.items() if n.startswith(wrapper)}
        if inside:
            published = {name.removeprefix(wrapper): value for name, value in inside.items()}
            break
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if name in _IGNORED:
            continue
        rule = next((rule for rule in _RENAME if re.search(rule[0], name)), None)
        if rule is None:
            raise InputError(f'"{name}" is not a weight of a published TokenBridge.')
        new = re.sub(*rule, name)
        if new == "mask_token":
            value = value.flatten()
        elif new.endswith(("positions", "timesteps")):
            value = value[0]
        state[new] = value
    return state
