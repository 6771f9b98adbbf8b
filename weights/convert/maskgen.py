"""Published MaskGen state dicts -> `MaskGenVQ`, `MaskGenKL` (names of bytedance/1d-tokenizer's checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import diffusion_head
from .titok import apply_rules

_ANY = r"\.(weight|bias)"


def _block_rules(blocks: str) -> list[tuple[str, str]]:
    stem, ours = rf"{blocks}\.(\d+)\.", r"transformer.blocks.\1."
    return [
        (rf"{stem}norm1\.linear{_ANY}", rf"{ours}adaln.\2"),
        (rf"{stem}norm1_context\.linear{_ANY}", rf"{ours}text_adaln.\2"),
        (rf"{stem}attn\.(to|add)_([qkv])(?:_proj)?{_ANY}", rf"{ours}\2_\3.\4"),
        (rf"{stem}attn\.to_out\.0{_ANY}", rf"{ours}proj.\2"),
        (rf"{stem}attn\.to_add_out{_ANY}", rf"{ours}text_proj.\2"),
        (rf"{stem}ff\.net\.0\.proj{_ANY}", rf"{ours}mlp.fc1.\2"),
        (rf"{stem}ff\.net\.2{_ANY}", rf"{ours}mlp.fc2.\2"),
        (rf"{stem}ff_context\.net\.0\.proj{_ANY}", rf"{ours}text_mlp.fc1.\2"),
        (rf"{stem}ff_context\.net\.2{_ANY}", rf"{ours}text_mlp.fc2.\2"),
    ]


_VQ = [
    (r"pos_embed", r"positions"),
    (r"embeddings\.weight", r"embedding.weight"),
    (rf"lm_head{_ANY}", r"head.\1"),
    (rf"text_embed_proj{_ANY}", r"transformer.text_proj.\1"),
    (rf"cond_pooled_proj{_ANY}", r"transformer.pooled_proj.\1"),
    (rf"norm\.linear{_ANY}", r"transformer.final_adaln.\1"),
    *_block_rules("blocks"),
]
_KL = [
    (r"decoder_pos_embed_learned", r"positions"),
    (r"diffusion_pos_embed_learned", r"head_positions"),
    (r"mask_token", r"mask_token"),
    (rf"z_proj{_ANY}", r"input_proj.\1"),
    (rf"z_proj_ln{_ANY}", r"input_norm.\1"),
    (rf"text_emb{_ANY}", r"transformer.text_proj.\1"),
    (rf"text_pooled_emb{_ANY}", r"transformer.pooled_proj.\1"),
    (rf"decoder_norm\.linear{_ANY}", r"transformer.final_adaln.\1"),
    *_block_rules("decoder_blocks"),
    *diffusion_head.RULES,
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and stack q, k, v and the modulations of the diffusion head.

    The last block's queries of the text are left out: nothing reads what they attend to.

    Args:
        config: arguments of `MaskGenVQ` or `MaskGenKL`.

    Raises:
        InputError: a name that no published MaskGen of this kind has.
    """
    continuous = "latent_dim" in config
    state = apply_rules(published, _KL if continuous else _VQ, "MaskGen")
    for name in ("positions", "head_positions", "mask_token"):
        if name in state:
            state[name] = state[name][0]
    if continuous:
        if "mask_token" in state:
            state["mask_token"] = state["mask_token"][0]
        diffusion_head.stack_modulations(state, config["head_depth"])
    elif config["weight_tying"] and "head.weight" in state:
        # One table under either name, or under both.
        state.setdefault("embedding.weight", state["head.weight"])
        del state["head.weight"]
    last = f"transformer.blocks.{config['depth'] - 1}."
    for kind in ("weight", "bias"):
        state.pop(f"{last}add_q.{kind}", None)
    for name in [n for n in state if re.search(r"\.(to|add)_v\.", n)]:
        parts = [re.sub(r"_v\.", f"_{part}.", name) for part in "qkv"]
        parts = [part for part in parts if part in state]
        new = name.replace(".to_v.", ".qkv.").replace(".add_v.", ".text_qkv.")
        state[new] = torch.cat([state.pop(part) for part in parts])
    return state
