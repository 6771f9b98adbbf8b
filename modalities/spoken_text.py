"""English text as it is read aloud: sentences, and the words to say for each written word.

Numbers, dates, times, money, units, abbreviations, symbols, addresses and Roman numerals become
words. Emoji and other pictures are passed over. Every pattern is bounded, so that the time grows
with the length of the text only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from .errors import InputError
from .text import printable

MAX_SENTENCE_CHARACTERS = 250
"""Longer sentences are cut at a comma or space: no voice keeps one breath for longer."""

PAUSE_MARK = ","
"""Stands between the spoken words where the reader pauses."""


@dataclass(frozen=True)
class WrittenWord:
    """A word of a sentence as written, and what is said for it.

    Attributes:
        text: the written form, for example "$5".
        start: index of its first character in the sentence.
        spoken: lower-case words ("five", "dollars"); a letter's name is the letter with a full stop
            ("b."); capitals ("NASA") are an acronym, spelt or read as the dictionary has it;
            "," is a pause.
    """

    text: str
    start: int
    spoken: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Numbers

_SMALL = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = _words("_ _ twenty thirty forty fifty sixty seventy eighty ninety")
_SCALES = _words("_ thousand million billion trillion quadrillion quintillion")
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_LONGEST_CARDINAL = 3 * len(_SCALES)


def digits(text: str) -> str:
    """``"042"`` -> ``"zero four two"``; other characters are left out."""
    return " ".join(_SMALL[int(c)] for c in text if c.isdecimal())


def cardinal(number: int | str) -> str:
    """``1204`` -> ``"one thousand two hundred four"``.

    Digit by digit from 22 digits on, and after a leading zero (``"007"``).
    """
    text = str(number)
    if len(text) > _LONGEST_CARDINAL or (len(text) > 1 and text[0] == "0"):
        return digits(text)
    value, words = int(text), []
    if value == 0:
        return "zero"
    groups = []
    while value:
        value, group = divmod(value, 1000)
        groups.append(group)
    for scale, group in reversed(list(enumerate(groups))):
        if group >= 100:
            words += [_SMALL[group // 100], "hundred"]
        rest = group % 100
        if rest >= 20:
            words.append(_TENS[rest // 10])
            rest %= 10
        if rest:
            words.append(_SMALL[rest])
        if group and scale:
            words.append(_SCALES[scale])
    return " ".join(words)


def ordinal(number: int | str) -> str:
    """``22`` -> ``"twenty second"``."""
    *front, last = cardinal(number).split()
    last = last[:-1] + "ieth" if last.endswith("y") else _ORDINALS.get(last, last + "th")
    return " ".join([*front, last])


def year(number: int) -> str:
    """``1905`` -> ``"nineteen oh five"``, ``2024`` -> ``"twenty twenty four"``."""
    century, rest = divmod(number, 100)
    if not 1000 <= number < 10000 or number % 1000 < 10:
        return cardinal(number)
    if rest == 0:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def _number(text: str) -> str:
    """A number as written: thousands commas, decimals, sign."""
    sign = {"-": "minus ", "+": "plus "}.get(text[:1], "")
    whole, _, decimals = text.lstrip("+-").replace(",", "").partition(".")
    words = cardinal(whole) if whole else "zero"
    return f"{sign}{words}" + (f" point {digits(decimals)}" if decimals else "")


def _number_or_year(text: str) -> str:
    return year(int(text)) if re.fullmatch(r"1[1-9]\d\d|20\d\d", text) else _number(text)


def _range(text: str, read: Callable[[str], str] = _number) -> str:
    low, _, high = text.partition("-") if text[0] != "-" else (text, "", "")
    return f"{read(low)} to {read(high)}" if high else read(text)


def _plural(word: str) -> str:
    if word.endswith("y"):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("x", "s")) else "s")


def _fraction(top: int, bottom: int) -> str:
    if bottom > 100 or bottom < 2:
        return f"{cardinal(top)} over {cardinal(bottom)}"
    name = {2: "half", 4: "quarter"}.get(bottom) or ordinal(bottom)
    if top != 1:
        name = "halves" if bottom == 2 else name + "s"
    return f"{cardinal(top)} {name}"


# Tables

_MONTHS = _words(
    "january february march april may june july august september october november december"
)
_SHORT_MONTHS = (*(month[:3].title() for month in _MONTHS), "Sept")
_DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
_UNITS = {
    "km/h": ("kilometer per hour", "kilometers per hour"),
    "m/s": ("meter per second", "meters per second"),
    "mph": ("mile per hour", "miles per hour"),
    "km²": ("square kilometer", "square kilometers"),
    "m²": ("square meter", "square meters"),
    "m³": ("cubic meter", "cubic meters"),
    "ft": ("foot", "feet"),
    "Hz": ("hertz", "hertz"),
    "kHz": ("kilohertz", "kilohertz"),
    "MHz": ("megahertz", "megahertz"),
    "GHz": ("gigahertz", "gigahertz"),
    "%": ("percent", "percent"),
    "‰": ("per mille", "per mille"),
    "°C": ("degree celsius", "degrees celsius"),
    "°F": ("degree fahrenheit", "degrees fahrenheit"),
    "lb": ("pound", "pounds"),
    "lbs": ("pound", "pounds"),
} | {
    symbol: (name, name + "s")
    for symbol, name in {
        "km": "kilometer",
        "m": "meter",
        "cm": "centimeter",
        "mm": "millimeter",
        "μm": "micrometer",
        "mi": "mile",
        "kg": "kilogram",
        "g": "gram",
        "mg": "milligram",
        "oz": "ounce",
        "L": "liter",
        "l": "liter",
        "ml": "milliliter",
        "mL": "milliliter",
        "s": "second",
        "ms": "millisecond",
        "min": "minute",
        "h": "hour",
        "hr": "hour",
        "hrs": "hour",
        "kB": "kilobyte",
        "KB": "kilobyte",
        "MB": "megabyte",
        "GB": "gigabyte",
        "TB": "terabyte",
        "W": "watt",
        "kW": "kilowatt",
        "kWh": "kilowatt hour",
        "V": "volt",
        "°": "degree",
    }.items()
}
_CURRENCIES = {
    "$": ("dollar", "cent"),
    "€": ("euro", "cent"),
    "£": ("pound", "penny"),
    "¥": ("yen", ""),
    "₹": ("rupee", "paisa"),
}
_MONEY_SCALES = {"k": "thousand", "m": "million", "b": "billion", "mn": "million", "bn": "billion"}
_ABBREVIATIONS = {
    "mr": "mister",
    "mrs": "missus",
    "ms": "miz",
    "dr": "doctor",
    "prof": "professor",
    "gen": "general",
    "sen": "senator",
    "rep": "representative",
    "gov": "governor",
    "capt": "captain",
    "lt": "lieutenant",
    "col": "colonel",
    "sgt": "sergeant",
    "rev": "reverend",
    "hon": "honorable",
    "pres": "president",
    "jr": "junior",
    "sr": "senior",
    "vs": "versus",
    "approx": "approximately",
    "dept": "department",
    "est": "established",
    "inc": "incorporated",
    "ltd": "limited",
    "co": "company",
    "corp": "corporation",
    "vol": "volume",
    "fig": "figure",
    "ave": "avenue",
    "blvd": "boulevard",
    "rd": "road",
    "mt": "mount",
    "ft": "fort",
    "etc": "etc",
    "e.g": "for example",
    "i.e": "that is",
    "a.m": "a. m.",
    "p.m": "p. m.",
    "ph.d": "p. h. d.",
} | {name[:3]: name for name in (*_MONTHS, *_DAYS) if name != "may"}
_ABBREVIATIONS |= {"sept": "september", "tues": "tuesday", "thurs": "thursday"}
_WORDS_TOO = {"gen", "rep", "hon", "pres", "est", "co", "fig", "sun", "mar", "sat", "wed", "ms"}
_TITLES = _words(
    "mr mrs ms dr prof gen sen rep gov capt lt col sgt rev hon pres st mt ft vs e.g i.e fig vol "
    "approx"
)
_RULERS = _words(
    "alexander alfonso benedict boniface catherine charles christian clement constantine edward "
    "elizabeth eugene ferdinand francis frederick george gregory gustav harold henry innocent ivan "
    "james john julius juan leo leopold louis mary max maximilian napoleon nicholas otto "
    "paul peter philip pius ptolemy ramses richard robert rudolf sixtus stephen thutmose umberto "
    "urban victor victoria wilhelm willem william"
)
_NUMBERED = _words(
    "act appendix bowl chapter class episode figure grade level mark no. number page part phase "
    "rocky section stage step table type unit volume war"
)
_SYMBOLS = {
    "&": "and",
    "+": "plus",
    "=": "equals",
    "@": "at",
    "#": "hashtag",
    "%": "percent",
    "°": "degrees",
    "×": "times",
    "÷": "divided by",
    "<": "less than",
    ">": "greater than",
    "≤": "less than or equal to",
    "≥": "greater than or equal to",
    "≠": "not equal to",
    "±": "plus or minus",
    "≈": "about",
    "~": "about",
    "§": "section",
    "/": "slash",
    "\\": "backslash",
    "$": "dollars",
    "€": "euros",
    "£": "pounds",
    "²": "squared",
    "³": "cubed",
    "−": "minus",
}
_ADDRESS_SIGNS = {".": "dot", "/": "slash", "-": "dash", "_": "underscore", ":": "colon"}
_ADDRESS_SIGNS |= {"@": "at", "?": "question mark", "=": "equals", "&": "and", "#": "hash"}
_ADDRESS_SIGNS |= {"~": "tilde", "%": "percent", "+": "plus"}

# Characters

_L = "[^\\W\\d_²³¼½¾⅐-⅞]"
"""A letter, as a regular expression: to it, squares and fractions were letters as well."""

_ASCII = str.maketrans(
    {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "th", "þ": "th", "ı": "i"}
)


def ascii_letters(word: str) -> str:
    """``"Crème"`` -> ``"creme"``: lower case, marks dropped, the few other Latin letters spelt out."""
    folded = unicodedata.normalize("NFKD", word.lower().translate(_ASCII))
    return "".join(c for c in folded if c.isascii() and (c.isalpha() or c in " '"))


@cache
def _clean(character: str) -> str:
    """One character as the patterns below expect it; a space for what is passed over."""
    if character.isascii():
        return character
    if character in "’‘ʼ`´":
        return "'"
    if character in "“”„«»‹›":
        return '"'
    if character in "‐‑‒⁃":
        return "-"
    if character in "–—―":
        return "–"
    if character == "µ":
        return "μ"
    if character in _SYMBOLS or character in "…‰":
        return character
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category[0] == "L":
        return character
    if category == "No" and unicodedata.numeric(character, -1) % 1:
        return character  # ½
    plain = unicodedata.normalize("NFKC", character)
    return plain if len(plain) == 1 and plain.isascii() else " "


def _is_spoken_letter(character: str) -> bool:
    return bool(ascii_letters(character)) or "GREEK" in unicodedata.name(character, "")


def clean_text(text: str) -> str:
    """The text with plain quotes, dashes and digits, without control characters and pictures.

    Line ends stay. Soft hyphens, joiners and stray marks go.

    Raises:
        InputError: there is a letter of another alphabet (Greek letters that stand alone are fine).
    """
    composed = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\t", " "))
    lines = [printable(line) for line in composed.split("\n")]
    cleaned = "".join(
        _clean(c) for c in "\n".join(lines) if unicodedata.category(c) not in ("Cf", "Mn", "Me")
    )
    for match in re.finditer(f"{_L}+", cleaned):
        if match[0].isascii():
            continue
        for character in match[0]:
            alone = len(match[0]) == 1 or match[0] in _UNITS
            if not ascii_letters(character) and not (alone and _is_spoken_letter(character)):
                name = unicodedata.name(character, f"U+{ord(character):04X}").lower()
                raise InputError(
                    f'"{character}" ({name}) cannot be spoken: the voice reads English, so write '
                    "the text in Latin letters."
                )
    return cleaned


# Sentences

_SENTENCE_END = re.compile(r"""[.!?…]{1,9}["')\]]{0,3}(?=\s)|\n\s*\n""")
_LAST_WORD = re.compile(r"(?:[^\W\d_]\.){0,5}[^\W\d_]{1,12}$")


