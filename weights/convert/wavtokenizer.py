"""Published WavTokenizer checkpoints -> `WavTokenizer` (names of jishengpeng/WavTokenizer)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...modalities.errors import InputError

_ENCODER = "feature_extractor.encodec.encoder.model."
_CODEBOOK = "feature_extractor.encodec.quantizer.vq.layers.0._codebook."
# What training alone uses: discriminators, losses, the codebook's running sums, and EnCodec's own
# decoder, which is in every checkpoint and never called.
_IGNORED = re.compile(
    r"^(multiperioddisc|multiresddisc|dac|dacdiscriminator|melspec_loss)\."
    r"|^feature_extractor\.encodec\.decoder\."
    rf"|^{re.escape(_CODEBOOK)}(inited|embed_avg)$"
    r"|^head\.istft\.window$"
)


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any], bandwidth_id: int = 0
) -> dict[str, Tensor]:
    """Rename, fold the weight norms, and take one row of the adaptive layer norms' tables.

    Args:
        bandwidth_id: the row, 0 at the published inference.

    Raises:
        InputError: a name that no published WavTokenizer has.
    """
    published = {name.removeprefix("state_dict."): value for name, value in published.items()}
    published = {name: v for name, v in published.items() if not _LIGHTNING.search(name)}
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if _IGNORED.search(name):
            continue
        if name.endswith("weight_g"):
            value = _fold(published[name.removesuffix("g") + "v"], value)
            name = name.removesuffix("_g")
        elif name.endswith("weight_v"):
            continue
        elif re.search(r"norm\.(scale|shift)\.weight$", name):
            value = value[bandwidth_id]
            name = name.replace(".scale.weight", ".weight").replace(".shift.weight", ".bias")
        state[_rename(name, len(config["strides"]))] = value
    for name in [n for n in state if n.startswith("backbone.pos_net.2.q.")]:
        parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    for name in [n for n in state if re.match(r"backbone\.pos_net\.2\.(qkv|out)\.weight", n)]:
        state[name] = state[name].squeeze(-1)
    return state


# Beside the state dict, a Lightning checkpoint holds the tensors of its optimisers and loops.
_LIGHTNING = re.compile(r"^(optimizer_states|lr_schedulers|loops|callbacks)\.")


def _rename(name: str, stages: int) -> str:
    if name.startswith(_ENCODER):
        index, rest = name.removeprefix(_ENCODER).split(".", 1)
        index, rest = int(index), rest.replace("conv.conv.", "")
        if index == 0:
            return f"encoder.conv_in.{rest}"
        if index == 3 * stages + 1:
            return f"encoder.{rest}"
        if index == 3 * stages + 3:
            return f"encoder.conv_out.{rest}"
        if index % 3 == 0 and index <= 3 * stages:
            return f"encoder.downs.{index // 3 - 1}.{rest}"
        if index % 3 == 1:
            rest = rest.replace("block.1.", "conv1.").replace("block.3.", "conv2.")
            return f"encoder.blocks.{index // 3}.{rest}"
    elif name.startswith(_CODEBOOK):
        return f"quantizer.{name.removeprefix(_CODEBOOK)}"
    elif name.startswith(("backbone.", "head.out.")):
        for old, new in (
            ("convnext.", "blocks."),
            ("pwconv1.", "fc1."),
            ("pwconv2.", "fc2."),
            ("final_layer_norm.", "final_norm."),
            ("proj_out.", "out."),
        ):
            name = name.replace(old, new)
        return name
    raise InputError(f'"{name}" is not a weight of a published WavTokenizer checkpoint.')


def _fold(direction: Tensor, length: Tensor) -> Tensor:
    """Weight norm: ``length * direction / |direction|`` over all axes but the first."""
    return direction * (length / direction.flatten(1).norm(dim=1)[:, None, None])
