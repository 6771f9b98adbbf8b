"""Files of media: opened for reading, and written whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import InputError


@contextmanager
def atomic_path(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path``; what is written there becomes ``path`` at the end.

    When the body raises (a full disk, an interrupt), the temporary file is removed, a file that
    was at ``path`` before stays as it was, and the exception goes on.

    Args:
        path: the file to make.
        overwrite: replace a file that is there.

    Raises:
        InputError: the parent folder is missing, ``path`` is a folder, its name is too long, or
            it exists and ``overwrite`` is off.
    """
    path = Path(path)
    try:
        if not path.parent.is_dir():
            raise InputError(
                f'Could not write "{path}": the folder "{path.parent}" does not exist, create it.'
            )
        if path.is_dir():
            raise InputError(f'Could not write "{path}": it is a folder, give a file name in it.')
        if path.exists() and not overwrite:
            raise InputError(
                f'"{path}" exists already: choose another name or allow overwriting it.'
            )
    except OSError as error:
        raise InputError(
            f'Could not write "{str(path)[:80]}": {error.strerror}, choose another name.'
        ) from error
    # The suffix stays last, since many writers choose their format by it.
    temporary = path.with_name(f".tessera-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def media_path(source: str | Path, kind: str) -> Path:
    """The path of a file of that kind ("picture", "recording").

    Raises:
        InputError: ``source`` is an address.
    """
    # One slash is enough, since Path("https://x") is "https:/x"; one letter is a Windows drive.
    if re.match(r"data:|[a-z][a-z0-9+.-]+:/", str(source), re.IGNORECASE):
        raise InputError(
            f'Could not open "{str(source)[:80]}": addresses are not opened, download the '
            f"{kind} and give its file."
        )
    return Path(source)


def open_media(path: Path, name: str, kind: str) -> BinaryIO:
    """Open a file of that kind for reading; ``name`` is what messages call it.

    Raises:
        InputError: no such file, a folder, or not allowed to read it.
    """
    try:
        if path.is_dir():
            raise InputError(f"Could not open {name}: it is a folder, give one {kind} file.")
        if not path.is_file():
            raise InputError(f"Could not open {name}: there is no such file, check the path.")
        return open(path, "rb")
    except OSError as error:
        raise InputError(
            f"Could not open {name[:80]}: {error.strerror}, check the path."
        ) from error