def split_sentences(text: str) -> list[str]:
    """Cut cleaned text into sentences, each one line of at most 250 characters.

    A full stop does not end a sentence after a title ("Dr."), an initial ("J. Smith"), inside a
    number, or before a lower-case letter; a blank line always does.
    """
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        if match[0][0] != "\n":
            following = text[end : end + 40].lstrip(" \n\"'([")[:1]
            if following.islower():
                continue
            if match[0][0] == "." and len(match[0]) == 1:
                last = _LAST_WORD.search(text[max(0, match.start() - 24) : match.start()])
                word = last[0] if last else ""
                initial = len(word) == 1 and word.isupper() and word != "I"
                numbered = word.lower() == "no" or word.title() in _SHORT_MONTHS
                if initial or word.lower() in _TITLES or (numbered and following.isdigit()):
                    continue
        sentences.append(text[start:end])
        start = end
    sentences.append(text[start:])
    return [part for sentence in sentences for part in _short(" ".join(sentence.split())) if part]


def _short(sentence: str) -> list[str]:
    parts = []
    while len(sentence) > MAX_SENTENCE_CHARACTERS:
        piece = sentence[:MAX_SENTENCE_CHARACTERS]
        cut = max(piece.rfind(mark) + len(mark) for mark in (", ", "; ", ": ", " – "))
        if cut < MAX_SENTENCE_CHARACTERS // 3:
            cut = piece.rfind(" ") + 1 or len(piece)
        parts.append(sentence[:cut].strip())
        sentence = sentence[cut:]
    return [*parts, sentence.strip()]


