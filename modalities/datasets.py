"""Pictures with captions: the sticker pack, and what users have on disk.

Every dataset answers ``len()``, ``image(i) -> PIL RGBA``, ``name(i) -> str`` (its main caption),
``captions(i) -> list[str]`` (all of them) and ``caption(i, rng) -> str`` (one, drawn by ``rng`` alone).
"""

from __future__ import annotations

import gzip
import inspect
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from .errors import InputError
from .image import PICTURE_SUFFIXES, load_image

STYLE_WORDS = {
    "fluent-3d": "3d",
    "fluent-flat": "flat",
    "fluent-color": "gradient",
    "noto": "noto",
    "blob": "blob",
    "twemoji": "twemoji",
    "openmoji": "outlined",
    "fxemoji": "firefox",
    "glyph": "black glyph",
}
PERMISSIVE_STYLES = tuple(style for style in STYLE_WORDS if style != "openmoji")
CAPTION_TABLES = ("captions.jsonl", "metadata.jsonl")


class ImageTextDataset(Protocol):
    """What every dataset of this module answers."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str: ...

    def captions(self, index: int) -> list[str]: ...

    def caption(self, index: int, rng: random.Random) -> str: ...


@dataclass(frozen=True)
class Sticker:
    """One row of ``captions.jsonl``."""

    id: str
    style: str
    unicode: str
    base: str
    name: str
    keywords: tuple[str, ...]
    group: str
    tone: bool
    split: str
    offset: int
    length: int

    @property
    def emoji(self) -> str:
        """The character itself; a glyph, which has none, gives its name."""
        if self.unicode.startswith("g:"):
            return self.name
        return "".join(chr(int(code, 16)) for code in self.unicode.split("-"))


class StickerPack:
    """Sticker art of nine styles, 128x128 RGBA (``captions.jsonl`` beside one ``.bin`` a style).

    Args:
        root: the pack's folder.
        styles: styles to keep; default: the eight under permissive licences.
        splits: any of "train", "val", "test".
        exclude_groups: Unicode groups to leave out.
        tones: keep skin-tone variants.

    Raises:
        InputError: not such a folder, or an unknown style or split.
    """

    def __init__(
        self,
        root: str | Path,
        styles: Sequence[str] = PERMISSIVE_STYLES,
        splits: Sequence[str] = ("train",),
        exclude_groups: Sequence[str] = ("flags", "component"),
        tones: bool = False,
    ):
        self.root = Path(root)
        table = self.root / "captions.jsonl"
        if not table.is_file():
            raise InputError(f'No captions.jsonl in "{root}": give the sticker pack\'s folder.')
        check_choices("style", styles, STYLE_WORDS)
        check_choices("split", splits, ("train", "val", "test"))
        self.stickers: list[Sticker] = []
        for number, row in json_lines(table):
            try:
                row["keywords"] = tuple(row["keywords"])
                row["tone"] = bool(row.get("tone"))
                sticker = Sticker(**{key: row[key] for key in Sticker.__dataclass_fields__})
            except KeyError as error:
                raise InputError(
                    f'Line {number} of "{table}" has no {error}: it is not a sticker pack.'
                ) from error
            if (
                sticker.style in styles
                and sticker.split in splits
                and sticker.group not in exclude_groups
                and (tones or not sticker.tone)
            ):
                self.stickers.append(sticker)

    def __len__(self) -> int:
        return len(self.stickers)

    def image(self, index: int) -> Image.Image:
        """RGBA, 128x128, straight alpha."""
        sticker = self.stickers[index]
        data = read_span(self.root / f"{sticker.style}.bin", sticker.offset, sticker.length)
        return load_image(data, background=None, name=f"sticker {sticker.id}")

    def name(self, index: int) -> str:
        return self.stickers[index].name

    @cached_property
    def _translations(self) -> dict[str, dict[str, str]]:
        path = self.root / "names_i18n.json.gz"
        if not path.is_file():
            return {}
        with gzip.open(path, "rt", encoding="utf8") as file:
            return json.load(file)

    def translations(self, index: int) -> dict[str, str]:
        """The name by locale ("de": "rotes Herz"), "en" included; empty where nobody knows it."""
        return self._translations.get(self.stickers[index].unicode, {})

    def captions(self, index: int) -> list[str]:
        """Its name, plain and with the style, its keywords, and the emoji."""
        sticker = self.stickers[index]
        style = STYLE_WORDS[sticker.style]
        all_of_them = [
            sticker.name,
            f"{sticker.name}, {style}",
            f"a {style} {sticker.name}",
            " ".join(sticker.keywords),
            sticker.emoji,
        ]
        return [caption for caption in dict.fromkeys(all_of_them) if caption]

    def caption(self, index: int, rng: random.Random) -> str:
        """One of the ways people ask for this sticker: its name, keywords, style or emoji."""
        sticker = self.stickers[index]
        style = STYLE_WORDS[sticker.style]
        words = rng.sample(sticker.keywords, min(len(sticker.keywords), rng.randint(1, 3)))
        choices = [
            sticker.name,
            f"{sticker.name}, {style}",
            f"a {style} {sticker.name}",
            f"{sticker.name} {' '.join(words)}".strip(),
            " ".join(words) or sticker.name,
            sticker.emoji,
        ]
        return rng.choices(choices, weights=[4, 6, 2, 2, 1, 0.5])[0]


class ImageTextFolder:
    """A folder of pictures (sub-folders too) with captions.

    Captions of ``a/fox.png`` come from ``a/fox.txt`` (every line is one), and from the rows of
    ``captions.jsonl`` or ``metadata.jsonl`` in the root:
    ``{"file_name" or "file": "a/fox.png", "text" or "caption": str or list of str}``.
    A picture without any is called by its file name ("red_fox-2.png" -> "red fox 2").

    Raises:
        InputError: no such folder, no pictures in it, or a row that does not fit.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f'There is no folder "{root}": give a folder of pictures.')
        self.files = sorted(
            path
            for path in self.root.rglob("*")
            if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
        )
        if not self.files:
            raise InputError(f'No pictures in "{root}": put PNG, JPEG or WebP files there.')
        self.table: dict[Path, list[str]] = {}
        known = set(self.files)
        for table in CAPTION_TABLES:
            if not (self.root / table).is_file():
                continue
            for number, row in json_lines(self.root / table):
                file = row.get("file_name", row.get("file"))
                captions = row_captions(row)
                if not isinstance(file, str) or not captions:
                    raise InputError(
                        f'Line {number} of "{self.root / table}" needs "file_name" and "text".'
                    )
                # Only files found under the root: "../x.png" is none of them.
                path = self.root / file
                if path not in known:
                    raise InputError(
                        f'Line {number} of "{self.root / table}" names "{file}", which is not a '
                        "picture in this folder."
                    )
                self.table.setdefault(path, []).extend(captions)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """RGBA of the file's own size."""
        return load_image(self.files[index], background=None)

    def name(self, index: int) -> str:
        return self.captions(index)[0]

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions(index))

    def captions(self, index: int) -> list[str]:
        path = self.files[index]
        captions = list(self.table.get(path, ()))
        text = path.with_suffix(".txt")
        if text.is_file():
            captions += text_lines(text.read_bytes(), f'"{text}"')
        return captions or [" ".join(path.stem.replace("_", " ").replace("-", " ").split())]


