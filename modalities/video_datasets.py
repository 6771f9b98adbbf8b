"""Clips with captions: the animated pack, endless procedural animations, and what users have on disk.

Every dataset answers ``len()``, ``clip(i, rng) -> Video`` (RGBA where the file has transparency; ``rng``
chooses where in a long file, and what else a clip leaves open), ``name(i) -> str`` (its main caption),
``captions(i) -> list[str]`` and ``caption(i, rng) -> str`` (one of them).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from .datasets import (
    CAPTION_TABLES,
    ImageTextDataset,
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
from .image import to_tensor
from .video import ANIMATION_SUFFIXES, VIDEO_SUFFIXES, Fit, Source, Video, VideoReader

CLIP_SUFFIXES = (*VIDEO_SUFFIXES, *ANIMATION_SUFFIXES)


class ClipTextDataset(Protocol):
    """What every dataset of this module answers."""

    def __len__(self) -> int: ...

    def clip(self, index: int, rng: random.Random | None = None) -> Video: ...

    def name(self, index: int) -> str: ...

    def captions(self, index: int) -> list[str]: ...

    def caption(self, index: int, rng: random.Random) -> str: ...


@dataclass(frozen=True)
class Window:
    """The part of a file that makes a clip.

    Attributes:
        num_frames: exactly so many (a short file's last frame is repeated); None: the whole file.
        frame_rate: None: the file's.
        size, fit: see `fit_frames`; None: the file's own size.
    """

    num_frames: int | None = None
    frame_rate: float | None = None
    size: int | None = None
    fit: Fit = "cover"

    def read(self, source: Source, name: str, rng: random.Random | None = None) -> Video:
        """From a place that ``rng`` draws, else from the middle of the file."""
        with VideoReader(source, background=None, name=name) as reader:
            start = 0.0
            if self.num_frames is not None:
                rate = self.frame_rate or reader.frame_rate
                slack = max(0.0, reader.duration - self.num_frames / rate)
                start = slack * (0.5 if rng is None else rng.random())
            indices, rate = reader.plan(start, None, self.frame_rate, self.num_frames)
            return Video(reader.read(indices, self.size, self.fit), rate)


class ClipFolder:
    """A folder of videos and animations (sub-folders too) with captions.

    Captions of ``a/fox.mp4`` come from ``a/fox.txt`` (every line is one), and from the rows of
    ``captions.jsonl`` or ``metadata.jsonl`` in the root:
    ``{"file_name" or "file": "a/fox.mp4", "text" or "caption": str or list of str}``.
    A clip without any is called by its file name.

    Args:
        window: arguments of `Window`.

    Raises:
        InputError: no such folder, no clips in it, or a row that does not fit.
    """

    def __init__(self, root: str | Path, **window: Any):
        self.root, self.window = Path(root), Window(**window)
        if not self.root.is_dir():
            raise InputError(f'There is no folder "{root}": give a folder of videos.')
        self.files = sorted(
            path
            for path in self.root.rglob("*")
            if path.suffix.lower() in CLIP_SUFFIXES and path.is_file()
        )
        if not self.files:
            raise InputError(f'No videos in "{root}": put MP4, WebM or animated WebP files there.')
        self.table: dict[Path, list[str]] = {}
        for table in CAPTION_TABLES:
            if (self.root / table).is_file():
                for path, captions in _table_rows(self.root / table):
                    self.table.setdefault(path, []).extend(captions)

    def __len__(self) -> int:
        return len(self.files)

    def clip(self, index: int, rng: random.Random | None = None) -> Video:
        path = self.files[index]
        return self.window.read(path, f'"{path}"', rng)

    def name(self, index: int) -> str:
        return self.captions(index)[0]

    def captions(self, index: int) -> list[str]:
        path = self.files[index]
        captions = list(self.table.get(path, ()))
        text = path.with_suffix(".txt")
        if text.is_file():
            captions += text_lines(text.read_bytes(), f'"{text}"')
        return captions or [" ".join(path.stem.replace("_", " ").replace("-", " ").split())]

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions(index))


class ClipList(ClipFolder):
    """The files that a ``.jsonl`` names beside it, each with captions (rows as in `ClipFolder`).

    Raises:
        InputError: no such list, no rows, or one that does not fit.
    """

    def __init__(self, table: str | Path, **window: Any):
        self.root, self.window = Path(table).parent, Window(**window)
        if not Path(table).is_file():
            raise InputError(f'There is no list "{table}": give a .jsonl file.')
        self.table = {}
        for path, captions in _table_rows(Path(table)):
            self.table.setdefault(path, []).extend(captions)
        self.files = list(self.table)
        if not self.files:
            raise InputError(f'"{table}" names no videos: give rows with "file" and "text".')


class ClipShards:
    """Clips and captions in WebDataset's tar shards, read at random by position.

    Members that share a name up to the first dot are one sample: a clip, and its captions in ``.txt``
    or ``.json`` as in `datasets.WebDataset`. Samples without a clip are passed over.

    Args:
        shards: a tar, a folder of them, or a brace pattern ("train-{000..007}.tar").
        window: arguments of `Window`.

    Raises:
        InputError: no such files, not plain tars, or no clips in them.
    """

    def __init__(self, shards: str | Path, **window: Any):
        self.window = Window(**window)
        self.samples: list[dict[str, tuple[Path, int, int]]] = []
        for shard in expand_shards(shards):
            for sample in index_members(shard):
                # Animations are among the pictures there.
                clips = [part for part in sample if f".{part}" in VIDEO_SUFFIXES]
                if clips or "image" in sample:
                    self.samples.append(sample | {"clip": sample[(clips or ["image"])[0]]})
        if not self.samples:
            raise InputError(f'No videos in "{shards}": its members should end in .mp4 or .webm.')

    def __len__(self) -> int:
        return len(self.samples)

    def clip(self, index: int, rng: random.Random | None = None) -> Video:
        span = self.samples[index]["clip"]
        return self.window.read(read_span(*span), f'clip {index} of "{span[0]}"', rng)

    def name(self, index: int) -> str:
        return self.captions(index)[0]

    def captions(self, index: int) -> list[str]:
        sample = self.samples[index]
        return sample_captions(sample, f'clip {index} of "{sample["clip"][0]}"')

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions(index))


class AnimatedPack:
    """The animated pack: ``animated.jsonl`` beside the ``.bin`` files of RGBA WebP.

    Args:
        root: the pack's folder.
        kinds: "real" (24 frames over the loop, 96x96) or "procedural" (16 frames, 64x64).
        splits: any of "train", "val", "test".
        num_frames: even times over the loop; None: all.
        size: in pixels; None: as stored.

    Raises:
        InputError: not such a folder, or an unknown kind or split.
    """

    def __init__(
        self,
        root: str | Path,
        kinds: Sequence[str] = ("real", "procedural"),
        splits: Sequence[str] = ("train",),
        num_frames: int | None = None,
        size: int | None = None,
    ):
        self.root, self.num_frames, self.size = Path(root), num_frames, size
        table = self.root / "animated.jsonl"
        if not table.is_file():
            raise InputError(f'No animated.jsonl in "{root}": give the animated pack\'s folder.')
        check_choices("kind", kinds, ("real", "procedural"))
        check_choices("split", splits, ("train", "val", "test"))
        self.rows: list[dict[str, Any]] = []
        for number, row in json_lines(table):
            missing = {"id", "kind", "split", "file", "offset", "length", "name", "frames"} - set(
                row
            )
            if missing:
                raise InputError(
                    f'Line {number} of "{table}" has no "{min(missing)}": it is no animated pack.'
                )
            if row["kind"] in kinds and row["split"] in splits:
                self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, index: int, rng: random.Random | None = None) -> Video:
        """The whole loop; frames that the file merged with their equal neighbours are there again."""
        row = self.rows[index]
        data = read_span(self.root / Path(row["file"]).name, row["offset"], row["length"])
        with VideoReader(data, background=None, name=f"clip {row['id']}") as reader:
            count = self.num_frames or row["frames"]
            indices, rate = reader.plan(frame_rate=count / reader.duration, num_frames=count)
            return Video(reader.read(indices, self.size), rate)

    def name(self, index: int) -> str:
        return self.rows[index]["name"]

    def captions(self, index: int) -> list[str]:
        """ "fox, animated" or "fox spinning", its name, and its keywords."""
        row = self.rows[index]
        every = [row.get("caption"), row["name"], " ".join(row.get("keywords", ()))]
        return [caption for caption in dict.fromkeys(every) if caption]

    def caption(self, index: int, rng: random.Random) -> str:
        """The caption (two of three times) or the name."""
        row = self.rows[index]
        return rng.choice([row.get("caption") or row["name"]] * 2 + [row["name"]])


MOTIONS = (
    "bouncing",
    "spinning",
    "spinning backwards",
    "shaking",
    "pulsing",
    "swinging",
    "flying in from the left",
    "flying in from the right",
    "moving right",
    "moving left",
    "falling down",
    "rising up",
    "raining",
    "floating",
    "flipping",
    "fading in",
    "zooming in",
    "zooming out",
    "circling",
    "jelly wobbling",
    "dancing",
    "rolling right",
)
RAINDROPS = 5


@dataclass(frozen=True)
class Pose:
    """Where a sticker is: centre offset in half-canvas units (y down), width (negative: mirrored) and
    height as fractions of the canvas, angle in degrees anticlockwise, opacity."""

    x: float = 0.0
    y: float = 0.0
    width: float = 0.7
    height: float = 0.7
    angle: float = 0.0
    opacity: float = 1.0


def pose(motion: str, u: float) -> Pose:
    """The pose of a motion (of `MOTIONS` but "raining") at the time u of the loop, 0 to 1."""
    s, c = math.sin(2 * math.pi * u), math.cos(2 * math.pi * u)

    def of(z: float, x: float = 0.0, y: float = 0.0, angle: float = 0.0, **more: float) -> Pose:
        return Pose(x, y, **{"width": z, "height": z, **more}, angle=angle)

    away = 0.95 * (1 - min(1.0, 1.5 * u)) ** 3
    across = -0.95 + 1.9 * u
    squash = 1 - 0.22 * max(0.0, 1 - 4 * abs(s))
    return {
        "bouncing": of(0, y=0.17 - 0.34 * abs(s), width=0.62 * (2 - squash), height=0.62 * squash),
        "spinning": of(0.66, angle=-360 * u),
        "spinning backwards": of(0.66, angle=360 * u),
        "shaking": of(0.74, 0.07 * math.sin(8 * math.pi * u)),
        "pulsing": of(0.6 + 0.16 * s),
        "swinging": of(0.7, 0.12 * s, angle=-26 * s),
        "flying in from the left": of(0.7, -away),
        "flying in from the right": of(0.7, away),
        "moving right": of(0.56, across),
        "moving left": of(0.56, -across),
        "falling down": of(0.56, y=across),
        "rising up": of(0.56, y=-across),
        "floating": of(0.7, y=0.09 * s, angle=4 * c),
        "flipping": of(0.7, width=0.7 * c),
        "fading in": of(0.72, opacity=min(1.0, 1.3 * u)),
        "zooming in": of(0.12 + 0.75 * u),
        "zooming out": of(0.87 - 0.75 * u),
        "circling": of(0.5, 0.22 * c, 0.22 * s),
        "jelly wobbling": of(0, width=0.66 * (1 + 0.17 * s), height=0.66 * (1 - 0.17 * s)),
        "dancing": of(0.64, 0.1 * s, -0.1 * abs(math.sin(4 * math.pi * u)), 14 * s),
        "rolling right": of(0.55, -0.9 + 1.8 * u, 0.1, -360 * u),
    }[motion]


def animate(
    sticker: Image.Image,
    motion: str,
    rng: random.Random,
    num_frames: int = 16,
    size: int = 64,
) -> list[Image.Image]:
    """One loop of a sticker in motion: RGBA frames of ``size`` pixels, drawn at twice that.

    Args:
        rng: of "raining": where the drops fall.

    Raises:
        InputError: an unknown motion.
    """
    check_choices("motion", (motion,), MOTIONS)
    side = 2 * size
    sticker = sticker.convert("RGBA")
    drops = [
        ((i - 2) * 0.38 + rng.uniform(-0.07, 0.07), rng.random())
        for i in range(RAINDROPS if motion == "raining" else 0)
    ]
    frames = []
    for k in range(num_frames):
        u = k / num_frames
        poses = [Pose(x, 2 * ((start + u) % 1) - 1, 0.26, 0.26) for x, start in drops]
        canvas = Image.new("RGBA", (side, side))
        for at in poses or [pose(motion, u)]:
            draw_sticker(canvas, sticker, at)
        frames.append(canvas.resize((size, size), Image.Resampling.BOX))
    return frames


def draw_sticker(canvas: Image.Image, sticker: Image.Image, at: Pose) -> None:
    """Draw an RGBA picture on a square RGBA canvas, in place."""
    side = canvas.width
    width, height = round(abs(at.width) * side), round(at.height * side)
    if not width or not height:
        return
    # Pillow's resizing and turning of RGBA pictures premultiply and divide again.
    sprite = sticker.resize((width, height), Image.Resampling.BICUBIC)
    if at.width < 0:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if at.angle % 360:
        sprite = sprite.rotate(at.angle, Image.Resampling.BICUBIC, expand=True)
    if at.opacity < 1:
        sprite.putalpha(sprite.getchannel("A").point(lambda a: round(a * at.opacity)))
    layer = Image.new("RGBA", canvas.size)
    left = round(side / 2 * (1 + at.x) - sprite.width / 2)
    top = round(side / 2 * (1 + at.y) - sprite.height / 2)
    layer.paste(sprite, (left, top))
    canvas.alpha_composite(layer)


class ProceduralAnimations:
    """Every sticker of a dataset in every motion, drawn when asked for.

    Args:
        stickers: pictures with names.
        motions: of `MOTIONS`.
        num_frames, size, frame_rate: of the clips.
        exclude: pairs (name, motion) to leave out, such as those held out for testing.

    Raises:
        InputError: an unknown motion, or no pairs left.
    """

    def __init__(
        self,
        stickers: ImageTextDataset,
        motions: Sequence[str] = MOTIONS,
        num_frames: int = 16,
        size: int = 64,
        frame_rate: float = 8.0,
        exclude: Collection[tuple[str, str]] = (),
    ):
        check_choices("motion", motions, MOTIONS)
        self.stickers, self.num_frames, self.size = stickers, num_frames, size
        self.frame_rate = frame_rate
        excluded = set(exclude)
        self.pairs = [
            (i, motion)
            for i in range(len(stickers))
            for motion in motions
            if (stickers.name(i), motion) not in excluded
        ]
        if not self.pairs:
            raise InputError("No sticker is left to move: give more stickers or motions.")

    def __len__(self) -> int:
        return len(self.pairs)

    def clip(self, index: int, rng: random.Random | None = None) -> Video:
        """RGBA; where it rains, ``rng`` lets the drops fall (default: by the index)."""
        sticker, motion = self.pairs[index]
        picture = self.stickers.image(sticker)
        frames = animate(picture, motion, rng or random.Random(index), self.num_frames, self.size)
        return Video(to_tensor(frames).transpose(0, 1).contiguous(), self.frame_rate)

    def name(self, index: int) -> str:
        """ "fox spinning", or "raining fox"."""
        sticker, motion = self.pairs[index]
        return _with_motion(self.stickers.name(sticker), motion)

    def captions(self, index: int) -> list[str]:
        sticker, motion = self.pairs[index]
        return [_with_motion(text, motion) for text in self.stickers.captions(sticker)]

    def caption(self, index: int, rng: random.Random) -> str:
        sticker, motion = self.pairs[index]
        return _with_motion(self.stickers.caption(sticker, rng), motion)


def _with_motion(text: str, motion: str) -> str:
    return f"raining {text}" if motion == "raining" else f"{text} {motion}"


def _table_rows(table: Path) -> list[tuple[Path, list[str]]]:
    """Files (below the table's folder) and captions of a .jsonl."""
    rows = []
    for number, row in json_lines(table):
        file, captions = row.get("file_name", row.get("file")), row_captions(row)
        if not isinstance(file, str) or not captions:
            raise InputError(f'Line {number} of "{table}" needs "file_name" and "text".')
        path = table.parent / file
        if not path.is_file() or not path.resolve().is_relative_to(table.parent.resolve()):
            raise InputError(
                f'Line {number} of "{table}" names "{file}", which is no file in this folder.'
            )
        rows.append((path, captions))
    return rows
