"""Published state dicts of VAR's tokenizer (vae_ch160v4096z32.pth) -> `MultiScaleVQVAE`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .ldm import convert_autoencoder

_RENAME = [
    (r"^quantize\.embedding\.", "quantizer.codebook.embedding."),
    (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.phi."),
]
_SAME = ("quant_conv.", "post_quant_conv.")


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; the statistic ``quantize.ema_vocab_hit_SV`` is left out.

    Raises:
        InputError: a name that the published tokenizer does not have.
    """
    state: dict[str, Tensor] = {}
    autoencoder: dict[str, Tensor] = {}
    for name, value in published.items():
        if name == "quantize.ema_vocab_hit_SV":
            continue
        for pattern, replacement in _RENAME:
            name = re.sub(pattern, replacement, name)
        own = name.startswith(("quantizer.", *_SAME))
        (state if own else autoencoder)[name] = value
    return state | convert_autoencoder(autoencoder)
