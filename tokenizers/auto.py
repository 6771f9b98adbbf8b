"""One door to every tokenizer: shipped, published or trained here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..modalities.errors import InputError
from ..weights.loading import check_complete, find_files, licence_notice, load_published
from ..weights.registry import (
    ModelInfo,
    find_model,
    import_class,
    list_models,
    tokenizer_classes,
)
from .base import Tokenizer


class AutoTokenizer:
    """Loads a tokenizer by name; not to be instantiated."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, files: str | Path | None = None, **options: Any
    ) -> Tokenizer:
        """A tokenizer in eval mode.

        Args:
            name: a shipped model ("sticker": its tokenizer), a published checkpoint by name or hub
                id ("titok-l-32", see ``list_models(task="image-tokenizer")``), or a folder saved
                by ``save_pretrained``.
            files: folder with the files of a published checkpoint, or its one weight file; default:
                the hub's cache, then a download.
            options: of diffusers' ``from_pretrained``, for a folder or a shipped model.

        Raises:
            InputError: no such tokenizer, no network, or files that are damaged or of another model.
        """
        text = str(name)
        info = find_model(text, "-tokenizer")
        if Path(text).is_dir() and (info is None or not info.shipped) and files is None:
            return _from_folder(Path(text), options)
        if info is None:
            known = ", ".join(list_models(task="image-tokenizer")[:8])
            raise InputError(
                f'Unknown tokenizer "{text}": give a folder or a name such as {known}; '
                '"tessera models list" shows all.'
            )
        if info.shipped:
            return _from_folder(info.folder, options)
        if not info.task.endswith("-tokenizer"):
            raise InputError(f'"{info.name}" is no tokenizer but a {info.task} model.')
        return _from_published(info, files)


def _from_published(info: ModelInfo, files: str | Path | None) -> Tokenizer:
    notice = licence_notice(info)
    if notice is not None:
        warnings.warn(notice, stacklevel=3)
    return load_published(info, find_files(info, files))


def _from_folder(folder: Path, options: dict[str, Any]) -> Tokenizer:
    if (folder / "model_index.json").is_file():
        folder = folder / "tokenizer"
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f'"{folder}" holds no tokenizer: its config.json is missing.')
    try:
        class_name = json.loads(config.read_text(encoding="utf8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'"{config}" is not the configuration of a model.') from error
    classes = tokenizer_classes()
    if class_name not in classes:
        raise InputError(
            f'"{folder}" holds a {class_name}, which is no tokenizer: choose another folder.'
        )
    kind = import_class(classes[class_name])
    try:
        tokenizer = kind.from_pretrained(folder, **options).eval()
        check_complete(tokenizer, folder)
        return tokenizer
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f'The tokenizer in "{folder}" could not be loaded ({reason}): copy it again.'
        ) from error