# Words

_NUM = r"(?:\d{1,3}(?:,\d{3}){1,8}(?:\.\d{1,30})?(?![\d,])|\d{1,60}(?:\.\d{1,30})?|\.\d{1,30})"
_MONTH = "(?:" + "|".join(f"{m.title()}|{m[:3].title()}\\.?" for m in _MONTHS) + r"|Sept\.?)"
_ANY_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_ABBREVIATED = "|".join(sorted(map(re.escape, _ABBREVIATIONS), key=len, reverse=True))
_TOP_DOMAINS = "com|org|net|edu|gov|io|ai|co|uk|de|fr|eu|us|dev|app|info"

_PATTERNS: dict[str, str] = {
    "email": r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}",
    "url": rf"(?:https?://|www\.)[^\s<>\"]{{1,200}}|\b[A-Za-z0-9-]{{2,63}}(?:\.[a-z0-9-]{{2,63}})?"
    rf"\.(?:{_TOP_DOMAINS})\b(?:/[^\s<>\"]{{0,200}})?",
    "date_iso": r"\b(\d{4})-(\d\d)-(\d\d)(?![\d-])",
    "date_slash": r"(?<![\d/])(\d{1,2})/(\d{1,2})/(\d{4}|\d\d)(?![\d/])",
    "month_day": rf"\b({_MONTH})\s(\d{{1,2}})(?:st|nd|rd|th)?\b(?![:.]\d)(?:,?\s(\d{{4}})\b)?",
    "day_month": rf"\b(\d{{1,2}})(?:st|nd|rd|th)?\s(?:of\s)?({_MONTH})(?!{_L})(?:,?\s(\d{{4}})\b)?",
    "clock": r"\b([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?\b(?:\s?([AaPp])\.?[Mm]\b\.?)?",
    "hour": r"\b(1[0-2]|\d)\s?([AaPp])\.?[Mm]\b\.?",
    "phone": r"(?<![\w.,])(?:\+\d{1,3}[ .-])?(?:\(\d{3}\)\s?|\d{3}[ .-])\d{3}[ .-]\d{4}(?!\d)"
    r"|(?<![\w.,-])\d{3}-\d{4}(?![\d-])|\+\d{1,3}(?:[ -]\d{2,5}){2,5}(?!\d)",
    "money": rf"(?<!\w)(-?)([$€£¥₹])\s?({_NUM})(?:\s?(thousand|million|billion|trillion|bn|mn|[kKmMbB])"
    rf"(?!{_L}))?",
    "money_after": rf"({_NUM})\s?([€£¥₹])",
    "decade": r"'?\b(\d\d(?:\d0|0)|\d0)'?s\b",
    "unit": rf"((?<![\w-])-?{_NUM}|{_NUM}-{_NUM}|{_NUM})\s?({_ANY_UNIT})(?![\w²³])",
    "fraction": r"(?<![\w/.])(?:(\d{1,3})\s)?(\d{1,3})/(\d{1,3})(?![\w/])|(\d{0,9})([¼½¾⅐-⅞])",
    "version": r"(?<![\d.])\d{1,9}(?:\.\d{1,9}){2,9}\b",
    "ordinal": r"\b(\d{1,3}(?:,\d{3}){1,5}|\d{1,18})(?:st|nd|rd|th)\b",
    "range": rf"(?<![\w-])({_NUM}[-–]{_NUM})(?![\w-])",
    "number": rf"(?<!\w)[-+]{_NUM}|{_NUM}",
    "numbered": r"#(\d{1,9})\b|\bNo\.\s?(\d{1,9})\b",
    "abbreviation": rf"\b(?i:({_ABBREVIATED}))\.(?!\w)|\b(?:Mr|Mrs|Ms|Dr|Prof|Jr|Sr|vs|St)\b\.?",
    "letters": rf"\b(?:{_L}\.){{2,10}}(?:{_L}\b)?",
    "initial": r"\b[A-Z]\.(?=\s[A-Z])",
    "word": rf"'?{_L}{{1,250}}(?:'{_L}{{1,60}}){{0,3}}",
    "dot": r"(?<=\w)\.(?=\w)",
    "pause": r"[,;:!?()\[\]{}–…|.]|--|(?<!\S)-(?!\S)",
    "symbol": "[" + re.escape("".join(_SYMBOLS)) + "]",
}
_TOKEN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()))
_ROMAN = re.compile(r"(?=[IVX])(X{0,3})(IX|IV|V?I{0,3})(?!\w)")


