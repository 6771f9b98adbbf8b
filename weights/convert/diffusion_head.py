"""MAR's diffusion head in published state dicts -> `DiffusionHead`."""

from __future__ import annotations

import torch
from torch import Tensor

_ANY = r"\.(weight|bias)"
# Names below ``diffloss.net.`` -> names below ``head.``, for `titok.apply_rules`.
RULES = [
    (rf"diffloss\.net\.time_embed\.mlp\.0{_ANY}", r"head.time_fc1.\1"),
    (rf"diffloss\.net\.time_embed\.mlp\.2{_ANY}", r"head.time_fc2.\1"),
    (rf"diffloss\.net\.cond_embed{_ANY}", r"head.condition_proj.\1"),
    (rf"diffloss\.net\.input_proj{_ANY}", r"head.input_proj.\1"),
    (rf"diffloss\.net\.res_blocks\.(\d+)\.in_ln{_ANY}", r"head.blocks.\1.norm.\2"),
    (rf"diffloss\.net\.res_blocks\.(\d+)\.mlp\.0{_ANY}", r"head.blocks.\1.fc1.\2"),
    (rf"diffloss\.net\.res_blocks\.(\d+)\.mlp\.2{_ANY}", r"head.blocks.\1.fc2.\2"),
    (rf"diffloss\.net\.res_blocks\.(\d+)\.adaLN_modulation\.1{_ANY}", r"head.adaln.\1.\2"),
    (rf"diffloss\.net\.final_layer\.adaLN_modulation\.1{_ANY}", r"head.adaln.final.\1"),
    (rf"diffloss\.net\.final_layer\.linear{_ANY}", r"head.output.\1"),
]


def stack_modulations(state: dict[str, Tensor], depth: int) -> None:
    """Join the modulations of all blocks and of the end into one layer, in place."""
    for kind in ("weight", "bias"):
        names = [f"head.adaln.{part}.{kind}" for part in (*range(depth), "final")]
        if all(name in state for name in names):
            state[f"head.adaln.{kind}"] = torch.cat([state.pop(name) for name in names])
