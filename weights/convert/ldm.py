"""Names of latent diffusion's convolutional autoencoder -> names of diffusers' blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ...modalities.errors import InputError

_RENAME = [
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(\w+)\.norm_out\.", r"\1.conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]
_NAME = re.compile(r"(encoder|decoder)\.(conv_in|conv_out|norm_out|mid|down\.\d+|up\.\d+)\.")


def convert_autoencoder(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries ``encoder.*`` and ``decoder.*``; 1x1 convolutions of attention become matrices.

    Raises:
        InputError: a name of another network.
    """
    for name in published:
        if not _NAME.match(name):
            raise InputError(
                f'"{name}" is not a weight of this autoencoder: the file is of another model.'
            )
    ups = [int(name.split(".")[2]) for name in published if name.startswith("decoder.up.")]
    levels = 1 + max(ups, default=0)
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        for pattern, replacement in _RENAME:
            name = re.sub(pattern, replacement, name)
        # Published levels count from full resolution, diffusers' decoder in the order of computing.
        name = re.sub(r"\.up_blocks\.(\d+)", lambda m: f".up_blocks.{levels - 1 - int(m[1])}", name)
        if ".attentions." in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        if ".attentions." in name and ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace(".qkv.", f".to_{letter}.")] = part
        else:
            state[name] = value
    return state
