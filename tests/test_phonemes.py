from __future__ import annotations

import itertools

import pytest

from tessera.modalities.errors import InputError
from tessera.modalities.phonemes import PAUSE, PHONES, LetterToSound, pack, phonemise, pronounce
from tessera.modalities.spoken_text import (
    MAX_SENTENCE_CHARACTERS,
    cardinal,
    clean_text,
    ordinal,
    read_sentence,
    split_sentences,
    year,
)
from tessera.training.lexicon import align, edit_distance, letter_to_sound


def spoken(text: str) -> str:
    sentences = split_sentences(clean_text(text))
    return " | ".join(
        " ".join(word for written in read_sentence(s) for word in written.spoken).strip(" ,")
        for s in sentences
    )


def said(text: str) -> str:
    return " ".join(phone for sentence in phonemise(text) for phone in sentence.phones)


@pytest.mark.parametrize(
    ("text", "phones"),
    [  # Festival Lite's readings.
        ("It's the aurora borealis.", "ih t s dh iy er ao r ax b ao r iy ae l ax s"),
        ("He came down to business, Phil.", "hh iy k ey m d aw n t ax b ih z n ax s pau f ih l"),
        ("Pearce's eyes; Eileen's double", "p ih r s ax z ay z pau ay l iy n z d ah b ax l"),
        ("Close the wolf-dog", "k l ow s dh ax w uh l f d ao g"),
        ("God bless 'em", "g aa d b l eh s eh m"),
        ("A, B", "ax pau b iy"),
    ],
)
def test_phones_of_sentences(text, phones):
    assert said(text) == f"pau {phones} pau"


def test_every_phone_knows_its_word():
    (sentence,) = phonemise("“Pay $5, Dr. Who”, she said…")
    assert sentence.words == ("Pay", "$5", "Dr.", "Who", "she", "said")
    for word, start in zip(sentence.words, sentence.starts, strict=True):
        assert sentence.text[start : start + len(word)] == word
    of_money = [p for p, w in zip(sentence.phones, sentence.word_of, strict=True) if w == 1]
    assert " ".join(of_money) == "f ay v d aa l er z"
    assert all(
        (p == PAUSE) == (w == -1) for p, w in zip(sentence.phones, sentence.word_of, strict=True)
    )
    assert list(dict.fromkeys(w for w in sentence.word_of if w >= 0)) == list(range(6))
    assert set(sentence.phones) <= set(PHONES) and len(set(PHONES)) == 41


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('"Stop!" he said. "Why?" It is 3.5 m.', ['"Stop!" he said.', '"Why?"', "It is 3.5 m."]),
        ("Dr. J. R. Smith vs. Mr. Fox, e.g. Ann.", ["Dr. J. R. Smith vs. Mr. Fox, e.g. Ann."]),
        ("It was I. Is it? No. No. 5 is.", ["It was I.", "Is it?", "No.", "No. 5 is."]),
        ("a title\n\nthe text\ngoes on", ["a title", "the text goes on"]),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_long_sentences_are_cut_at_commas_and_spaces():
    text = "so it went on and on, " * 60 + "x" * 600
    parts = split_sentences(text)
    assert max(map(len, parts)) <= MAX_SENTENCE_CHARACTERS
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")
    assert all(part.endswith(",") for part in parts[:5])


