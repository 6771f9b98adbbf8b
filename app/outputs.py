"""The outputs folder: ``YYYY-MM-DD/HHMMSS_<slug>_<seed>.png`` (sounds ``.wav``, clips ``.webp``, ``.mp4``),
and ``trash/`` for what was deleted."""

from __future__ import annotations

import os
import re
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..modalities.audio import AUDIO_SUFFIXES
from ..modalities.errors import InputError
from ..modalities.image import PICTURE_SUFFIXES, save_image
from ..modalities.records import read_record
from ..modalities.video import VIDEO_SUFFIXES
from .commands_shared import slug

TRASH = "trash"
SUFFIXES = (*PICTURE_SUFFIXES, ".apng", *AUDIO_SUFFIXES, *VIDEO_SUFFIXES)
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


class Outputs:
    """Saves, lists and deletes made pictures, clips and sounds.

    Args:
        folder: made when the first file is saved.
        metadata: whether the files carry how they were made.
    """

    def __init__(self, folder: Path, metadata: bool = True):
        self.folder = folder.absolute()
        self.metadata = metadata

    def save(self, image: Image.Image, record: dict[str, Any]) -> Path:
        """Write one picture under a new name.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        path = self.new_path(record["prompt"], record["seed"], ".png")
        save_image(image, path, record if self.metadata else None)
        return path

    def new_path(self, title: str, seed: int, suffix: str) -> Path:
        """A file name of today that is not there yet; its folder is made."""
        now = datetime.now()
        day = self.folder / now.strftime("%Y-%m-%d")
        day.mkdir(parents=True, exist_ok=True)
        nothing = {".png": "picture", ".wav": "sound"}.get(suffix, "clip")
        stem = f"{now:%H%M%S}_{slug(title, nothing)}_{seed}"
        path, number = day / f"{stem}{suffix}", 2
        while path.exists():
            path, number = day / f"{stem}-{number}{suffix}", number + 1
        return path

    def names(self, text: str = "") -> list[str]:
        """Names relative to the folder, newest first; only those whose prompt or name has ``text``."""
        found = []
        for day in sorted(_folders(self.folder), reverse=True):
            with os.scandir(day) as entries:
                files = sorted(
                    (
                        entry.name
                        for entry in entries
                        if entry.name.lower().endswith(SUFFIXES)
                        and not entry.name.startswith(".")
                        and entry.is_file(follow_symlinks=False)
                    ),
                    reverse=True,
                )
            found += [f"{day.name}/{name}" for name in files]
        wanted = text.casefold().split()
        return [name for name in found if not wanted or self._matches(name, wanted)]

    def path(self, name: str) -> Path:
        """The file of a name that came from a page.

        Raises:
            InputError: no such file in the folder.
        """
        day, _, file = name.partition("/")
        path = self.folder / day / file
        if (
            not _DAY.fullmatch(day)
            or file != Path(file).name
            or not file.lower().endswith(SUFFIXES)
            or path.is_symlink()
            or not path.is_file()
        ):
            raise InputError(f'There is no file "{name[:80]}" any more: refresh the list.')
        return path

    def record(self, name: str) -> dict[str, Any] | None:
        """How it was made, where its file says so."""
        path = self.path(name)
        return _cached_record(path, path.stat().st_mtime_ns)

    def delete(self, name: str) -> Path:
        """Move a file to the trash; returns where it lies now."""
        path = self.path(name)
        target = self.folder / TRASH / path.parent.name / path.name
        number = 2
        while target.exists():
            target, number = target.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
        target.parent.mkdir(parents=True, exist_ok=True)
        return path.rename(target)

    def restore(self, trashed: Path) -> str:
        """Take a file that `delete` moved back; returns its name.

        Raises:
            InputError: it is gone, or another file has its name now.
        """
        name = f"{trashed.parent.name}/{trashed.name}"
        target = self.folder / trashed.parent.name / trashed.name
        if not trashed.is_file():
            raise InputError(f'"{name}" is no longer in the trash.')
        if target.exists():
            raise InputError(f'"{name}" exists again: it stays in "{trashed.parent}".')
        target.parent.mkdir(parents=True, exist_ok=True)
        trashed.rename(target)
        return name

    def _matches(self, name: str, wanted: list[str]) -> bool:
        try:
            record = self.record(name)
        except InputError:  # Not what its name says, or gone meanwhile.
            record = None
        settings = (record or {}).get("settings", {})
        text = f"{name} {(record or {}).get('prompt') or ''} {settings.get('style') or ''}"
        return all(word in text.casefold() for word in wanted)


def medium(path: str | Path) -> str:
    """What a browser shows a file with: "picture" (animations too), "video" or "sound"."""
    suffix = Path(path).suffix.lower()
    return {**dict.fromkeys(AUDIO_SUFFIXES, "sound"), **dict.fromkeys(VIDEO_SUFFIXES, "video")}.get(
        suffix, "picture"
    )


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [p for p in root.iterdir() if _DAY.fullmatch(p.name) and p.is_dir()]


@lru_cache(maxsize=4096)
def _cached_record(path: Path, changed: int) -> dict[str, Any] | None:
    return read_record(path)
