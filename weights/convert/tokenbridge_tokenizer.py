"""KL-16's published file -> `TokenBridgeTokenizer` (its levels need no training)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...tokenizers.quantizers.dimension_wise import gaussian_levels
from . import kl16_vae


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and add the table of levels that follows from the configuration.

    Raises:
        InputError: a name that the published VAE does not have.
    """
    state = kl16_vae.convert_state_dict(published, config)
    state = {f"base.{name}": value for name, value in state.items()}
    values = gaussian_levels(config.get("levels", 64), config.get("std_range", 3.0))[1]
    return state | {"quantizer.reconstruction_values": values}
