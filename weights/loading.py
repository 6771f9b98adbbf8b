"""Published weight files -> state dicts -> our modules; strict in both directions."""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..modalities.errors import InputError
from .registry import ModelInfo, import_class

PICKLED = (".pt", ".pth", ".pkl", ".bin", ".ckpt", ".tar")


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
        # Training code often stores its arguments beside the weights; a Namespace runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f'"{path}" holds more than plain tensors and was not opened, since such a file can run '
            "code: save its state dict as safetensors where you trust it."
        ) from error
    except Exception as error:  # A damaged pickle fails in as many ways as it has bytes.
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


def check_complete(model: nn.Module, folder: str | Path) -> None:
    """Raise InputError if the files that diffusers loaded a model from lack some of its weights.

    It only warns of them and leaves them on the meta device.
    """
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise InputError(
            f'The weights in "{folder}" are not those of {type(model).__name__}: '
            f'"{missing[0]}" is missing. Copy the folder again.'
        )


def load_folder(
    folder: Path, part: str, classes: Mapping[str, str], options: Mapping[str, Any]
) -> nn.Module:
    """A model that ``save_pretrained`` wrote, in eval mode; of a pipeline's folder its part of that name.

    Args:
        part: what is wanted, "tokenizer" or "generator".
        classes: import paths by class name: what the folder may hold.
        options: of diffusers' ``from_pretrained``.

    Raises:
        InputError: another kind of model, or a damaged one.
    """
    if (folder / "model_index.json").is_file():
        folder = folder / part
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f'"{folder}" holds no {part}: its config.json is missing.')
    try:
        class_name = json.loads(config.read_text(encoding="utf8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'"{config}" is not the configuration of a model.') from error
    if class_name not in classes:
        raise InputError(
            f'"{folder}" holds a {class_name}, which is no {part}: choose another folder.'
        )
    kind = import_class(classes[class_name])
    try:
        model = kind.from_pretrained(folder, **options).eval()
        check_complete(model, folder)
        return model
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(
            f'The {part} in "{folder}" could not be loaded ({_line(error)}): copy it again.'
        ) from error


def converter(system: str) -> Any:
    """The module ``weights/convert/<system>.py``; its ``convert_state_dict(state, config)`` renames."""
    return importlib.import_module(f"{__package__}.convert.{system}")


def load_published(info: ModelInfo, files: Sequence[str | Path]) -> nn.Module:
    """Build a registered model from weight files in published form, in eval mode.

    Where the converter has ``read_config(published)``, what the files' own configuration says (a
    config.json among them, else the header of the safetensors file) replaces the registry's.

    Raises:
        InputError: a file that cannot be read, or weights of something else.
    """
    convert = converter(info.system)
    config = dict(info.config)
    state: dict[str, Tensor] = {}
    published: dict[str, Any] = {}
    for file in map(Path, files):
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            published = read_json(file)
        else:
            state.update(read_state_dict(file))
            if file.suffix == ".safetensors" and not published:
                published = read_header(file)
    if hasattr(convert, "read_config"):
        config.update(convert.read_config(published))
    model = info.model_class()(**config)
    load_strict(model, convert.convert_state_dict(state, config))
    return model.eval()


def read_json(path: Path) -> dict[str, Any]:
    """A published config.json.

    Raises:
        InputError: no such file, or no JSON object.
    """
    try:
        published = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f'"{path}" is no configuration ({_line(error)}): copy it again.'
        ) from error
    if not isinstance(published, dict):
        raise InputError(f'"{path}" is no configuration: it must hold a JSON object.')
    return published


def read_header(path: Path) -> dict[str, str]:
    """The text entries in a safetensors file's header, without the "format" that torch writes."""
    with safe_open(path, "pt") as file:
        entries = file.metadata() or {}
    return {name: text for name, text in entries.items() if name != "format"}


def find_files(info: ModelInfo, folder: str | Path | None = None) -> list[Path]:
    """Weight files of a registered model: in ``folder``, else in the hub's cache, else downloaded.

    Raises:
        InputError: they are not there, and the hub cannot be reached.
    """
    if folder is not None:
        folder = Path(folder)
        names = [_split(entry, info)[0] for entry in info.files]
        paths = [folder] if folder.is_file() else [folder / name for name in names]
        # Without its config.json the header of the weights, or else the registry, describes a model.
        paths = [path for path in paths if path.name != "config.json" or path.is_file()]
        for path in paths:
            if not path.is_file():
                raise InputError(f'"{path}" is missing: put {", ".join(names)} there.')
        return paths
    paths = []
    for entry in info.files:
        name, hub_id = _split(entry, info)
        try:
            path = hf_hub_download(hub_id, name, local_files_only=True)
        except LocalEntryNotFoundError:
            try:
                path = hf_hub_download(hub_id, name)
            except Exception as error:  # The hub's and the network's many kinds of failure.
                raise InputError(
                    f'Could not download "{name}" of {hub_id} ({_line(error)}): download it '
                    f'elsewhere and pass its folder, e.g. from_pretrained("{info.name}", '
                    "files=FOLDER)."
                ) from error
        paths.append(Path(path))
    return paths


def is_cached(info: ModelInfo) -> bool:
    """Whether the hub's cache holds all files of a published model."""
    places = (_split(entry, info) for entry in info.files)
    return all(isinstance(try_to_load_from_cache(hub_id, name), str) for name, hub_id in places)


def _split(entry: str, info: ModelInfo) -> tuple[str, str]:
    """File and repository of ``file`` or ``owner/repository:file``."""
    hub_id, _, name = entry.rpartition(":")
    return name, hub_id or info.hub_id


def licence_notice(info: ModelInfo) -> str | None:
    """What a user must be told before using non-commercial weights; None for free ones."""
    if not info.non_commercial:
        return None
    return (
        f"{info.name}: not for commercial use. Code: {info.license_code}. "
        f"Weights: {info.license_weights}."
    )
