"""Trained parts -> one pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..generators.autoregressive.flexar import FlexAR
from ..modalities.errors import InputError
from ..pipelines.class_to_image import ClassToImagePipeline
from ..pipelines.text_to_image import TextToImagePipeline
from ..tokenizers.auto import AutoTokenizer
from ..weights.registry import generator_classes, import_class
from .checkpoints import replace_folder
from .generator_tasks import CLASSES, load_clip
from .tasks import build, load_frozen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assemble(recipe: dict[str, Any]) -> Path:
    """Save the recipe's tokenizer, generator and clip as a pipeline, in place of one there.

    Args:
        recipe: ``output``, the folders of the three parts, ``dtype`` of the saved weights and
            ``pipeline``, the settings of `TextToImagePipeline`, or of `ClassToImagePipeline` if the
            generator draws from classes.

    Raises:
        InputError: a part that is missing or does not fit the others, an unknown dtype, or a
            folder at ``output`` that is not a pipeline.
    """
    output = Path(recipe["output"])
    if output.exists() and not (output / "model_index.json").is_file():
        raise InputError(f'"{output}" holds something else: set another output=.')
    if recipe["dtype"] not in DTYPES:
        raise InputError(f'Unknown dtype "{recipe["dtype"]}": choose from {", ".join(DTYPES)}.')
    dtype = DTYPES[recipe["dtype"]]
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(recipe["tokenizer"], dtype=dtype),
        "generator": load_frozen(generator_class(recipe["generator"]), recipe, "generator", dtype),
    }
    if parts["generator"].condition == "text":
        kind = TextToImagePipeline
        parts["clip"] = load_clip(recipe["clip"], dtype)
    else:
        kind = ClassToImagePipeline
        names = Path(recipe["generator"]) / CLASSES
        parts["class_names"] = json.loads(names.read_text("utf8")) if names.is_file() else None
    pipeline = build(kind, **parts, **recipe["pipeline"])
    replace_folder(output, pipeline.save_pretrained)
    return output


def generator_class(folder: str | Path) -> type:
    """The class that a folder's config.json names; FlexAR where it names none that is known."""
    try:
        name = json.loads((Path(folder) / "config.json").read_text("utf8"))["_class_name"]
        return import_class(generator_classes()[name])
    except (OSError, ValueError, KeyError, TypeError):
        return FlexAR
