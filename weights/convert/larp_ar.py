"""Published LARP generators -> `LARPGenerator` (names of hywang66/LARP's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .titok import apply_rules

_RULES = [
    (r"abs_pe", r"positions"),
    (r"cls_embedding\.embedding_table\.weight", r"classes.weight"),
    (r"tok_embeddings\.weight", r"embedding.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"blocks.\1.qkv.weight"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"blocks.\1.proj.weight"),
    (r"layers\.(\d+)\.feed_forward\.(w[13])\.weight", r"blocks.\1.\2.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"blocks.\1.down.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"norm\.weight", r"norm.weight"),
    (r"output\.weight", r"head.weight"),
]
_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "num_tokens",
    "num_classes": "num_classes",
    "frame_prediction": "frame_prediction",
    "dim": "dim",
    "n_layer": "depth",
    "n_head": "heads",
    "class_dropout_prob": "label_dropout",
}


def read_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """What a published config.json states of the arguments of `LARPGenerator`."""
    config = {ours: published[name] for name, ours in _ARGUMENTS.items() if name in published}
    if "dim" in published and "multiple_of" in published:
        multiple = published["multiple_of"]
        hidden = int(2 / 3 * 4 * published["dim"])
        config["mlp_hidden"] = -(-hidden // multiple) * multiple
    return config


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and join w1 and w3 of every layer into ``gate_value``.

    Args:
        config: arguments of `LARPGenerator`.

    Raises:
        InputError: a name that no published LARP generator has.
    """
    state = apply_rules(published, _RULES, "LARP generator")
    for name in [name for name in state if name.endswith(".w1.weight")]:
        stem = name.removesuffix("w1.weight")
        parts = [state.pop(name), state.pop(f"{stem}w3.weight")]
        state[f"{stem}gate_value.weight"] = torch.cat(parts)
    if "positions" in state:
        state["positions"] = state["positions"][0].contiguous()
    return state
