"""The many ways people ask for the same picture."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Protocol

from ..modalities.datasets import STYLE_WORDS, ImageTextDataset, Sticker, StickerPack

ARTICLES = ("a", "an", "the", "one", "my")
OPENERS = ("a picture of", "a sticker of", "an icon of", "drawing of", "emoji", "please draw")


class Captions(Protocol):
    """What training asks of a dataset's texts.

    Attributes:
        concepts: what each picture shows; a caption describes every picture of its concept, but
            only those of its style when it names the style.
        styles: in which style.
    """

    concepts: list[str]
    styles: list[str]

    def draw(self, index: int, rng: random.Random) -> tuple[str, bool]:
        """A caption of a picture, and whether it names the style."""

    def texts(self) -> Iterator[str]:
        """Texts to train a BPE on."""


def open_captions(
    dataset: ImageTextDataset, translated: float = 0.15, word_dropout: float = 0.1
) -> Captions:
    """Captions of the sticker pack, or of any other dataset.

    Args:
        translated: chance of a sticker's name in another language.
        word_dropout: chance of losing each word, so that free phrasings work.
    """
    if isinstance(dataset, StickerPack):
        return StickerCaptions(dataset, translated, word_dropout)
    return DatasetCaptions(dataset, word_dropout)


def drop_words(words: list[str], chance: float, rng: random.Random) -> list[str]:
    """Lose each word by chance, but never all of them."""
    kept = [word for word in words if rng.random() >= chance]
    return kept or words


class DatasetCaptions:
    """The dataset's own captions; pictures with the same first caption show the same concept.

    Raises:
        InputError: a picture without a caption, found now rather than in the middle of a run.
    """

    def __init__(self, dataset: ImageTextDataset, word_dropout: float):
        self.dataset = dataset
        self.word_dropout = word_dropout
        self.concepts = [dataset.name(index) for index in range(len(dataset))]
        self.styles = [""] * len(dataset)

    def draw(self, index: int, rng: random.Random) -> tuple[str, bool]:
        words = self.dataset.caption(index, rng).split()
        return " ".join(drop_words(words, self.word_dropout, rng)), False

    def texts(self) -> Iterator[str]:
        """Of each picture the first caption and one drawn among all of its captions."""
        for index, name in enumerate(self.concepts):
            yield name
            yield self.dataset.caption(index, random.Random(index))


class StickerCaptions:
    """Random captions of a sticker: name, keywords, style word, emoji, other languages."""

    def __init__(self, dataset: StickerPack, translated: float, word_dropout: float):
        self.dataset = dataset
        self.translated = translated
        self.word_dropout = word_dropout
        self.concepts = [sticker.base for sticker in dataset.stickers]
        self.styles = [sticker.style for sticker in dataset.stickers]

    def draw(self, index: int, rng: random.Random) -> tuple[str, bool]:
        sticker = self.dataset.stickers[index]
        style = STYLE_WORDS[sticker.style]
        others = list(self.dataset.translations(index).values())
        if others and rng.random() < self.translated:
            caption = rng.choice(others)
        else:
            caption = self._english(sticker, rng)
        if rng.random() < 0.5:
            return (f"{caption}, {style}" if rng.random() < 0.7 else f"{style} {caption}"), True
        return caption, False

    def _english(self, sticker: Sticker, rng: random.Random) -> str:
        kind = rng.random()
        keywords = rng.sample(sticker.keywords, min(len(sticker.keywords), rng.randint(1, 3)))
        if kind < 0.05 and not sticker.unicode.startswith("g:"):
            return sticker.emoji
        if kind < 0.2 and keywords:
            words = keywords
        elif kind < 0.35:
            words = [*sticker.name.split(), *keywords]
        else:
            words = sticker.name.split()
        words = " ".join(words).replace(",", " ").replace(":", " ").split()
        words = drop_words(words, self.word_dropout, rng)
        if rng.random() < 0.1:
            rng.shuffle(words)
        if rng.random() < 0.25:
            words.insert(0, rng.choice(ARTICLES))
        if rng.random() < 0.1:
            words.insert(0, rng.choice(OPENERS))
        return " ".join(words)

    def texts(self) -> Iterator[str]:
        """Every name and keyword of each sticker; each concept's other languages once."""
        seen = set()
        for index, sticker in enumerate(self.dataset.stickers):
            yield f"{sticker.name}, {STYLE_WORDS[sticker.style]} {' '.join(sticker.keywords)}"
            if sticker.unicode not in seen:
                seen.add(sticker.unicode)
                yield from self.dataset.translations(index).values()
        yield " ".join((*ARTICLES, *OPENERS))
