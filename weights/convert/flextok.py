"""Published FlexTok state dicts -> `FlexTok` (names of apple/ml-flextok's checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...modalities.errors import InputError

_RENAME = [
    (r"^vae\.vae\.", "vae."),
    (r"^encoder\.module_dict\.enc_patch_emb\.patch_proj\.", "encoder.patch_embed.proj."),
    (r"^encoder\.module_dict\.enc_register_module\.registers$", "encoder.registers"),
    (r"^encoder\.module_dict\.enc_transformer\.", "encoder."),
    (r"^encoder\.module_dict\.enc_to_latents\.", "encoder."),
    (r"^decoder\.module_dict\.dec_from_latents\.proj\.", "decoder.from_codes."),
    (r"^decoder\.module_dict\.dec_registers_posemb_module\.posembs$", "decoder.register_positions"),
    (r"^decoder\.module_dict\.dec_nested_dropout\.dropout_mask_token$", "decoder.mask_token"),
    (r"^decoder\.module_dict\.dec_latent_dropout\.nullcond$", "decoder.null_token"),
    (r"^decoder\.module_dict\.dec_noise_patch_emb\.patch_proj\.", "decoder.patch_embed.proj."),
    (r"^decoder\.module_dict\.dec_time_embedder\.", "decoder.time_embed."),
    (r"^decoder\.module_dict\.dec_transformer\.", "decoder."),
    (r"^decoder\.module_dict\.dec_to_patches\.", "decoder."),
    (r"adaLN_modulation\.1\.", "adaln."),
]
# Fixed sine-cosine tables, recomputed by our module, and the heads that only training uses.
_IGNORED = re.compile(
    r"enc_posemb_module\.posembs$|dec_patches_posemb_module\.posembs$"
    r"|^decoder\.module_dict\.dec_repa"
)


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename and stack: q, k, v into ``qkv`` and fc1, fc3 into ``fc1_fc3``.

    Raises:
        InputError: a name that no published FlexTok has.
    """
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if _IGNORED.search(name):
            continue
        new = name
        for pattern, replacement in _RENAME:
            new = re.sub(pattern, replacement, new)
        if "module_dict" in new or not new.startswith(("vae.", "encoder.", "decoder.")):
            raise InputError(f'"{name}" is not a weight of a published FlexTok checkpoint.')
        state[new] = value
    state["decoder.register_positions"] = state["decoder.register_positions"][0, 0].T.contiguous()
    for name in [n for n in state if n.endswith(".attn.wq.weight")]:
        stem = name.removesuffix("wq.weight")
        parts = [state.pop(f"{stem}{w}.weight") for w in ("wq", "wk", "wv")]
        state[f"{stem}qkv.weight"] = torch.cat(parts)
    for name in [n for n in state if n.endswith(".mlp.fc1.weight") and not n.startswith("vae.")]:
        stem = name.removesuffix("fc1.weight")
        state[f"{stem}fc1_fc3.weight"] = torch.cat(
            [state.pop(name), state.pop(f"{stem}fc3.weight")]
        )
    return state