def test_numbers():
    assert cardinal(0) == "zero" and cardinal(1_000_013) == "one million thirteen"
    assert cardinal("007") == "zero zero seven"
    assert cardinal("1" * 22) == " ".join(["one"] * 22)
    assert [ordinal(n) for n in (1, 12, 20, 103)] == [
        "first",
        "twelfth",
        "twentieth",
        "one hundred third",
    ]
    assert year(1905) == "nineteen oh five" and year(2004) == "two thousand four"
    assert year(1900) == "nineteen hundred" and year(2024) == "twenty twenty four"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,500 of 3.14, -3, 1984, 7th", "one thousand five hundred of three point one four , "
         "minus three , nineteen eighty four , seventh"),
        ("the 1990s and '80s", "the nineteen nineties and eighties"),
        ("$1, $5.50, £3 million, 5€", "one dollar , five dollars and fifty cents , "
         "three million pounds , five euros"),
        ("50% of 1 km at 60 km/h", "fifty percent of one kilometer at sixty kilometers per hour"),
        ("5-10 kg, 20°C, 3 m²", "five to ten kilograms , twenty degrees celsius , three square meters"),
        ("1/2, 3/4, 2½", "one half , three quarters , two and a half"),
        ("March 3rd, 2024", "march third , twenty twenty four"),
        ("3 Mar. 1999", "the third of march , nineteen ninety nine"),
        ("2024-03-05 12/25/99", "march fifth , twenty twenty four december twenty fifth , "
         "nineteen ninety nine"),
        ("at 3:05, 3:00 or 5pm", "at three oh five , three o'clock or five p. m."),
        ("call 555-1234", "call five five five , one two three four"),
        ("Henry VIII and World War II", "henry the eighth and world war two"),
        ("George V; George I think; Vitamin C", "george the fifth , george i think , vitamin c."),
        ("Dr. Ann of St. James St. in St. Louis", "doctor ann of saint james street in saint louis"),
        ("me@ab.com, https://www.ab.org/x", "me at ab dot com , w. w. w. dot ab dot org slash x."),
        ("U.S.A., NASA & CDs, i.e. A+B #1", "u. s. a. , NASA and CD 's , that is a plus b. number one"),
        ("MP3, v1.2.3 and node.js", "MP three , v. one point two point three and node dot js"),
        ("iPhone of McDonald on YouTube", "i phone of mcdonald on you tube"),
        ("Crème Straße, π and 5 µm", "creme strasse , pi and five micrometers"),
        ("I ❤️ it 😀!", "i it"),
        ("IT WAS US AND THEM", "it was us and them"),
        ("ß, ﬁ, x², C½ and May 45", "ss , fi , x. squared , c. one half and may forty five"),
        ("co\u00adop e\u0301t\u00e9 ３", "coop ete three"),
    ],
)  # fmt: skip
def test_spoken_words(text, words):
    assert spoken(text) == words


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("FBI", "eh f b iy ay"),  # Spelt.
        ("NASA", "n ae s ax"),  # Read.
        ("XQZT", "eh k s k y uw z iy t iy"),
        ("US", "y uw eh s"),
        ("gyroscopes", "jh ay r ax s k ow p s"),
        ("kettledrummed", "k eh t ax l d r ah m d"),  # Two words, one with an ending.
        ("snorkled", "s n ao r k ax l d"),
    ],
)
def test_words_outside_the_dictionary(word, phones):
    assert " ".join(pronounce(word)) == phones


def test_any_letters_have_a_sound():
    for letters in itertools.product("aehgtwxz'", repeat=4):
        word = "".join(letters)
        if word.strip("'"):
            assert set(pronounce(word)) <= set(PHONES), word
            assert pronounce(word)


@pytest.mark.parametrize("text", ["", " \n", "...!?", "😀😀", "\x00", "-- (*)"])
def test_nothing_to_speak(text):
    with pytest.raises(InputError, match="nothing to speak"):
        phonemise(text)


@pytest.mark.parametrize(
    ("text", "name"), [("Привет", "cyrillic"), ("so 世界", "cjk"), ("λόγος", "greek")]
)
def test_other_alphabets_are_named(text, name):
    with pytest.raises(InputError, match=f"{name}.*cannot be spoken"):
        phonemise(text)


@pytest.mark.parametrize("unit", ["a", "a.", "1/", "1,", "a@", "A. ", "(555) ", "-1", "http://a "])
def test_no_pattern_runs_away(unit):
    text = (unit * 100_000)[:100_000]
    sentences = phonemise(text)
    assert sum(len(sentence.text) for sentence in sentences) >= 0.9 * len(text.replace(" ", ""))


def test_trees_learn_letters_from_a_dictionary():
    words = {}  # A silent letter ("ck") and one with two sounds ("x").
    for first, vowel in itertools.product("bdglnt", "aeio"):
        words[f"{first}{vowel}ck"] = f"{first}{vowel}k".upper()
        words[f"{first}{vowel}x"] = f"{first}{vowel}ks".upper()
    aligned = align(list(words.items()), sample=1)
    assert len(aligned) == len(words)
    assert all("".join(chunks) == words[word] for word, chunks in aligned.items())
    assert all(len(chunks) == len(word) for word, chunks in aligned.items())
    assert set(aligned["dock"][2:]) == {"K", ""} and "" not in aligned["dox"]

    aligned = {"ace": ("E", "S", ""), "cat": ("K", "A", "T"), "ice": ("I", "S", "")}
    aligned |= {"cab": ("K", "A", "B"), "act": ("A", "K", "T")}
    rules = LetterToSound(letter_to_sound(aligned, gain=0.1))
    assert all(pack(rules(word)) == "".join(chunks) for word, chunks in aligned.items())
    assert pack(rules("cabice")) == "KABIS"


def test_tree_text():
    # Chunks: none, K, S. The c is soft before e (question 4: the next letter).
    rules = LetterToSound("- L T\nc 4e =2 =1\ne =0")
    assert rules("ce") == rules("cec")[:1] and rules("ce") != rules("c")
    assert edit_distance(list("kitten"), list("sitting")) == 3
