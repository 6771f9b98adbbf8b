"""One door to every tokenizer: shipped, published or trained here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from ..modalities.errors import InputError
from ..weights.loading import find_files, licence_notice, load_folder, load_published
from ..weights.registry import (
    ModelInfo,
    find_model,
    import_class,
    list_models,
    tokenizer_classes,
)
from .base import AudioTokenizer, Tokenizer


class AutoTokenizer:
    """Loads a tokenizer by name; not to be instantiated."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, files: str | Path | None = None, **options: Any
    ) -> Tokenizer | AudioTokenizer:
        """A tokenizer in eval mode.

        Args:
            name: a shipped model ("sticker": its tokenizer, "voice": its codec), a published checkpoint by name or hub
                id ("titok-l-32", "mimi"; see ``list_models(task="image-tokenizer")`` and
                "audio-tokenizer"), or a folder saved by ``save_pretrained``.
            files: folder with the files of a published checkpoint, or its one weight file; default:
                the hub's cache, then a download.
            options: of diffusers' ``from_pretrained``, for a folder or a shipped model.

        Raises:
            InputError: no such tokenizer, no network, or files that are damaged or of another model.
        """
        text = str(name)
        info = find_model(text, "-tokenizer")
        if Path(text).is_dir() and (info is None or not info.shipped) and files is None:
            return load_folder(Path(text), _part(Path(text)), tokenizer_classes(), options)
        if info is None:
            known = ", ".join(list_models(task="image-tokenizer")[:8])
            raise InputError(
                f'Unknown tokenizer "{text}": give a folder or a name such as {known}; '
                '"tessera models list" shows all.'
            )
        if info.shipped:
            return load_folder(info.folder, _part(info.folder), tokenizer_classes(), options)
        if not info.task.endswith("-tokenizer"):
            raise InputError(f'"{info.name}" is no tokenizer but a {info.task} model.')
        return _from_published(info, files)


def _part(folder: Path) -> str:
    """What a pipeline calls its tokenizer; one of sound has a codec."""
    return "codec" if (folder / "codec" / "config.json").is_file() else "tokenizer"


def _from_published(info: ModelInfo, files: str | Path | None) -> Tokenizer | AudioTokenizer:
    notice = licence_notice(info)
    if notice is not None:
        warnings.warn(notice, stacklevel=3)
    return load_published(info, find_files(info, files))


def tokenizer_class(name: str | Path) -> type | None:
    """The class that `AutoTokenizer` would load, without loading it; None where it would refuse."""
    text = str(name)
    info, folder = find_model(text, "-tokenizer"), Path(text)
    if info is not None and (info.shipped or not folder.is_dir()):
        if not info.shipped:
            return info.model_class() if info.task.endswith("-tokenizer") else None
        folder = info.folder
    for config in (folder / _part(folder) / "config.json", folder / "config.json"):
        try:
            path = tokenizer_classes()[json.loads(config.read_text("utf8"))["_class_name"]]
            return import_class(path)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
