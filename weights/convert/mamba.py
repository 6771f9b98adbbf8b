"""Published state dicts of the Mamba-1 and Mamba-2 language models -> `MambaLM` (state-spaces/mamba)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError

_RENAME = [
    (r"^backbone\.embedding\.weight$", "embedding.weight"),
    (r"^backbone\.norm_f\.weight$", "norm.weight"),
    (r"^backbone\.layers\.(\d+)\.(norm2?|mixer|mlp)\.", r"blocks.\1.\2."),
    (r"^lm_head\.weight$", "head.weight"),
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; a tied head, which is the embedding table once more, is left out.

    Raises:
        InputError: a name that no published model has.
    """
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        for pattern, replacement in _RENAME:
            new, found = re.subn(pattern, replacement, name)
            if found:
                break
        else:
            raise InputError(f'"{name}" is not a weight of a published Mamba language model.')
        if new != "head.weight" or not config.get("tie_embeddings", True):
            state[new] = value
    return state
