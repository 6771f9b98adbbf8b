"""Published tokenizers of NBP -> `NBPTokenizer` (names of RenShuhuai-Andy/NBP's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .titok import apply_rules

_ANY = r"\.(weight|bias)"
_RULES = [
    (rf"(en|de)coder_layers\.(\d+)\.conv{_ANY}", r"\1coder.\2.conv.\3"),
    (rf"(en|de)coder_layers\.(\d+){_ANY}", r"\1coder.\2.\3"),
    (r"(en|de)coder_layers\.(\d+)\.beta", r"\1coder.\2.beta"),
    (rf"(en|de)coder_layers\.(\d+)\.fn\.(\d){_ANY}", r"\1coder.\2.layers.\3.\4"),
    (rf"(en|de)coder_layers\.(\d+)\.fn\.(\d)\.conv{_ANY}", r"\1coder.\2.layers.\3.conv.\4"),
    (r"(en|de)coder_layers\.(\d+)\.fn\.(\d)\.beta", r"\1coder.\2.layers.\3.beta"),
    (rf"(en|de)coder_layers\.(\d+)\.residual_fn\.0\.conv{_ANY}", r"\1coder.\2.skip.conv.\3"),
]


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, without the prefixes of the training code.

    Raises:
        InputError: a name that no published tokenizer of NBP has.
    """
    stripped = {
        name.removeprefix("model_state_dict.").removeprefix("module."): value
        for name, value in published.items()
    }
    state = apply_rules(stripped, _RULES, "NBP tokenizer")
    return {n: value.flatten() if n.endswith(".beta") else value for n, value in state.items()}
