"""Trained parts -> one pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..generators.autoregressive.flexar import FlexAR
from ..generators.conditioning.clip import TextImageCLIP
from ..modalities.errors import InputError
from ..pipelines.text_to_image import TextToImagePipeline
from ..tokenizers.image.flextok import FlexTok
from .checkpoints import replace_folder
from .tasks import build, load_frozen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assemble(recipe: dict[str, Any]) -> Path:
    """Save the recipe's tokenizer, generator and clip as a pipeline, in place of one there.

    Args:
        recipe: ``output``, the folders of the three parts, ``dtype`` of the saved weights and
            ``pipeline``, the settings of `TextToImagePipeline`.

    Raises:
        InputError: a part that is missing or does not fit the others, an unknown dtype, or a
            folder at ``output`` that is not a pipeline.
    """
    output = Path(recipe["output"])
    if output.exists() and not (output / "model_index.json").is_file():
        raise InputError(f'"{output}" holds something else: set another output=.')
    if recipe["dtype"] not in DTYPES:
        raise InputError(f'Unknown dtype "{recipe["dtype"]}": choose from {", ".join(DTYPES)}.')
    kinds = {"tokenizer": FlexTok, "generator": FlexAR, "clip": TextImageCLIP}
    dtype = DTYPES[recipe["dtype"]]
    parts = {key: load_frozen(kind, recipe, key, dtype) for key, kind in kinds.items()}
    pipeline = build(TextToImagePipeline, **parts, **recipe["pipeline"])
    replace_folder(output, pipeline.save_pretrained)
    return output
