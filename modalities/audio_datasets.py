"""Recordings with texts: the speech and sound packs, and what users have on disk.

Every dataset answers ``len()``, ``audio(i) -> (float32 [C, T] in [-1, 1], rate in Hz)`` and
``text(i) -> str``: what is said in it, or what it sounds like.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .audio import AUDIO_SUFFIXES, load_audio, random_crop, resample, to_channels
from .datasets import (
    CAPTION_TABLES,
    check_choices,
    expand_shards,
    index_members,
    json_lines,
    read_span,
    row_captions,
    sample_captions,
    text_lines,
)
from .errors import InputError

VOICES = ("kathleen", "slt", "digits")
# The digits are under a share-alike licence.
PERMISSIVE_VOICES = ("kathleen", "slt")
SPLITS = ("train", "test")


class AudioTextDataset(Protocol):
    """What every dataset of this module answers."""

    def __len__(self) -> int: ...

    def audio(self, index: int) -> tuple[Tensor, int]: ...

    def text(self, index: int) -> str: ...


@dataclass(frozen=True)
class SpeechRow:
    """One row of ``transcripts.jsonl``; ``phones`` end at the seconds in ``ends``."""

    id: str
    voice: str
    text: str
    sr: int
    seconds: float
    split: str
    file: str
    offset: int
    length: int
    phones: tuple[str, ...] = ()
    ends: tuple[float, ...] = ()
    last_take: bool = True
    align_cost: float = 0.0


@dataclass(frozen=True)
class SoundRow:
    """One row of ``sounds.jsonl``: ``kind`` is note, major, minor, scale, ..., effect or real."""

    id: str
    caption: str
    label: str
    kind: str
    sr: int
    seconds: float
    split: str
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Utterance:
    """A spoken sentence: samples float16 ``[T]``, who speaks, and its phones with the second in which
    each ends."""

    audio: Tensor
    text: str
    speaker: str
    phones: tuple[str, ...]
    ends: tuple[float, ...]


class _Pack:
    """Encoded files one after the other in ``.bin`` files, and a table that says where each lies."""

    root: Path
    rows: list[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def audio(self, index: int) -> tuple[Tensor, int]:
        """At the pack's rate, one channel."""
        row = self.rows[index]
        data = read_span(self.root / row.file, row.offset, row.length)
        return load_audio(data, row.sr, mono=True, name=f'"{row.id}"')


class SpeechPack(_Pack):
    """Read sentences with phones and their times (``transcripts.jsonl``).

    Args:
        root: the pack's folder.
        voices: any of "kathleen", "slt", "digits"; default: those under permissive licences.
        split: "train", "test" (prompts that no voice has in "train"), or None for both.
        last_takes: of sentences that were read several times, only the last reading.
        max_align_cost: leave out rows whose phone times were fitted worse than this.

    Raises:
        InputError: not such a folder, or an unknown voice or split.
    """

    def __init__(
        self,
        root: str | Path,
        voices: Sequence[str] = PERMISSIVE_VOICES,
        split: str | None = "train",
        last_takes: bool = False,
        max_align_cost: float | None = None,
    ):
        self.root = Path(root)
        check_choices("voice", voices, VOICES)
        check_choices("split", [] if split is None else [split], SPLITS)
        self.rows = [
            row
            for row in _read_table(self.root / "transcripts.jsonl", SpeechRow)
            if row.voice in voices
            and split in (None, row.split)
            and (row.last_take or not last_takes)
            and (max_align_cost is None or row.align_cost <= max_align_cost)
        ]

    def text(self, index: int) -> str:
        return self.rows[index].text


class SoundPack(_Pack):
    """Instruments, chords, melodies, loops and effects with captions (``sounds.jsonl``).

    Args:
        root: the pack's folder.
        split: "train", "test", or None for both.
        kinds: of sound, to keep; default: all.

    Raises:
        InputError: not such a folder, an unknown split, or kinds that it has not.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = "train",
        kinds: Sequence[str] | None = None,
    ):
        self.root = Path(root)
        check_choices("split", [] if split is None else [split], SPLITS)
        rows = _read_table(self.root / "sounds.jsonl", SoundRow)
        if kinds is not None:
            check_choices("kind of sound", kinds, sorted({row.kind for row in rows}))
        self.rows = [
            row
            for row in rows
            if split in (None, row.split) and (kinds is None or row.kind in kinds)
        ]

    def text(self, index: int) -> str:
        return self.rows[index].caption


class AudioTextFolder:
    """A folder of recordings (sub-folders too) with texts.

    The text of ``a/take1.wav`` comes from ``a/take1.txt``, from a row of ``captions.jsonl`` or
    ``metadata.jsonl`` in the root (``{"file_name" or "file": "a/take1.wav", "text" or "caption":
    ...}``), or of ``metadata.csv`` in LJSpeech's form (``take1|text`` or ``take1|text|text as
    spoken``). A recording without any is called by its file name ("dog_bark-2.wav" -> "dog bark 2").

    Raises:
        InputError: no such folder, no recordings in it, or a row that does not fit.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f'There is no folder "{root}": give a folder of recordings.')
        self.files = sorted(
            path
            for path in self.root.rglob("*")
            if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()
        )
        if not self.files:
            raise InputError(f'No recordings in "{root}": put WAV, FLAC, OGG or MP3 files there.')
        self.table: dict[Path, str] = {}
        known = set(self.files)
        for table in CAPTION_TABLES:
            if not (self.root / table).is_file():
                continue
            for number, row in json_lines(self.root / table):
                file, texts = row.get("file_name", row.get("file")), row_captions(row)
                # Only files found under the root: "../x.wav" is none of them.
                if not isinstance(file, str) or not texts or self.root / file not in known:
                    raise InputError(
                        f'Line {number} of "{self.root / table}" needs a "file_name" in this '
                        'folder and its "text".'
                    )
                self.table[self.root / file] = texts[0]
        if (self.root / "metadata.csv").is_file():
            self._read_ljspeech(self.root / "metadata.csv")

    def _read_ljspeech(self, table: Path) -> None:
        by_stem = {path.stem: path for path in self.files}
        with open(table, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE)
            for number, row in enumerate(reader, start=1):
                if row and (len(row) < 2 or row[0] not in by_stem):
                    raise InputError(
                        f'Line {number} of "{table}" must be "name of a recording|text".'
                    )
                if row:
                    self.table[by_stem[row[0]]] = row[-1].strip() or row[1].strip()

    def __len__(self) -> int:
        return len(self.files)

    def audio(self, index: int) -> tuple[Tensor, int]:
        """With the file's own channels and rate."""
        return load_audio(self.files[index])

    def text(self, index: int) -> str:
        path = self.files[index]
        if path in self.table:
            return self.table[path]
        beside = path.with_suffix(".txt")
        if beside.is_file() and (lines := text_lines(beside.read_bytes(), f'"{beside}"')):
            return " ".join(lines)
        return " ".join(path.stem.replace("_", " ").replace("-", " ").split())


