"""Published SongGen state dicts -> `SongGen` (names of LiuZH-19/SongGen).

The frozen models that a checkpoint carries (text_encoder: flan-t5-large, mert_model, audio_encoder:
X-Codec) are left out: they are loaded from their own repositories.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...modalities.errors import InputError

_LEFT_OUT = (
    "text_encoder.",
    "mert_model.",
    "audio_encoder.",
    "decoder.model.decoder.embed_positions.",  # A table of sines.
)
_ANY = r"\.(weight|bias)"
_BLOCK = r"decoder\.model\.decoder\.layers\.(\d+)"
_LYRICS = r"lyrics_encoder\.encoders\.(\d+)"
_RULES = [
    (rf"enc_to_dec_proj{_ANY}", r"text_proj.\1"),
    (r"embed_prompts\.weight", r"lyrics_embedding.weight"),
    (rf"lyrics_to_dec_proj{_ANY}", r"lyrics_proj.\1"),
    (rf"mert_layer_agg{_ANY}", r"voice_mix.\1"),
    (rf"audio_mert_to_dec_proj{_ANY}", r"voice_proj.\1"),
    (rf"lyrics_encoder\.embed\.out\.0{_ANY}", r"lyrics_encoder.input.\1"),
    (rf"lyrics_encoder\.embed\.out\.1{_ANY}", r"lyrics_encoder.input_norm.\1"),
    (rf"lyrics_encoder\.after_norm{_ANY}", r"lyrics_encoder.norm.\1"),
    (rf"{_LYRICS}\.norm_mha{_ANY}", r"lyrics_encoder.blocks.\1.norm1.\2"),
    (rf"{_LYRICS}\.norm_ff{_ANY}", r"lyrics_encoder.blocks.\1.norm2.\2"),
    (rf"{_LYRICS}\.feed_forward\.w_([12]){_ANY}", r"lyrics_encoder.blocks.\1.fc\2.\3"),
    (rf"{_LYRICS}\.self_attn\.linear_([qkv]){_ANY}", r"lyrics_encoder.blocks.\1.attn.qkv.\3#\2"),
    (rf"{_LYRICS}\.self_attn\.linear_out{_ANY}", r"lyrics_encoder.blocks.\1.attn.proj.\2"),
    (
        rf"{_LYRICS}\.self_attn\.linear_pos\.weight",
        r"lyrics_encoder.blocks.\1.attn.position.weight",
    ),
    (rf"{_LYRICS}\.self_attn\.pos_bias_u", r"lyrics_encoder.blocks.\1.attn.content_bias"),
    (rf"{_LYRICS}\.self_attn\.pos_bias_v", r"lyrics_encoder.blocks.\1.attn.position_bias"),
    (rf"{_BLOCK}\.self_attn\.([qkv])_proj\.weight", r"blocks.\1.qkv.weight#\2"),
    (rf"{_BLOCK}\.self_attn\.out_proj\.weight", r"blocks.\1.proj.weight"),
    (rf"{_BLOCK}\.encoder_attn\.q_proj\.weight", r"blocks.\1.cross_q.weight"),
    (rf"{_BLOCK}\.encoder_attn\.([kv])_proj\.weight", r"blocks.\1.cross_kv.weight#\2"),
    (rf"{_BLOCK}\.encoder_attn\.out_proj\.weight", r"blocks.\1.cross_proj.weight"),
    (rf"{_BLOCK}\.self_attn_layer_norm{_ANY}", r"blocks.\1.norm1.\2"),
    (rf"{_BLOCK}\.encoder_attn_layer_norm{_ANY}", r"blocks.\1.norm2.\2"),
    (rf"{_BLOCK}\.final_layer_norm{_ANY}", r"blocks.\1.norm3.\2"),
    (rf"{_BLOCK}\.fc([12])\.weight", r"blocks.\1.fc\2.weight"),
    (rf"decoder\.model\.decoder\.layer_norm{_ANY}", r"norm.\1"),
    (r"decoder\.model\.decoder\.embed_tokens\.(\d+)\.weight", r"embedding.weight#\1"),
    (r"decoder\.lm_heads\.(\d+)\.weight", r"head.weight#\1"),
    (r"decoder\.vocal_lm_heads\.(\d+)\.weight", r"vocal_head.weight#\1"),
]
_ORDER = "qkv"


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and join the projections and the tables and heads of the codebooks.

    Args:
        config: arguments of `SongGen`.

    Raises:
        InputError: a name that no published SongGen has.
    """
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in published.items():
        if name.startswith(_LEFT_OUT):
            continue
        for pattern, replacement in _RULES:
            match = re.fullmatch(pattern, name)
            if match:
                new, _, part = match.expand(replacement).partition("#")
                break
        else:
            raise InputError(f'"{name}" is not a weight of a published SongGen of this kind.')
        if part:
            place = int(part) if part.isdigit() else _ORDER.index(part)
            parts.setdefault(new, {})[place] = value
        else:
            state[new] = value
    for name, rows in parts.items():
        state[name] = torch.cat([rows[place] for place in sorted(rows)])
    if "voice_mix.weight" in state:
        state["voice_mix.weight"] = state["voice_mix.weight"][..., 0]
    return state
