"""MaskGIT-VQGAN state dicts under the names of MAGE and ENAT (vqgan_jax_strongaug.ckpt) -> `MaskGITVQGAN`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import maskgit_vqgan

_RENAME = [
    (r"^((?:en|de)coder\.mid)\.block_1\.", r"\1.0."),
    (r"^((?:en|de)coder\.mid)\.block_2\.", r"\1.1."),
    (r"^(decoder\.up\.\d+)\.upsample\.conv\.", r"\1.upsample_conv."),
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename to the other release's names, then to ours.

    Raises:
        InputError: a name that this checkpoint does not have.
    """
    renamed = {}
    for name, value in published.items():
        new = name.removeprefix("state_dict.")
        for pattern, replacement in _RENAME:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value
    return maskgit_vqgan.convert_state_dict(renamed, config)