class AudioWebDataset:
    """Recordings and texts in WebDataset's tar shards, read at random by position.

    Members that share a name up to the first dot are one sample: a recording (``.wav``, ``.flac``,
    ...) and its text in ``.txt`` or in ``.json`` under "text" or "caption". Samples without a
    recording are passed over.

    Args:
        shards: a tar, a folder of them, or a brace pattern ("train-{000..007}.tar").

    Raises:
        InputError: no such files, not plain tars, or no recordings in them.
    """

    def __init__(self, shards: str | Path):
        self.samples: list[tuple[tuple[Path, int, int], dict[str, tuple[Path, int, int]]]] = []
        for shard in expand_shards(shards):
            for sample in index_members(shard):
                kinds = [kind for kind in sample if f".{kind}" in AUDIO_SUFFIXES]
                if kinds:
                    self.samples.append((sample[kinds[0]], sample))
        if not self.samples:
            raise InputError(
                f'No recordings in "{shards}": its members should end in .wav or .flac.'
            )

    def __len__(self) -> int:
        return len(self.samples)

    def audio(self, index: int) -> tuple[Tensor, int]:
        """With the file's own channels and rate."""
        span = self.samples[index][0]
        return load_audio(read_span(*span), name=f'recording {index} of "{span[0]}"')

    def text(self, index: int) -> str:
        span, sample = self.samples[index]
        return sample_captions(sample, f'sample {index} of "{span[0]}"')[0]


def open_audio_dataset(path: str | Path, **options: Any) -> AudioTextDataset:
    """Open what lies at a path: a speech or sound pack, ``.tar`` shards, or a folder of recordings.

    Args:
        options: of the class that fits, such as ``voices=("kathleen",)``.

    Raises:
        InputError: nothing fits there, or an option that this kind does not have.
    """
    folder = Path(path)
    if folder.suffix == ".tar":
        kind: Any = AudioWebDataset
    elif not folder.is_dir():
        raise InputError(f'There are no recordings at "{path}": give a folder or .tar shards.')
    elif (folder / "transcripts.jsonl").is_file():
        kind = SpeechPack
    elif (folder / "sounds.jsonl").is_file():
        kind = SoundPack
    else:
        kind = AudioWebDataset if any(folder.glob("*.tar")) else AudioTextFolder
    try:
        return kind(path, **options)
    except TypeError as error:
        raise InputError(f"A {kind.__name__} cannot take these options: {error}.") from error


def read_mono(dataset: AudioTextDataset, index: int, sample_rate: int) -> Tensor:
    """One recording as ``[1, T]`` at ``sample_rate`` Hz."""
    audio, rate = dataset.audio(index)
    return resample(to_channels(audio, 1), rate, sample_rate)


def read_crop(
    dataset: AudioTextDataset, index: int, sample_rate: int, samples: int, rng: random.Random
) -> Tensor:
    """``[1, samples]`` from a random place of one recording; a shorter one is repeated."""
    return random_crop(read_mono(dataset, index, sample_rate), samples, rng)


def load_sounds(data: dict[str, Any], sample_rate: int) -> list[Tensor]:
    """All recordings of ``{root, options}`` in memory: float16 ``[T]`` at ``sample_rate`` Hz."""
    dataset = open_audio_dataset(data["root"], **data.get("options", {}))
    return [read_mono(dataset, i, sample_rate)[0].half() for i in range(len(dataset))]


def load_utterances(data: dict[str, Any], sample_rate: int) -> list[Utterance]:
    """All sentences of the speech pack ``{root, options}`` in memory, at ``sample_rate`` Hz."""
    pack = SpeechPack(data["root"], **data.get("options", {}))
    return [
        Utterance(
            read_mono(pack, i, sample_rate)[0].half(), row.text, row.voice, row.phones, row.ends
        )
        for i, row in enumerate(pack.rows)
    ]


def _read_table(path: Path, kind: type) -> list[Any]:
    if not path.is_file():
        raise InputError(f'"{path.parent}" is no such pack: its {path.name} is missing.')
    names = {field.name for field in fields(kind)}
    rows = []
    for number, row in json_lines(path):
        try:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
            rows.append(kind(**{k: v for k, v in values.items() if k in names}))
        except TypeError as error:
            raise InputError(f'Line {number} of "{path}" is incomplete: {error}.') from error
    return rows