def _roman(text: str) -> int:
    values = {"I": 1, "V": 5, "X": 10}
    total = 0
    for here, following in zip(text, [*text[1:], "I"], strict=True):
        total += values[here] if values[here] >= values[following] else -values[here]
    return total


def _say_address(text: str) -> str:
    text = re.sub(r"^https?://", "", text).rstrip(".,;:!?)/'")
    words = []
    for part in re.findall(r"[A-Za-z]+|\d+|.", text):
        if part.isdecimal():
            words.append(cardinal(part) if len(part) < 4 else digits(part))
        elif part.lower() == "www":
            words.append("w. w. w.")
        elif part.isascii() and part.isalpha():
            words.append(part.lower() if len(part) > 1 else f"{part.lower()}.")
        else:
            words.append(_ADDRESS_SIGNS.get(part) or ascii_letters(part))
    return " ".join(words)


def _month(name: str) -> str:
    return next(m for m in _MONTHS if m.startswith(name[:3].lower()))


def _date(month: str, day: str, at: str | None) -> str:
    return f"{month} {ordinal(int(day))}" + (f" , {year(int(at))}" if at else "")


def _say_date(year_: str, month: str, day: str) -> str | None:
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return None
    at = int(year_) + (0 if len(year_) > 2 else 2000 if int(year_) < 50 else 1900)
    return _date(_MONTHS[int(month) - 1], day, str(at))


