"""Loading a pipeline folder, with one clear sentence for everything that can be wrong with it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from ..modalities.errors import InputError
from ..weights.loading import check_complete
from ..weights.registry import (
    generator_classes,
    import_class,
    resolve_model,
    shared_parts,
    tokenizer_classes,
    video_generator_classes,
)

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def load_folder(
    kind: type[Pipeline],
    from_pretrained: Callable[..., DiffusionPipeline],
    name: str | Path,
    **options: Any,
) -> Pipeline:
    """A shipped model by its plain name, a folder, or a hub id, through diffusers' own loader.

    Args:
        from_pretrained: ``DiffusionPipeline.from_pretrained`` bound to the class.

    Raises:
        InputError: nothing of that name, a damaged folder, or one of another kind.
    """
    path = resolve_model(name)
    _check_kind(kind, path, name)
    options.setdefault("dtype", torch.float32)
    try:
        index = kind.load_config(path)
        _import_parts(index)
        if isinstance(path, Path):
            for part, folder in shared_parts(path).items():
                module, model = index[part]
                model = getattr(importlib.import_module(module), model)
                options.setdefault(part, model.from_pretrained(folder, dtype=options["dtype"]))
        pipeline = from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'"{name}" could not be loaded as a {kind.__name__}: {reason}') from error
    except Exception as error:  # safetensors raises its own error for a damaged file
        raise InputError(
            f'"{name}" could not be loaded: a weight file is damaged ({error}). Copy it again.'
        ) from error
    if not isinstance(pipeline, kind):
        raise InputError(f'"{name}" holds a {type(pipeline).__name__}, not a {kind.__name__}.')
    for part, model in pipeline.components.items():
        if isinstance(model, torch.nn.Module):
            check_complete(model, f"{name}/{part}")
    pipeline.name = str(name)
    return pipeline


def _import_parts(index: dict[str, Any]) -> None:
    """Import the modules of the parts: diffusers loads classes of imported modules, and imports none."""
    known = {**tokenizer_classes(), **generator_classes(), **video_generator_classes()}
    for part in index.values():
        if isinstance(part, list | tuple) and len(part) == 2 and part[1] in known:
            import_class(known[part[1]])


def _check_kind(kind: type[DiffusionPipeline], path: str | Path, name: str | Path) -> None:
    """Refuse a folder of another pipeline: diffusers would fit its parts into this one."""
    found = pipeline_class(path)
    if found not in (None, kind.__name__):
        raise InputError(f'"{name}" holds a {found}, not a {kind.__name__}.')


def pipeline_class(name: str | Path) -> str | None:
    """Class name of the pipeline in a shipped model or a folder; None of anything else."""
    try:
        index = Path(resolve_model(name)) / "model_index.json"
        return json.loads(index.read_text("utf8"))["_class_name"]
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return None
