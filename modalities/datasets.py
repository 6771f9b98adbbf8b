"""Pictures with captions: the sticker pack, and what users have on disk.

Every dataset answers ``len()``, ``image(i) -> PIL RGBA``, ``name(i) -> str`` and
``caption(i, rng) -> str``.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .errors import InputError

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


class StickerPack:
    """Sticker art of nine styles, 128x128 RGBA (``captions.jsonl`` beside one ``.bin`` a style).

    Args:
        root: the pack's folder.
        styles: styles to keep; default: the eight under permissive licences.
        splits: any of "train", "val", "test".
        exclude_groups: Unicode groups to leave out.
        tones: keep skin-tone variants.
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
        unknown = set(styles) - set(STYLE_WORDS)
        if unknown:
            raise InputError(
                f"Unknown style {sorted(unknown)[0]!r}: choose from {', '.join(STYLE_WORDS)}."
            )
        self.stickers: list[Sticker] = []
        with open(table, encoding="utf8") as lines:
            for line in lines:
                row = json.loads(line)
                row["keywords"] = tuple(row["keywords"])
                row["tone"] = bool(row.get("tone"))
                sticker = Sticker(**{key: row[key] for key in Sticker.__dataclass_fields__})
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
        with open(self.root / f"{sticker.style}.bin", "rb") as file:
            file.seek(sticker.offset)
            return Image.open(io.BytesIO(file.read(sticker.length))).convert("RGBA")

    def name(self, index: int) -> str:
        return self.stickers[index].name

    def caption(self, index: int, rng: random.Random) -> str:
        """One of the ways people ask for this sticker: its name, keywords, style or emoji."""
        sticker = self.stickers[index]
        style = STYLE_WORDS[sticker.style]
        words = rng.sample(sticker.keywords, min(len(sticker.keywords), rng.randint(1, 3)))
        emoji = "".join(
            chr(int(code, 16)) for code in sticker.unicode.split("-") if ":" not in code
        ) if not sticker.unicode.startswith("g:") else sticker.name
        choices = [
            sticker.name,
            f"{sticker.name}, {style}",
            f"a {style} {sticker.name}",
            f"{sticker.name} {' '.join(words)}".strip(),
            " ".join(words) or sticker.name,
            emoji,
        ]
        return rng.choices(choices, weights=[4, 6, 2, 2, 1, 0.5])[0]
