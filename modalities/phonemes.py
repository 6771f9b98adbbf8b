"""English text to phones: what a text-to-speech model reads.

``phonemise("It's 5 p.m.")`` gives sentences of words and phones. The phones are those of Festival
Lite's US English voices: the CMU dictionary's in lower case, without stress, AH0 as ``ax``, and
``pau`` for a pause. Words come from the CMU dictionary (github.com/cmusphinx/cmudict, BSD); unknown
ones from their parts (endings, compounds) or from letter-to-sound trees (training/lexicon.py).
Post-lexical habits follow Festival Lite too, whose readings the voices are trained on.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import InputError
from .spoken_text import PAUSE_MARK, clean_text, read_sentence, split_sentences
from .text import printable


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PAUSE = "pau"
PHONES = _words(
    "aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw "
    "v w y z zh pau"
)
"""All 41 phones; a model's vocabulary is their order here."""

VOWELS = _words("aa ae ah ao aw ax ay eh er ey ih iy ow oy uh uw")
LEXICON = Path(__file__).with_name("english.lexicon.xz")
RULES = Path(__file__).with_name("english.rules.xz")

_SIBILANTS = _words("s z sh zh ch jh")
_VOICELESS = _words("p t k f th")
_CODES = {phone: chr(ord("A") + i) for i, phone in enumerate(PHONES)}
_PHONE_OF = {code: phone for phone, code in _CODES.items()}
_ENDINGS = {
    "'s": ("",),
    "s": ("",),
    "es": ("",),
    "ies": ("y",),
    "ied": ("y",),
    "ed": ("", "e"),
    "ing": ("", "e"),
    "er": ("", "e"),
    "ly": ("",),
    "ness": ("", "y"),
    "less": ("",),
    "ful": ("",),
}
"""Ending -> what its stem may have lost."""

_ENDING_PHONES = {
    "ing": ("ih", "ng"),
    "er": ("er",),
    "ly": ("l", "iy"),
    "ness": ("n", "ax", "s"),
    "less": ("l", "ax", "s"),
    "ful": ("f", "ax", "l"),
}
_READINGS = {
    "a": "ax",
    "and": "ae n d",
    "to": "t ax",
    "'em": "eh m",
    "'n": "ax n",
    "o'": "ow",
    "miz": "m ih z",
    "missus": "m ih s ax s",
    "raw": "r ao",
    "here": "hh ih r",
    "hear": "hh ih r",
    "ear": "ih r",
    "you're": "y ao r",
    "even": "iy v ax n",
    "poor": "p uh r",
    "weren't": "w er n t",
    "wouldn't": "w uh d n t",
    "oh": "ow",
}
"""Words that Festival Lite reads otherwise than the dictionary's first entry."""

_SPELT = frozenset(("US", "IT", "ID", "AM", "PM", "TV", "UN", "EU", "OK", "IP", "AD", "PA", "IQ"))
"""Acronyms that are spelt although their letters are a word."""


@dataclass(frozen=True)
class Sentence:
    """One spoken sentence.

    Attributes:
        text: the sentence, with plain quotes and single spaces.
        words: its written words ("$5" is one word).
        starts: index in ``text`` of each word's first character.
        phones: names from `PHONES`; the first and the last are pauses.
        word_of: for each phone the index of its word, -1 for a pause.
    """

    text: str
    words: tuple[str, ...]
    starts: tuple[int, ...]
    phones: tuple[str, ...]
    word_of: tuple[int, ...]


def phonemise(text: str) -> list[Sentence]:
    """Text of any length to sentences of phones, in time linear in its length.

    Raises:
        InputError: nothing in the text can be spoken (it is empty, or punctuation and pictures
            only), or it has letters of another alphabet.
    """
    sentences = [_read(sentence) for sentence in split_sentences(clean_text(text))]
    sentences = [sentence for sentence in sentences if sentence.words]
    if not sentences:
        shown = " ".join(printable(text).split())[:40]
        raise InputError(
            f'There is nothing to speak in "{shown}": write at least one word or number.'
        )
    return sentences


def _read(sentence: str) -> Sentence:
    words: list[str] = []
    starts: list[int] = []
    phones, word_of, previous = [PAUSE], [-1], PAUSE_MARK
    for written in read_sentence(sentence):
        if any(word != PAUSE_MARK for word in written.spoken):
            words.append(written.text)
            starts.append(written.start)
        for word in written.spoken:
            said = (PAUSE,) if word == PAUSE_MARK else pronounce(word)
            if previous == "the" and said[0] in VOWELS:
                phones[-1] = "iy"
            if said != (PAUSE,):
                phones += said
                word_of += [len(words) - 1] * len(said)
            elif phones[-1] != PAUSE:
                phones.append(PAUSE)
                word_of.append(-1)
            previous = word
    if phones[-1] != PAUSE:
        phones.append(PAUSE)
        word_of.append(-1)
    return Sentence(sentence, tuple(words), tuple(starts), tuple(phones), tuple(word_of))


