"""Published COMiT state dicts, with their Stable Diffusion VAE's, -> `COMiT`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError

_RENAME = [
    (r"^predictor\.x_embedder\.", "predictor.patch_embed."),
    (r"^predictor\.r_embedder\.", "predictor.message_embed."),
    (r"^predictor\.c_embedder\.", "predictor.offset_embed."),
    (r"^predictor\.t_embedder\.", "predictor.time_embed."),
    (r"^predictor\.r_pos_embed$", "predictor.message_positions"),
    (r"^predictor\.c_pos_embed$", "predictor.offset_position"),
    (r"^predictor\.r_to_token$", "predictor.readout_token"),
    (r"^predictor\.r_to_pos_embed$", "predictor.readout_positions"),
    (r"^predictor\.final_layer\.linear\.", "predictor.proj."),
    (r"^predictor\.final_layer\.adaLN_modulation\.1\.", "predictor.adaln."),
    (r"^predictor\.r_final_layer\.linear\.", "predictor.message_proj."),
    (r"^predictor\.c_final_layer\.linear\.", "predictor.offset_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"\.x_adaLN_modulation\.1\.", ".patch_adaln."),
    (r"\.r_adaLN_modulation\.1\.", ".message_adaln."),
    # The VAE's file has the names of an early diffusers.
    (r"^(encoder|decoder|quant_conv|post_quant_conv)\.", r"vae.\1."),
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
]
# A fixed sine-cosine table, recomputed by our module, and a parameter without use.
_IGNORED = {"predictor.pos_embed", "predictor.y_pos_offset"}
_POSITIONS = re.compile(r"_positions?$|readout_token$")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; the patch convolution becomes a linear layer over (row, column, channel).

    Raises:
        InputError: a name that neither a COMiT nor its VAE has.
    """
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if name in _IGNORED:
            continue
        new = name
        for pattern, replacement in _RENAME:
            new = re.sub(pattern, replacement, new)
        if not new.startswith(("predictor.", "vae.")):
            raise InputError(f'"{name}" is not a weight of a published COMiT checkpoint.')
        if new == "predictor.patch_embed.proj.weight" and value.ndim == 4:
            value = value.permute(0, 2, 3, 1).flatten(1).contiguous()
        elif _POSITIONS.search(new):
            value = value.flatten(0, 1)
        state[new] = value
    return state


_ARGUMENTS = {
    "hidden_size": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "num_msg_tokens": "num_message_tokens",
    "in_channels": "latent_channels",
    "max_input_size": "latent_size",
    "patch_size": "patch_size",
}


def read_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """What a published config.json states of our constructor's arguments.

    Its tree names classes; none is ever imported.
    """
    predictor = _node(published, "predictor")
    quantizer = _node(published, "quantizer")
    config = {ours: predictor[name] for name, ours in _ARGUMENTS.items() if name in predictor}
    for name in ("levels", "fsq_levels"):
        if name in quantizer:
            config["fsq_levels"] = quantizer[name]
    if "mse" in str(published.get("vae", "")):
        warnings.warn(
            "This COMiT was trained over stabilityai/sd-vae-ft-mse: give the "
            "diffusion_pytorch_model.safetensors of that VAE, not of sd-vae-ft-ema.",
            stacklevel=2,
        )
    return config


def _node(published: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    node = published.get(name, {})
    if not isinstance(node, Mapping):
        raise InputError(f'"{name}" of a COMiT configuration must be a tree, got {node!r}.')
    return node