def _say_clock(hour: str, minute: str, second: str | None, half: str | None) -> str:
    words = cardinal(int(hour))
    if int(minute):
        words += (" oh " if int(minute) < 10 else " ") + cardinal(int(minute))
    elif not half:
        words += " o'clock" if 1 <= int(hour) <= 12 else " hundred"
    if second:
        words += f" and {cardinal(int(second))} second" + "s" * (int(second) != 1)
    return words + (f" {half.lower()}. m." if half else "")


def _say_phone(text: str) -> str:
    groups = ["plus " * (group[0] == "+") + digits(group) for group in re.findall(r"\+?\d+", text)]
    return " , ".join(groups)


def _say_money(sign: str, symbol: str, amount: str, scale: str | None) -> str:
    name, small = _CURRENCIES[symbol]
    minus = "minus " if sign else ""
    if scale:
        scale = _MONEY_SCALES.get(scale.lower(), scale)
        return f"{minus}{_number(amount)} {scale} {name if name == 'yen' else name + 's'}"
    whole, _, cents = amount.replace(",", "").partition(".")
    if len(cents) not in (0, 2) or (cents and not small):
        return f"{minus}{_number(amount)} {name if name == 'yen' else name + 's'}"
    parts = []
    if int(whole or 0) or not int(cents or 0):
        parts.append(
            f"{_number(whole or '0')} {name if int(whole or 0) == 1 or name == 'yen' else name + 's'}"
        )
    if int(cents or 0):
        many = {"penny": "pence", "paisa": "paise"}.get(small, small + "s")
        parts.append(f"{cardinal(int(cents))} {small if int(cents) == 1 else many}")
    return minus + " and ".join(parts)


