"""What can be loaded by name: the models shipped with Tessera and the published checkpoints.

Shipped models are pipeline folders in ``weights/shipped/``. Published checkpoints are rows of
``weights/published/<system>.yaml``, one file a system; nothing of them is contained here.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..modalities.errors import InputError

# Tokenizers of papers that published no weights: only those trained here can be loaded.
TRAINED_HERE = (
    "tokenizers.audio.mel:LogMel",
    "tokenizers.audio.spectrum_vq:SpectrumVQ",
    "tokenizers.video.phenaki:CViViT",
)
# The same of generators of video.
VIDEO_TRAINED_HERE = ("generators.masked.phenaki:Phenaki", "generators.linear_video.lingen:LinGen")
VIDEO_TASKS = ("text-to-video", "class-to-video", "frame-prediction")

WEIGHTS = Path(__file__).parent
SHIPPED = WEIGHTS / "shipped"
PUBLISHED = WEIGHTS / "published"


@dataclass(frozen=True)
class ModelInfo:
    """One loadable model.

    Attributes:
        name: what `from_pretrained` takes, lower case, no slash.
        system: the published system (one module and one converter each); "tessera" if shipped.
        task: e.g. "image-tokenizer", "text-to-image", "class-to-image".
        title: one line: what it is.
        paper: arXiv id, or None.
        model: class, as ``"tokenizers.image.titok:TiTok"`` within this package.
        config: arguments of that class.
        hub_id: repository on the Hugging Face hub; None if shipped.
        files: files wanted of that repository, in published form: weights, and config.json where the
            converter reads it; ``owner/repository:file`` stands for a file of another repository.
        license_code, license_weights: SPDX id where there is one, otherwise a sentence.
        non_commercial: the code's or the weights' terms forbid commercial use, or nobody gave any.
        tokens: of one item, e.g. "32", "1-256".
        vocab_size: ids of a discrete tokenizer; None for continuous ones.
        parameters: in millions.
        size_mb: of the weight files.
        tokenizer: of a generator: name of the tokenizer whose tokens it writes.
        text_tower: of a generator from text: what reads the text, "clip:NAME" of open_clip's OpenAI
            weights or "t5:REPOSITORY" of the hub.
        shared: parts that a shipped model takes from another one: part -> "model/part".
    """

    name: str
    system: str
    task: str
    title: str
    model: str
    license_code: str
    license_weights: str
    paper: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    hub_id: str | None = None
    files: tuple[str, ...] = ()
    non_commercial: bool = False
    tokens: str | None = None
    vocab_size: int | None = None
    parameters: float | None = None
    size_mb: float | None = None
    tokenizer: str | None = None
    text_tower: str | None = None
    shared: Mapping[str, str] = field(default_factory=dict)

    @property
    def shipped(self) -> bool:
        return self.hub_id is None

    @property
    def folder(self) -> Path | None:
        """Where a shipped model lies."""
        return SHIPPED / self.name if self.shipped else None

    def model_class(self) -> type:
        return import_class(self.model)


def import_class(path: str) -> type:
    """``"tokenizers.image.titok:TiTok"`` -> the class, imported from within this package."""
    module, name = path.split(":")
    root = __package__.rpartition(".")[0]
    return getattr(importlib.import_module(f"{root}.{module}"), name)


def tokenizer_classes() -> dict[str, str]:
    """Class name -> import path of every registered tokenizer: what a config.json may name."""
    paths = {info.model for info in _models().values() if info.task.endswith("-tokenizer")}
    return {path.split(":")[1]: path for path in (*paths, *TRAINED_HERE)}


def generator_classes() -> dict[str, str]:
    """Class name -> import path of every registered generator of pictures."""
    infos = [info for info in _models().values() if info.task.endswith("-to-image")]
    paths = {info.model for info in infos if info.model.startswith("generators.")}
    return {path.split(":")[1]: path for path in paths}


def video_generator_classes() -> dict[str, str]:
    """Class name -> import path of every generator of video."""
    infos = [info for info in _models().values() if info.task in VIDEO_TASKS]
    paths = {info.model for info in infos if info.model.startswith("generators.")}
    return {path.split(":")[1]: path for path in (*paths, *VIDEO_TRAINED_HERE)}


@cache
def _models() -> dict[str, ModelInfo]:
    found = [_read_shipped(path.parent) for path in sorted(SHIPPED.glob("*/tessera.json"))]
    for path in sorted(PUBLISHED.glob("*.yaml")):
        found += _read_published(path)
    models = {}
    for info in found:
        if info.name in models:
            raise ValueError(f"two models are called {info.name}")
        models[info.name] = info
    return models


def _read_shipped(folder: Path) -> ModelInfo:
    row = json.loads((folder / "tessera.json").read_text(encoding="utf8"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return ModelInfo(
        name=folder.name,
        system="tessera",
        size_mb=round(size / 1e6, 1),
        license_code="Apache-2.0",
        **row,
    )


def _read_published(path: Path) -> list[ModelInfo]:
    """Rows of one file: what all checkpoints share stands on top, each row adds or replaces."""
    data = yaml.load(path.read_text(encoding="utf8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    checkpoints = data.pop("checkpoints")
    shared_config = data.pop("config", {})
    rows = []
    for name, row in checkpoints.items():
        merged = {**data, **row, "config": {**shared_config, **row.get("config", {})}}
        merged["files"] = tuple(merged.get("files", ("model.safetensors",)))
        if merged.get("tokens") is not None:
            merged["tokens"] = str(merged["tokens"])
        rows.append(ModelInfo(name=name, system=path.stem, **merged))
    return rows


def list_models(
    pattern: str = "*", task: str | None = None, shipped: bool | None = None
) -> list[str]:
    """Names of the models that can be loaded, shipped ones first.

    Args:
        pattern: with wildcards, e.g. ``"titok*"``; matched against names and hub ids.
        task: only those of this task, e.g. ``"image-tokenizer"``.
        shipped: only those that come with the package (True) or need a download (False).
    """
    pattern = pattern.lower()
    return [
        info.name
        for info in _models().values()
        if (fnmatchcase(info.name, pattern) or fnmatchcase((info.hub_id or "").lower(), pattern))
        and task in (None, info.task)
        and shipped in (None, info.shipped)
    ]


def find_model(name: str, kind: str = "") -> ModelInfo | None:
    """The row with that name or hub id (upper or lower case), if there is one.

    Args:
        kind: of several models in one repository only those whose task ends so ("-tokenizer"), if
            there are any.

    Raises:
        InputError: a hub id that several models share.
    """
    wanted = str(name).lower()
    models = _models()
    if wanted in models:
        return models[wanted]
    rows = [info for info in models.values() if (info.hub_id or "").lower() == wanted]
    rows = [info for info in rows if info.task.endswith(kind)] or rows
    if len(rows) > 1:
        raise InputError(
            f'"{name}" holds several models: name one of {", ".join(info.name for info in rows)}.'
        )
    return rows[0] if rows else None


def model_info(name: str) -> ModelInfo:
    """Size, licences, tokens and source of a model.

    Raises:
        InputError: no model of that name or hub id.
    """
    info = find_model(name)
    if info is None:
        raise InputError(
            f'Unknown model "{name}": see list_models() or the command "tessera models list".'
        )
    return info


def resolve_model(name: str | Path) -> str | Path:
    """Where a model's files are: the folder of a shipped one, a folder, or a hub id.

    Plain names are those of shipped models, what exists is a folder, what has a slash is a hub id.

    Raises:
        InputError: none of these.
    """
    text = str(name)
    info = find_model(text)
    if info is not None and info.shipped:
        return info.folder
    if Path(text).is_dir():
        return Path(text)
    if info is None and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    if info is not None:
        return info.hub_id
    known = ", ".join(list_models(shipped=True)) or "none"
    raise InputError(
        f'Unknown model "{text}": give a shipped one ({known}), a folder, or a hub id '
        '("owner/name").'
    )


def shared_parts(folder: Path) -> dict[str, Path]:
    """Folders of the parts that a shipped model takes from another one; empty for other folders."""
    try:
        row = json.loads((folder / "tessera.json").read_text("utf8"))
    except OSError:
        return {}
    return {part: SHIPPED / place for part, place in row.get("shared", {}).items()}