class WebDataset:
    """Pictures and captions in WebDataset's tar shards, read at random by position.

    Members that share a name up to the first dot are one sample: a picture (``.png``, ``.jpg``,
    ...), and its captions in ``.txt`` (every line is one) or in ``.json`` under "text" or
    "caption". Samples without a picture are passed over.

    Args:
        shards: a tar, a folder of them, or a brace pattern ("train-{000..007}.tar").

    Raises:
        InputError: no such files, not plain tars, or no captioned pictures in them.
    """

    def __init__(self, shards: str | Path):
        self.samples: list[dict[str, tuple[Path, int, int]]] = []
        for shard in expand_shards(shards):
            self.samples += _index_shard(shard)
        if not self.samples:
            raise InputError(f'No pictures in "{shards}": its members should end in .png or .jpg.')

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> Image.Image:
        """RGBA of the file's own size."""
        span = self.samples[index]["image"]
        return load_image(read_span(*span), background=None, name=f'picture {index} of "{span[0]}"')

    def name(self, index: int) -> str:
        return self.captions(index)[0]

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions(index))

    def captions(self, index: int) -> list[str]:
        sample = self.samples[index]
        return sample_captions(sample, f'sample {index} of "{sample["image"][0]}"')


KINDS = {"stickers": StickerPack, "folder": ImageTextFolder, "webdataset": WebDataset}