def _say_unit(amount: str, unit: str) -> str:
    one, many = _UNITS[unit]
    return f"{_range(amount)} {one if amount in ('1', '-1') else many}"


def _say_abbreviation(text: str, before: str, after: str) -> str:
    key = text.rstrip(".").lower()
    if key == "st":
        street = re.search(r"[A-Z0-9]\w*\s$", before) and not re.match(r"\s[A-Z]", after)
        return "street" if street else "saint"
    if key == "dr" and re.search(r"[A-Z]\w+\s$", before) and not re.match(r"\s[A-Z]", after):
        return "drive"
    if key in _WORDS_TOO and (text.islower() or not after.strip()):
        return key  # "a fig.", "the sun."
    return _ABBREVIATIONS[key]


def _letter_name(letter: str) -> str:
    name = ascii_letters(letter)
    if not name:
        return unicodedata.name(letter).split()[-1].lower()  # GREEK SMALL LETTER PI
    return name if len(name) > 1 else f"{name}."


def _say_word(text: str, before: str, after: str, shouting: bool) -> str:
    previous = re.search(r"([\w.]+)\s$", before)
    if previous and _ROMAN.fullmatch(text):
        name = previous[1].lower()
        pronoun = text == "I" and re.match(r"\s[a-z']", after)
        if name in _RULERS and previous[1][0].isupper() and not pronoun:
            return f"the {ordinal(_roman(text))}"
        if name in _NUMBERED:
            return cardinal(_roman(text))
    if not text.isascii() and text in _UNITS:
        return _UNITS[text][1]
    if len(text.strip("'")) == 1:
        return text.lower() if text in ("a", "A", "I") else _letter_name(text.strip("'"))
    capitals = re.fullmatch(r"([A-Z]{2,12})(s|'s)?", text)
    if capitals and not shouting:
        return capitals[1] + (" 's" if capitals[2] else "")
    parts = re.sub(r"(?<=[a-z]{2})(?<!Mac)(?=[A-Z])|(?<=^[ie])(?=[A-Z][a-z])", " ", text)
    return ascii_letters(parts)


