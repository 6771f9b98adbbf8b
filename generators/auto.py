"""One door to every generator of pictures: published or trained here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..modalities.errors import InputError
from ..weights.loading import find_files, licence_notice, load_folder, load_published
from ..weights.registry import find_model, generator_classes, list_models
from .base import ImageGenerator


class AutoGenerator:
    """Loads a generator of pictures by name; not to be instantiated."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, files: str | Path | None = None, **options: Any
    ) -> ImageGenerator:
        """A generator in eval mode.

        Args:
            name: a published checkpoint by name or hub id ("var-d16", see
                ``list_models(task="class-to-image")``), or a folder saved by ``save_pretrained``, of
                the generator or of a whole pipeline.
            files: folder with the files of a published checkpoint, or its one weight file; default:
                the hub's cache, then a download.
            options: of diffusers' ``from_pretrained``, for a folder.

        Raises:
            InputError: no such generator, no network, or files that are damaged or of another model.
        """
        text = str(name)
        if Path(text).is_dir() and files is None:
            return load_folder(Path(text), "generator", generator_classes(), options)
        info = find_model(text, "-to-image")
        if info is None or info.model.split(":")[1] not in generator_classes():
            known = ", ".join(list_models(task="class-to-image", shipped=False)[:8])
            raise InputError(
                f'Unknown generator "{text}": give a folder or a name such as {known}; '
                '"tessera models list" shows all.'
            )
        notice = licence_notice(info)
        if notice is not None:
            warnings.warn(notice, stacklevel=2)
        return load_published(info, find_files(info, files))
