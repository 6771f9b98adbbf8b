"""Published KARL state dicts (.pth files of ShivamDuggal4/karl) -> `KARL`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError
from . import enat_vqgan, kl16_vae

_RENAME = [
    (r"^rec_loss_embeddings$", "encoder.error_embedding.weight"),
    (r"^latent_tokens$", "encoder.latent_tokens"),
    (r"^patch_embed\.", "encoder.patch_embed."),
    (r"^encoder_ln_(pre|post|post_halt)\.", r"encoder.ln_\1."),
    (r"^pre_quantizer_mlp\.", "encoder.proj."),
    (r"^halting_mlp\.", "encoder.halting."),
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^decoder_mask_token$", "decoder.mask_token"),
    (r"^decoder_latent_tokens_timestep_embed$", "decoder.latent_positions"),
    (r"^(encoder|decoder)_positional_embedding$", r"\1.positions"),
    (r"^decoder\.ffn\.", "decoder.head."),
    (r"^(encoder|decoder)\.transformer\.", r"\1.blocks."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.0."),
    (r"\.mlp\.c_proj\.", ".mlp.2."),
    (r"^quantize\.embedding\.", "quantizer.embedding."),
]
_OURS = re.compile(
    r"(encoder|decoder)\.(blocks\.\d+\.|ln_|patch_embed\.|positions$|latent_tokens$|error_embedding\."
    r"|proj\.|halting\.|embed\.|mask_token$|latent_positions$|head\.)|quantizer\."
)
# Discriminators and perceptual losses of the second training stage.
_TRAINING = re.compile(r"discriminator|perceptual|lpips|gan_loss")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; position tables keep the places of the grid in use.

    A training checkpoint holds several state dicts: the one under "ema" is taken.

    Raises:
        InputError: a name that no published KARL has.
    """
    if any(name.startswith("ema.") for name in published):
        published = {
            n.removeprefix("ema."): v for n, v in published.items() if n.startswith("ema.")
        }
    state: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    prefix = f"base_tokenizer.{config.get('base_type', 'vqgan')}."
    for name, value in published.items():
        if _TRAINING.search(name):
            continue
        if name.startswith(prefix):
            base[name.removeprefix(prefix)] = value
            continue
        new = name
        for pattern, replacement in _RENAME:
            new = re.sub(pattern, replacement, new)
        if not _OURS.match(new):
            raise InputError(f'"{name}" is not a weight of a published KARL checkpoint.')
        if new.endswith(".positions"):
            grid = config.get("image_size", 256) // config.get("patch_size", 16)
            value = F.interpolate(value[None], size=(grid, grid), mode="nearest")[0]
            value = value.flatten(1).T.contiguous()
        elif new == "decoder.mask_token":
            value = value.flatten(0, 1)
        state[new] = value
    convert = enat_vqgan if config.get("base_type", "vqgan") == "vqgan" else kl16_vae
    converted = convert.convert_state_dict(base, config.get("base_config") or {})
    return state | {f"base.{name}": value for name, value in converted.items()}
