"""Codecs of transformers: the published names, through transformers' own renaming, to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError
from ...tokenizers.audio.transformers_codecs import build_codec, fold_weight_norm


def read_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments in a published config.json."""
    return {"codec_config": dict(published)} if "model_type" in published else {}


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Published names -> ours; weight norm becomes plain weights.

    Raises:
        InputError: a missing or unknown name.
    """
    state = convert_network(published, config["codec_config"])
    return {f"codec.{name}": value for name, value in state.items()}


def convert_network(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Published names of a network of transformers -> those of `build_codec`'s.

    Args:
        config: as in its config.json, ``model_type`` among it.

    Raises:
        InputError: a missing or unknown name.
    """
    kind = type(build_codec(config, config["model_type"]))
    settings = {key: value for key, value in config.items() if key != "model_type"}
    model, report = kind.from_pretrained(
        None,
        config=kind.config_class(**settings),
        state_dict=dict(published),
        output_loading_info=True,
    )
    faults = [f'"{name}" is missing' for name in sorted(report["missing_keys"])]
    faults += [f'"{name}" is unknown' for name in sorted(report["unexpected_keys"])]
    if faults:
        raise InputError(f"These weights do not fit {kind.__name__}: {', '.join(faults[-3:])}.")
    return fold_weight_norm(model).state_dict()
