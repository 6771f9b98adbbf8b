"""Published MaskGIT-VQGAN state dicts -> `MaskGITVQGAN` (names of maskgit-vqgan-imagenet-f16-256.bin)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError

_BLOCK = r"(norm[12]\.(?:weight|bias)|(?:conv[12]|nin_shortcut)\.weight)"
_RENAME = [
    (rf"(down|up)\.(\d+)\.block\.(\d+)\.{_BLOCK}", r"\1.\2.\3.\4"),
    (rf"mid\.(\d+)\.{_BLOCK}", r"mid.\1.\2"),
    (r"((?:conv_in|norm_out|conv_out)\.(?:weight|bias))", r"\1"),
]


def rename(name: str) -> str | None:
    """The name within our encoder or decoder of a published one; None for a foreign name."""
    upsampling = re.fullmatch(r"up\.(\d+)\.upsample_conv\.(weight|bias)", name)
    if upsampling:
        return f"upsample.{int(upsampling[1]) - 1}.conv.{upsampling[2]}"
    for pattern, replacement in _RENAME:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename.

    Raises:
        InputError: a name that no published MaskGIT-VQGAN has.
    """
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        part, _, rest = name.partition(".")
        new = rename(rest) if part in ("encoder", "decoder") else None
        if name == "quantize.embedding.weight":
            state["quantizer.embedding.weight"] = value
        elif new is not None:
            state[f"{part}.{new}"] = value
        else:
            raise InputError(f'"{name}" is not a weight of a published MaskGIT-VQGAN checkpoint.')
    return state
