"""What the verbs of the command line share: streams, file names, loading."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..modalities.errors import InputError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from ..pipelines.image_generation import ImageGenerationPipeline
    from ..tokenizers.base import Tokenizer

DEFAULT_MODEL = "sticker"
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")

Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite files that are there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Metadata = Annotated[
    bool, typer.Option("--no-metadata", help="Write clean pictures, without their settings.")
]


def note(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(text, err=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def progress_bar() -> Progress:
    """A bar on stderr that leaves stdout alone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,
        redirect_stderr=False,
    )


def slug(prompt: str, nothing: str = "picture") -> str:
    """The prompt as part of a file name: ``"A sleepy, red fox!"`` -> ``"a-sleepy-red-fox"``."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:48].strip("-") or nothing


def output_folder(out: str | None) -> Path | None:
    """The folder that ``--out`` names; None where it names a file.

    A name is a folder's if it ends with a slash, has no suffix, or is one already. Without
    ``--out`` the folder is today's in ``outputs/``.
    """
    if out is None:
        return Path("outputs") / datetime.now().strftime("%Y-%m-%d")
    path = Path(out)
    if out.endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        return path
    return None


def check_outputs(paths: Sequence[Path], force: bool) -> None:
    """Refuse, before any work, what could not be written after it.

    Raises:
        InputError: the parent folder is missing, or a file is there and ``force`` is off.
    """
    for path in paths:
        if path.is_dir():
            raise InputError(f'Could not write "{path}": it is a folder, give a file name in it.')
        if path.exists() and not force:
            raise InputError(f'"{path}" exists already: choose another name or pass -f.')
        if not path.parent.is_dir():
            raise InputError(
                f'Could not write "{path}": the folder "{path.parent}" does not exist, create it.'
            )


def check_folder(folder: Path) -> None:
    """Refuse a folder for results that neither is there nor can be made in its parent."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f'"{folder}" is a file: give a folder, or a name ending in .png.')
    if not folder.absolute().parent.is_dir():
        raise InputError(
            f'Could not write "{folder}": the folder "{folder.parent}" does not exist, create it.'
        )


def media_path(
    folder: Path, out: str | None, title: str, seed: int, kind: str, suffix: str
) -> Path:
    """The file of a seed in a folder, with the time of day where ``--out`` is not given."""
    time_of_day = "" if out is not None else datetime.now().strftime("%H%M%S_")
    return folder / f"{time_of_day}{slug(title, kind)}_{seed}{suffix}"


def media_paths(
    out: str | None,
    title: str,
    seeds: Sequence[int],
    kind: str,
    suffix: str,
    check_suffix: Callable[[Path], None],
    force: bool,
) -> list[Path]:
    """Where the sound or clip of each seed goes, by ``--out``.

    Args:
        kind: what they are, in the singular.
        suffix: of files in a folder.
        check_suffix: of a file that ``out`` names; raises.

    Raises:
        InputError: one file for several, another suffix, no such folder, or a file that is there
            already.
    """
    folder = output_folder(out)
    if folder is None:
        path = Path(out)
        check_suffix(path)
        if len(seeds) > 1:
            raise InputError(
                f'"{out}" names one file, but {len(seeds)} {kind}s are to be made: give a folder, '
                f"-o {path.stem}/."
            )
        check_outputs([path], force)
        return [path]
    paths = [media_path(folder, out, title, seed, kind, suffix) for seed in seeds]
    if out is not None:
        check_folder(folder)
    check_outputs([path for path in paths if path.exists()][:1], force)
    return paths


def check_picture_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f'Could not write "{path}": its name must end in {", ".join(SUFFIXES)}.')


def quiet_diffusers() -> None:
    """No bars and hints of the library below while models load; errors still raise."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pipeline(model: str, tokenizer: str | None = None) -> ImageGenerationPipeline:
    """A model that makes pictures, on the best device; what its licence forbids is said on stderr."""
    from ..weights.registry import find_model

    info = find_model(model, "-to-image")
    from ..pipelines.auto import load_image_pipeline
    from ..weights.loading import licence_notice

    quiet_diffusers()
    pipeline = load_image_pipeline(model, **({} if tokenizer is None else {"tokenizer": tokenizer}))
    if info is not None and info.shipped and licence_notice(info) is not None:
        note(f"Note: {licence_notice(info)}")
    return pipeline.to(device())


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer on the best device; `AutoTokenizer` says what its licence forbids."""
    from ..tokenizers.auto import AutoTokenizer

    quiet_diffusers()
    return AutoTokenizer.from_pretrained(name).to(device())


def token_lengths(text: str | None) -> list[int] | None:
    """``"1,8,32"`` -> ``[1, 8, 32]``."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f'"{text}" is not a list of token counts: write e.g. --tokens 1,8,32.'
        ) from error
