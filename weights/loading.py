"""Published weight files -> state dicts -> our modules; strict in both directions."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..modalities.errors import InputError
from .registry import ModelInfo

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a ``.safetensors`` file, its ``.index.json``, or a pickle of plain tensors.

    Nested dicts of a pickle are flattened with dots ("model.encoder.weight"); what is no tensor is
    left out. Pickles are opened with ``weights_only=True``: no code in them runs.

    Raises:
        InputError: no such file, another kind of file, a damaged one, or a pickle of other things.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'There is no weight file "{path}": check the path.')
    try:
        if path.name.endswith(".safetensors"):
            return load_file(path)
        if path.name.endswith(".safetensors.index.json"):
            names = json.loads(path.read_text(encoding="utf8"))["weight_map"].values()
            state: dict[str, Tensor] = {}
            for name in sorted(set(names)):
                state.update(load_file(path.with_name(Path(name).name)))
            return state
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'"{path}" is damaged or not a safetensors file ({_line(error)}): copy it again.'
        ) from error
    if not path.name.endswith(PICKLED):
        raise InputError(
            f'"{path}" is not a weight file: give .safetensors or one of {", ".join(PICKLED)}.'
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f'"{path}" holds more than plain tensors and was not opened, since such a file can run '
            "code: save its state dict as safetensors where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f'"{path}" is damaged ({_line(error)}): copy it again.') from error
    state = {}
    _flatten(loaded, "", state)
    if not state:
        raise InputError(f'"{path}" holds no tensors: give the file with the model\'s weights.')
    return state


def _flatten(value: Any, prefix: str, into: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        into[prefix] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(item, f"{prefix}.{key}" if prefix else str(key), into)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_strict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of exactly the model's names and shapes.

    Raises:
        InputError: a missing or unknown name or another shape; the first three are named.
    """
    wanted = model.state_dict()
    faults = [f'"{name}" is missing' for name in wanted if name not in state]
    faults += [f'"{name}" is unknown' for name in state if name not in wanted]
    faults += [
        f'"{name}" is {list(state[name].shape)}, not {list(wanted[name].shape)}'
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(
            f"These weights do not fit {type(model).__name__}: {', '.join(faults[:3])}{more}. "
            "They belong to another model or variant."
        )
    model.load_state_dict(state)


def converter(system: str) -> Any:
    """The module ``weights/convert/<system>.py``; its ``convert_state_dict(state, config)`` renames."""
    return importlib.import_module(f"{__package__}.convert.{system}")


def load_published(info: ModelInfo, files: Sequence[str | Path]) -> nn.Module:
    """Build a registered model from weight files in published form, in eval mode.

    Raises:
        InputError: a file that cannot be read, or weights of something else.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(read_state_dict(file))
    model = info.model_class()(**info.config)
    load_strict(model, converter(info.system).convert_state_dict(state, info.config))
    return model.eval()


def find_files(info: ModelInfo, folder: str | Path | None = None) -> list[Path]:
    """Weight files of a registered model: in ``folder``, else in the hub's cache, else downloaded.

    Raises:
        InputError: they are not there, and the hub cannot be reached.
    """
    if folder is not None:
        folder = Path(folder)
        paths = [folder] if folder.is_file() else [folder / name for name in info.files]
        for path in paths:
            if not path.is_file():
                raise InputError(f'"{path}" is missing: put {", ".join(info.files)} there.')
        return paths
    paths = []
    for name in info.files:
        try:
            path = hf_hub_download(info.hub_id, name, local_files_only=True)
        except LocalEntryNotFoundError:
            try:
                path = hf_hub_download(info.hub_id, name)
            except Exception as error:  # The hub's and the network's many kinds of failure.
                raise InputError(
                    f'Could not download "{name}" of {info.hub_id} ({_line(error)}): download it '
                    f'elsewhere and pass its folder, e.g. from_pretrained("{info.name}", '
                    "files=FOLDER)."
                ) from error
        paths.append(Path(path))
    return paths


def licence_notice(info: ModelInfo) -> str | None:
    """What a user must be told before using non-commercial weights; None for free ones."""
    if not info.non_commercial:
        return None
    return (
        f"{info.name}: not for commercial use. Code: {info.license_code}. "
        f"Weights: {info.license_weights}."
    )
