"""The many ways people ask for the same sticker."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator

from ..modalities.datasets import STYLE_WORDS, StickerPack

ARTICLES = ("a", "an", "the", "one", "my")
OPENERS = ("a picture of", "a sticker of", "an icon of", "drawing of", "emoji", "please draw")


class StickerCaptions:
    """Random captions of a sticker: name, keywords, style word, emoji, other languages.

    Args:
        dataset: the pack; ``names_i18n.json.gz`` beside its table gives the other languages.
        translated: chance of a name in another language.
        word_dropout: chance of losing each word, so that free phrasings work.
    """

    def __init__(self, dataset: StickerPack, translated: float = 0.15, word_dropout: float = 0.1):
        self.dataset = dataset
        self.translated = translated
        self.word_dropout = word_dropout
        with gzip.open(dataset.root / "names_i18n.json.gz", "rt", encoding="utf8") as file:
            self.names: dict[str, dict[str, str]] = json.load(file)

    def draw(self, index: int, rng: random.Random) -> tuple[str, bool]:
        """A caption, and whether it names the style."""
        sticker = self.dataset.stickers[index]
        style = STYLE_WORDS[sticker.style]
        others = list(self.names.get(sticker.unicode, {}).values())
        if others and rng.random() < self.translated:
            caption = rng.choice(others)
        else:
            caption = self._english(sticker, rng)
        if rng.random() < 0.5:
            return (f"{caption}, {style}" if rng.random() < 0.7 else f"{style} {caption}"), True
        return caption, False

    def _english(self, sticker, rng: random.Random) -> str:
        kind = rng.random()
        keywords = rng.sample(sticker.keywords, min(len(sticker.keywords), rng.randint(1, 3)))
        if kind < 0.05 and not sticker.unicode.startswith("g:"):
            return "".join(chr(int(code, 16)) for code in sticker.unicode.split("-"))
        if kind < 0.2 and keywords:
            words = keywords
        elif kind < 0.35:
            words = [*sticker.name.split(), *keywords]
        else:
            words = sticker.name.split()
        words = " ".join(words).replace(",", " ").replace(":", " ").split()
        kept = [word for word in words if rng.random() >= self.word_dropout]
        words = kept or words
        if rng.random() < 0.1:
            rng.shuffle(words)
        if rng.random() < 0.25:
            words.insert(0, rng.choice(ARTICLES))
        if rng.random() < 0.1:
            words.insert(0, rng.choice(OPENERS))
        return " ".join(words)

    def texts(self) -> Iterator[str]:
        """Every text once, English repeated, to train a BPE on."""
        for sticker in self.dataset.stickers:
            yield f"{sticker.name}, {STYLE_WORDS[sticker.style]} {' '.join(sticker.keywords)}"
        wanted = {sticker.unicode for sticker in self.dataset.stickers}
        for unicode, names in self.names.items():
            if unicode in wanted:
                yield from names.values()
        yield " ".join((*ARTICLES, *OPENERS))