def _say(match: re.Match[str], sentence: str, shouting: bool) -> str:
    """Words for one match, separated by spaces."""
    kind, text = match.lastgroup, match[0]
    first = match.re.groupindex[kind] + 1
    fields = match.groups()[first - 1 :]
    before = sentence[max(0, match.start() - 30) : match.start()]
    after = sentence[match.end() : match.end() + 10]
    if kind in ("email", "url"):
        return _say_address(text)
    if kind == "date_iso":
        return _say_date(*fields[:3]) or f"{_number(text[:4])} {digits(text[5:])}"
    if kind == "date_slash":
        month, day, at = fields[:3]
        said = _say_date(at, month, day) or _say_date(at, day, month)
        return said or " slash ".join(map(_number, fields[:3]))
    if kind == "month_day" and 1 <= int(fields[1]) <= 31:
        return _date(_month(fields[0]), fields[1], fields[2])
    if kind == "month_day":
        return f"{_month(fields[0])} {cardinal(fields[1])}" + (
            f" {_number_or_year(fields[2])}" if fields[2] else ""
        )
    if kind == "day_month":
        return "the " * (not before.lower().endswith("the ")) + (
            f"{ordinal(int(fields[0]))} of {_month(fields[1])}"
            + (f" , {year(int(fields[2]))}" if fields[2] else "")
        )
    if kind == "clock":
        return _say_clock(*fields[:4])
    if kind == "hour":
        return _say_clock(fields[0], "0", None, fields[1])
    if kind == "phone":
        return _say_phone(text)
    if kind == "money":
        return _say_money(*fields[:4])
    if kind == "money_after":
        return _say_money("", fields[1], fields[0], None)
    if kind == "unit":
        return _say_unit(*fields[:2])
    if kind == "fraction":
        whole, top, bottom, mixed, vulgar = fields[:5]
        if vulgar:
            whole, (top, bottom) = mixed, unicodedata.normalize("NFKC", vulgar).split("⁄")
        said = _fraction(int(top), int(bottom))
        if not whole:
            return said
        return f"{cardinal(int(whole))} and {'a' + said[3:] if said.startswith('one') else said}"
    if kind == "version":
        return " point ".join(map(cardinal, text.split(".")))
    if kind == "ordinal":
        return ordinal(int(fields[0].replace(",", "")))
    if kind == "decade":
        return _plural(_number_or_year(fields[0]))
    if kind == "range":
        return _range(text.replace("–", "-"), _number_or_year)
    if kind == "number":
        return _number_or_year(text)
    if kind == "numbered":
        return f"number {cardinal(fields[0] or fields[1])}"
    if kind == "abbreviation":
        return _say_abbreviation(text, before, after)
    if kind in ("letters", "initial"):
        return " ".join(_letter_name(c) for c in text if c != ".")
    if kind == "word":
        return _say_word(text, before, after, shouting)
    if kind == "dot":
        return "dot"
    if kind == "pause":
        return PAUSE_MARK
    if text == "#" and not re.match(r"\w", after):
        return "sharp"
    return _SYMBOLS[text]


def read_sentence(sentence: str) -> list[WrittenWord]:
    """The written words of one cleaned sentence, in order, each with the words said for it.

    Pauses are entries whose ``spoken`` is ``(",",)``.
    """
    shouting = sentence.isupper() and len(re.findall("[A-Z]{2}", sentence)) > 3
    return [
        WrittenWord(
            match[0],
            match.start(),
            tuple(w for w in _say(match, sentence, shouting).split() if w.strip("'")),
        )
        for match in _TOKEN.finditer(sentence)
    ]
