"""Prompts: cleaned, measured, expanded."""

from __future__ import annotations

import re
import unicodedata

from .errors import InputError

MAX_PROMPT_CHARACTERS = 2_000
MAX_EXPANSIONS = 100

_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def printable(text: str) -> str:
    """Text with control characters and lone surrogates (broken UTF-8) replaced by spaces."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def clean_prompt(text: str) -> str:
    """NFC, one space between words, none at the ends, no control characters.

    Raises:
        InputError: nothing visible is left, or more than 2,000 characters.
    """
    cleaned = unicodedata.normalize("NFC", " ".join(printable(text).split()))
    if len(cleaned) > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"The prompt has {len(cleaned):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are "
            "read, so shorten it."
        )
    if all(unicodedata.category(c)[0] in "CZ" for c in cleaned):
        raise InputError(
            'The prompt is empty: say what to make, for example "a red heart with an arrow".'
        )
    return cleaned


def expand_prompt(text: str) -> list[str]:
    """``"{red,blue} fox"`` -> ``["red fox", "blue fox"]``, each cleaned, without repeats.

    Several groups give every combination, the last group changing fastest; groups may nest;
    braces without a comma stay as they are.

    Raises:
        InputError: a prompt is empty or too long, or there are more than 100.
    """
    prompts = [clean_prompt(text)]
    while any(_ALTERNATIVES.search(prompt) for prompt in prompts):
        expanded: list[str] = []
        for prompt in prompts:
            group = _ALTERNATIVES.search(prompt)
            if group is None:
                expanded.append(prompt)
                continue
            before, after = prompt[: group.start()], prompt[group.end() :]
            expanded += [before + option + after for option in group[1].split(",")]
        prompts = list(dict.fromkeys(expanded))
        if len(prompts) > MAX_EXPANSIONS:
            raise InputError(
                f"The braces expand to more than {MAX_EXPANSIONS} prompts: use fewer alternatives."
            )
    return list(dict.fromkeys(clean_prompt(prompt) for prompt in prompts))
