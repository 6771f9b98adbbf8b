"""Published Hi-MAR state dicts -> `HiMAR` (names of HiDream-ai/himar's checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError
from . import diffusion_head

_ANY = r"\.(weight|bias)"
_DIT = r"cond_diffloss\.net\."
_RULES = [
    (r"class_emb\.weight", r"class_embedding.weight"),
    (r"fake_latent", r"null_class"),
    (r"cond_tokens", r"pivot_placeholder"),
    (r"mask_token", r"mask_tokens"),
    (r"(encoder|decoder)_pos_embed_learned", r"\1_positions"),
    (r"diffusion_pos_embed_learned", r"output_positions"),
    (rf"z_proj{_ANY}", r"token_proj.\1"),
    (rf"z_proj_ln{_ANY}", r"input_norm.\1"),
    (rf"cond_proj{_ANY}", r"pivot_proj.\1"),
    (rf"cond_z_proj{_ANY}", r"pivot_feature_proj.\1"),
    (rf"decoder_embed{_ANY}", r"decoder_embed.\1"),
    (r"(encoder|decoder)_task_emb\.weight", r"\1.phase_embedding"),
    (rf"(encoder|decoder)_blocks_ada\.1{_ANY}", r"\1.phase_proj.\2"),
    (rf"(encoder|decoder)_norm{_ANY}", r"\1.norm.\2"),
    (r"(encoder|decoder)_blocks\.(\d+)\.adaLN_(scale|shift)", r"\1.blocks.\2.adaln_\3"),
    (
        rf"(encoder|decoder)_blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2){_ANY}",
        r"\1.blocks.\2.\3.\4",
    ),
    *diffusion_head.RULES,
    (rf"{_DIT}x_embedder\.proj{_ANY}", r"dit_head.input_proj.\1"),
    (rf"{_DIT}c_embedder\.proj{_ANY}", r"dit_head.condition_proj.\1"),
    (rf"{_DIT}t_embedder\.mlp\.0{_ANY}", r"dit_head.time_fc1.\1"),
    (rf"{_DIT}t_embedder\.mlp\.2{_ANY}", r"dit_head.time_fc2.\1"),
    (
        rf"{_DIT}blocks\.(\d+)\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2){_ANY}",
        r"dit_head.blocks.\1.\2.\3",
    ),
    (rf"{_DIT}blocks\.(\d+)\.adaLN_modulation\.1{_ANY}", r"dit_head.blocks.\1.adaln.\2"),
    (rf"{_DIT}final_layer\.adaLN_modulation\.1{_ANY}", r"dit_head.final_adaln.\1"),
    (rf"{_DIT}final_layer\.linear{_ANY}", r"dit_head.output.\1"),
]
# A table that follows from the configuration, and one that nothing reads.
_IGNORED = ("cond_diffloss.net.pos_embed", "cond_diffloss.net.c_pos_embed")
# Tables of both phases, one after the other.
_PHASES = ("mask_tokens", "encoder_positions", "decoder_positions")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, split the tables by phase; of a training checkpoint the averaged weights are taken.

    Args:
        config: arguments of `HiMAR`.

    Raises:
        InputError: a name that no published Hi-MAR has.
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
        rule = next((rule for rule in _RULES if re.fullmatch(rule[0], name)), None)
        if rule is None:
            raise InputError(f'"{name}" is not a weight of a published Hi-MAR.')
        new = re.sub(*rule, name)
        if new in _PHASES:
            value = value.view(2, -1, value.shape[-1])
        elif "adaln_s" in new:
            value = value.flatten(1)
        elif new in ("pivot_placeholder", "output_positions"):
            value = value[0]
        elif value.ndim == 4:
            value = value.flatten(1)
        state[new] = value
    diffusion_head.stack_modulations(state, config["head_depth"])
    return state