def pronounce(word: str) -> tuple[str, ...]:
    """Phones of one spoken word: letters a to z and apostrophes, as `WrittenWord.spoken` has it.

    Looked up in the dictionary; else as its parts; else by letter-to-sound rules. Capitals are read
    as a word if the dictionary has one, or if they have a vowel and more than four letters; else
    letter by letter.
    """
    if word in _READINGS:
        return tuple(_READINGS[word].split())
    if len(word) > 1 and word.isupper():
        letters = word in _SPELT or (
            word.lower() not in _lexicon() and (len(word) < 5 or not re.search("[AEIOUY]", word))
        )
        word = word.lower()
        if letters:
            return _spelt(word)
    for form in (word, word.strip("'")):
        if said := _known(form) or _from_parts(form):
            return said
    letters = word.replace("'", "")
    return _letter_to_sound()(letters) or _spelt(letters)


def _spelt(letters: str) -> tuple[str, ...]:
    return tuple(phone for letter in letters for phone in _known(letter + "."))


def _known(word: str) -> tuple[str, ...] | None:
    packed = _lexicon().get(word)
    return packed and tuple(_PHONE_OF[code] for code in packed)


def _from_parts(word: str) -> tuple[str, ...] | None:
    """An unknown word as a known one with an ending, or as two known ones."""
    for ending, stems in _ENDINGS.items():
        if word.endswith(ending) and len(word) > len(ending) + 2:
            bare = word[: -len(ending)]
            for stem in (bare + addition for addition in stems):
                if said := _known(stem):
                    return said + _ending(ending, said[-1])
            doubled = len(bare) > 3 and bare[-1] == bare[-2] and "e" in stems
            if doubled and (said := _known(bare[:-1])):  # stopped
                return said + _ending(ending, said[-1])
    for i in range(len(word) - 3, 2, -1):
        if (first := _known(word[:i])) and (second := _known(word[i:])):
            return first + second
    return None


def _ending(ending: str, last: str) -> tuple[str, ...]:
    if ending in ("ed", "ied"):
        if last in ("t", "d"):
            return ("ax", "d")
        return ("t",) if last in _VOICELESS or last in ("s", "sh", "ch") else ("d",)
    if ending in ("'s", "s", "es", "ies"):
        if last in _SIBILANTS:
            return ("ax", "z")
        return ("s",) if last in _VOICELESS else ("z",)
    return _ENDING_PHONES[ending]


# Data files


def pack(phones: Iterable[str]) -> str:
    """Phones as one character each, as the data files have them."""
    return "".join(_CODES[phone] for phone in phones)


@cache
def _lexicon() -> dict[str, str]:
    lines = lzma.decompress(LEXICON.read_bytes()).decode("utf8").split("\n")
    return dict(line.split(" ") for line in lines)


@cache
def _letter_to_sound() -> LetterToSound:
    return LetterToSound(lzma.decompress(RULES.read_bytes()).decode("utf8"))


WINDOW = 4
"""Letters that a tree looks at on each side."""

FOLLOWING = 2
"""Letters behind whose phones a tree looks at."""

_EDGE = "#"


def questions(word: str, i: int, following: Sequence[str]) -> list[str]:
    """What a tree can ask about letter ``i``: its neighbours, and the phones of those behind it."""
    padded = _EDGE * WINDOW + word + _EDGE * WINDOW
    letters = padded[i : i + WINDOW] + padded[i + WINDOW + 1 : i + 2 * WINDOW + 1]
    sounds = [chunk or "-" for chunk in following]
    return [*letters, *sounds, *_EDGE * (FOLLOWING - len(sounds))]


class LetterToSound:
    """One decision tree a letter, asked from the last letter to the first.

    Args:
        text: first line: the chunks (0 to 2 packed phones) that a letter can stand for, "-" for
            none. Then a line a letter: the letter and its tree in preorder, where ``3e`` asks
            whether question 3 is answered by "e" (yes first) and ``=7`` answers with chunk 7.
    """

    def __init__(self, text: str) -> None:
        chunks, *trees = text.split("\n")
        self._chunks = [chunk.strip("-") for chunk in chunks.split(" ")]
        self._trees = {line[0]: self._parse(line[2:].split(" ")) for line in trees}

    def _parse(self, nodes: list[str]) -> tuple | str:
        stack: list[tuple | str] = []
        for node in reversed(nodes):
            if node[0] == "=":
                stack.append(self._chunks[int(node[1:])])
            else:
                stack.append((int(node[0]), node[1:], stack.pop(), stack.pop()))
        return stack.pop()

    def __call__(self, word: str) -> tuple[str, ...]:
        """Phones of a word of the letters a to z."""
        chunks: list[str] = []
        for i in reversed(range(len(word))):
            node = self._trees[word[i]]
            answers = questions(word, i, chunks[-FOLLOWING:][::-1])
            while isinstance(node, tuple):
                question, value, yes, no = node
                node = yes if answers[question] == value else no
            chunks.append(node)
        return tuple(_PHONE_OF[code] for code in "".join(reversed(chunks)))