def open_dataset(path_or_kind: str | Path, **options: Any) -> ImageTextDataset:
    """Open a dataset by its kind ("stickers", "folder", "webdataset") or by what lies at a path.

    ``open_dataset("stickers", root=...)``, ``open_dataset("pictures/")``,
    ``open_dataset("train-{000..007}.tar")``.

    Raises:
        InputError: nothing fits there, or an option that this kind does not have.
    """
    arguments: tuple[Any, ...] = ()
    if path_or_kind in KINDS:
        kind = KINDS[path_or_kind]
    else:
        arguments, path = (path_or_kind,), Path(path_or_kind)
        if path.suffix == ".tar":
            kind = WebDataset
        elif not path.is_dir():
            raise InputError(
                f'There is no data at "{path_or_kind}": give a folder of pictures, .tar shards or '
                f"one of {', '.join(KINDS)}."
            )
        elif (path / "captions.jsonl").is_file() and any(path.glob("*.bin")):
            kind = StickerPack
        else:
            kind = WebDataset if any(path.glob("*.tar")) else ImageTextFolder
    try:
        inspect.signature(kind).bind(*arguments, **options)
    except TypeError as error:
        raise InputError(f"A {kind.__name__} cannot take these options: {error}.") from error
    return kind(*arguments, **options)


def check_choices(what: str, values: Sequence[str], choices: Sequence[str] | dict) -> None:
    """Raise InputError for a value that is none of the choices."""
    for value in values:
        if value not in choices:
            raise InputError(f'Unknown {what} "{value}": choose from {", ".join(choices)}.')


def read_span(path: Path, offset: int, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise InputError(f'Could not read "{path}": {error.strerror}, fetch it again.') from error


def text_lines(data: bytes, name: str) -> list[str]:
    """The lines of a caption file that are not blank."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The captions of {name} are not UTF-8 text: save them as such."
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and rows of a jsonl file; blank lines are passed over."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise InputError(f'Line {number} of "{path}" is not a JSON object: repair it.')
            yield number, row


def row_captions(row: dict[str, Any]) -> list[str]:
    captions = row.get("text", row.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list):
        return []
    return [caption.strip() for caption in captions if isinstance(caption, str) and caption.strip()]


def sample_captions(sample: dict[str, tuple[Path, int, int]], name: str) -> list[str]:
    """Captions in the ``.txt`` and ``.json`` of a sample of `index_members`.

    Raises:
        InputError: it has none, or they cannot be read.
    """
    captions = text_lines(read_span(*sample["txt"]), name) if "txt" in sample else []
    if "json" in sample:
        try:
            row = json.loads(read_span(*sample["json"]))
        except (ValueError, RecursionError) as error:
            raise InputError(f"The .json of {name} is not JSON: repair it.") from error
        captions += row_captions(row) if isinstance(row, dict) else []
    if not captions:
        raise InputError(f"There is no caption in {name}: add a .txt or .json to it.")
    return captions


def expand_shards(shards: str | Path) -> list[Path]:
    if Path(shards).is_dir():
        return sorted(Path(shards).glob("*.tar"))
    from webdataset.shardlists import expand_urls  # Imports torch's data loading.

    return [Path(shard) for shard in expand_urls(str(shards))]


def _index_shard(shard: Path) -> list[dict[str, tuple[Path, int, int]]]:
    """The samples with a picture."""
    return [sample for sample in index_members(shard) if "image" in sample]


def index_members(shard: Path) -> list[dict[str, tuple[Path, int, int]]]:
    """Where the parts of each sample lie: "image" or the extension -> (tar, offset, length)."""
    samples: dict[str, dict[str, tuple[Path, int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                extension = extension.lower()
                part = "image" if f".{extension}" in PICTURE_SUFFIXES else extension
                span = (shard, member.offset_data, member.size)
                samples.setdefault(folder + slash + key, {})[part] = span
    except FileNotFoundError as error:
        raise InputError(f'There is no file "{shard}": check the path.') from error
    except (OSError, tarfile.TarError) as error:
        raise InputError(f'"{shard}" is not a plain (uncompressed) tar: make one of it.') from error
    return list(samples.values())
