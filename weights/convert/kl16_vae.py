"""Published KL-16 state dicts (kl16.ckpt) -> `KL16VAE`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .ldm import convert_autoencoder


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; the file's wrapper ``model.`` and weights of training losses are left out.

    Raises:
        InputError: a name that the published VAE does not have.
    """
    names = {n: n.removeprefix("model.") for n in published}
    weights = {new: published[n] for n, new in names.items() if not new.startswith("loss.")}
    state = {n: v for n, v in weights.items() if n.startswith(("quant_conv.", "post_quant_conv."))}
    state |= convert_autoencoder({n: v for n, v in weights.items() if n not in state})
    return {f"vae.{name}": value for name, value in state.items()}
