"""Trained parts -> one pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..generators.autoregressive.flexar import FlexAR
from ..generators.autoregressive.sound import SoundTransformer
from ..generators.autoregressive.speech import SpeechTransformer
from ..modalities.errors import InputError
from ..pipelines.class_to_image import ClassToImagePipeline
from ..pipelines.text_to_image import TextToImagePipeline
from ..pipelines.text_to_sound import TextToSoundPipeline
from ..pipelines.text_to_speech import TextToSpeechPipeline
from ..pipelines.text_to_video import TextToVideoPipeline
from ..tokenizers.audio.wavtokenizer import WavTokenizer
from ..tokenizers.auto import AutoTokenizer
from ..weights.registry import generator_classes, import_class, video_generator_classes
from .audio_tasks import load_codec
from .checkpoints import replace_folder
from .generator_tasks import CLASSES, load_clip
from .tasks import build, load_frozen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assemble(recipe: dict[str, Any]) -> Path:
    """Save the recipe's tokenizer, generator and clip as a pipeline, in place of one there.

    Args:
        recipe: ``output``, the folders of the three parts, ``dtype`` of the saved weights and
            ``pipeline``, the settings of `TextToImagePipeline`, or of `ClassToImagePipeline` if the
            generator draws from classes, or of `TextToVideoPipeline` if it makes video. With
            ``codec`` in place of tokenizer and clip: those of `TextToSpeechPipeline` or
            `TextToSoundPipeline`.

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
    if "codec" in recipe:
        pipeline = assemble_sound(recipe, dtype)
        replace_folder(output, pipeline.save_pretrained)
        return output
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(recipe["tokenizer"], dtype=dtype),
        "generator": load_frozen(generator_class(recipe["generator"]), recipe, "generator", dtype),
    }
    if type(parts["generator"]).__name__ in video_generator_classes():
        kind = TextToVideoPipeline
        parts["clip"] = load_clip(recipe["clip"], dtype)
    elif parts["generator"].condition == "text":
        kind = TextToImagePipeline
        parts["clip"] = load_clip(recipe["clip"], dtype)
    else:
        kind = ClassToImagePipeline
        names = Path(recipe["generator"]) / CLASSES
        parts["class_names"] = json.loads(names.read_text("utf8")) if names.is_file() else None
    pipeline = build(kind, **parts, **recipe["pipeline"])
    replace_folder(output, pipeline.save_pretrained)
    return output


def assemble_sound(
    recipe: dict[str, Any], dtype: torch.dtype
) -> TextToSpeechPipeline | TextToSoundPipeline:
    """The recipe's codec and its generator, of phones or of captions, as a pipeline."""
    name = json.loads((Path(recipe["generator"]) / "config.json").read_text("utf8"))["_class_name"]
    kinds = {
        "SpeechTransformer": (SpeechTransformer, TextToSpeechPipeline),
        "SoundTransformer": (SoundTransformer, TextToSoundPipeline),
    }
    if name not in kinds:
        raise InputError(
            f'"{recipe["generator"]}" holds a {name}: a pipeline of sound needs one of '
            f"{', '.join(kinds)}."
        )
    model, kind = kinds[name]
    codec = load_codec(recipe, dtype)
    if kind is TextToSpeechPipeline and not isinstance(codec, WavTokenizer):
        raise InputError(f"A voice needs a WavTokenizer as its codec, got {type(codec).__name__}.")
    return build(
        kind,
        codec=codec,
        generator=load_frozen(model, recipe, "generator", dtype),
        **recipe["pipeline"],
    )


def generator_class(folder: str | Path) -> type:
    """The class that a folder's config.json names; FlexAR where it names none that is known."""
    try:
        name = json.loads((Path(folder) / "config.json").read_text("utf8"))["_class_name"]
        return import_class((generator_classes() | video_generator_classes())[name])
    except (OSError, ValueError, KeyError, TypeError):
        return FlexAR
