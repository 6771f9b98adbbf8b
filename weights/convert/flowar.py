"""Published state dicts of FlowAR (FlowAR-S.pth ...) -> `FlowAR`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .xar import TRANSFORMER, convert

_ANY = r"\.(weight|bias)"
_BLOCK, _OURS = r"flownet\.res_blocks\.(\d+)\.", r"head.blocks.\1."
_FLOWAR = [
    *TRANSFORMER,
    (r"diffusion_pos_embed_learned", r"output_positions"),
    (rf"flownet\.time_embed\.mlp\.0{_ANY}", r"head.time.fc1.\1"),
    (rf"flownet\.time_embed\.mlp\.2{_ANY}", r"head.time.fc2.\1"),
    (rf"flownet\.cond_embed{_ANY}", r"head.condition_proj.\1"),
    (rf"flownet\.input_proj{_ANY}", r"head.input_proj.\1"),
    (rf"{_BLOCK}attn\.(qkv\.weight|proj\.weight|proj\.bias)", rf"{_OURS}attn.\2"),
    (rf"{_BLOCK}mlp\.(fc1_g|fc1_x|fc2){_ANY}", rf"{_OURS}mlp.\2.\3"),
    (rf"{_BLOCK}ada_lin_attn{_ANY}", rf"{_OURS}attn_adaln.\2"),
    (rf"{_BLOCK}ada_lin(?:_mlp)?{_ANY}", rf"{_OURS}adaln.\2"),
    (rf"{_BLOCK}crossattn\.(q\.weight|kv\.weight|proj\.weight|proj\.bias)", rf"{_OURS}\2"),
    (rf"{_BLOCK}norm2_1\.weight", rf"{_OURS}cross_norm.weight"),
    (rf"{_BLOCK}norm2_2\.weight", rf"{_OURS}condition_norm.weight"),
    (rf"flownet\.final_layer\.linear{_ANY}", r"head.output.\1"),
    (rf"flownet\.final_layer\.adaLN_modulation\.1{_ANY}", r"head.final_adaln.\1"),
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """See `weights.convert.xar.convert`.

    Raises:
        InputError: a name that no published FlowAR has.
    """
    return convert(published, _FLOWAR, "FlowAR")
