"""Published FlexTok state dicts -> `FlexTok` (names of apple/ml-flextok's checkpoints)."""

from __future__ import annotations

import ast
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


# Stage of the published tree -> {its argument: ours}.
_ARGUMENTS = {
    "encoder": {
        "enc_channels_to_last": {},
        "enc_patch_emb": {"channels_in": "latent_channels", "patch_sizes": "patch_size"},
        "enc_posemb_module": {"max_sizes": "max_grid"},
        "enc_register_module": {},
        "enc_seq_packer": {},
        "enc_transformer": {
            "dim": "encoder_dim",
            "depth": "encoder_depth",
            "head_dim": "head_dim",
            "mlp_ratio": "mlp_ratio",
        },
        "enc_unpacker": {},
        "enc_to_latents": {},
    },
    "decoder": {
        "dec_from_latents": {},
        "dec_registers_posemb_module": {"max_sizes": "num_registers"},
        "dec_nested_dropout": {},
        "dec_latent_dropout": {},
        "dec_noise_channels_to_last": {},
        "dec_noise_patch_emb": {},
        "dec_patches_posemb_module": {},
        "dec_seq_packer": {},
        "dec_time_embedder": {"max_timestep": "max_timestep"},
        "dec_transformer": {"dim": "decoder_dim", "depth": "decoder_depth"},
        "dec_unpacker": {},
        "dec_to_patches": {},
        "dec_channels_to_first": {},
    },
}
_PACKAGES = ("flextok.", "diffusers.")


def read_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """What a published configuration states of our constructor's arguments.

    Args:
        published: the tree of ``config.json``, or the header of the safetensors file, which holds
            the same with every value as the text of a Python literal. Classes are named in it
            (``_target_``); none is ever imported.

    Raises:
        InputError: a stage that no published FlexTok has, a class of another package, or a header
            that is no literal.
    """
    tree = {name: _literal(name, value) for name, value in published.items()}
    config: dict[str, Any] = {}
    for part, stages in _ARGUMENTS.items():
        _check_target(part, tree.get(part, {}))
        for stage, node in tree.get(part, {}).get("module_dict", {}).items():
            if stage.startswith("dec_repa"):  # A head that only training uses.
                continue
            if stage not in stages:
                raise InputError(f'"{stage}" is not a stage of a published FlexTok configuration.')
            _check_target(stage, node)
            config |= {
                ours: _first(node[name]) for name, ours in stages[stage].items() if name in node
            }
    for part, names in (
        ("vae", {"scaling_factor": "vae_scaling_factor"}),
        ("regularizer", {"levels": "fsq_levels"}),
    ):
        node = tree.get(part, {})
        _check_target(part, node)
        config |= {ours: node[name] for name, ours in names.items() if node.get(name) is not None}
    return config


def _literal(name: str, value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(("{", "[", "(")):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise InputError(f'The configuration of "{name}" is no Python literal.') from error


def _check_target(name: str, node: Any) -> None:
    if not isinstance(node, Mapping):
        raise InputError(f'"{name}" of a FlexTok configuration must be a tree, got {node!r}.')
    target = node.get("_target_", "flextok.")
    if not str(target).startswith(_PACKAGES):
        raise InputError(f'"{name}" names the class "{target}", which is no part of FlexTok.')


def _first(value: Any) -> Any:
    """Sides are lists of equal numbers, one a dimension."""
    return value[0] if isinstance(value, (list, tuple)) else value
