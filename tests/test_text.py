from __future__ import annotations

import pytest

from tessera.modalities.errors import InputError
from tessera.modalities.text import clean_prompt, expand_prompt


def test_clean_prompt_collapses_space_and_composes():
    assert clean_prompt("  a\tred \n\n fox\x00 ") == "a red fox"
    assert clean_prompt("cafe\u0301") == "caf\u00e9"
    assert clean_prompt("👩‍🚀 in space") == "👩‍🚀 in space"  # The joiner inside the emoji stays.


def test_broken_utf8_from_the_command_line_becomes_space():
    assert clean_prompt("red\udce9 fox") == "red fox"


@pytest.mark.parametrize("text", ["", "   \n\t", "\u200b", "\x00"])
def test_empty_prompts_are_refused(text):
    with pytest.raises(InputError, match="The prompt is empty"):
        clean_prompt(text)


def test_long_prompts_are_refused_with_their_length():
    assert len(clean_prompt("x" * 2000)) == 2000
    with pytest.raises(InputError, match=r"10,000 characters; at most 2,000"):
        clean_prompt("x" * 10_000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", ["a fox"]),
        ("{red,blue} fox", ["red fox", "blue fox"]),
        ("{a, b} {c,d}", ["a c", "a d", "b c", "b d"]),
        ("{small,{very big,tiny}} fox", ["small fox", "very big fox", "tiny fox"]),
        ("{,big} fox", ["fox", "big fox"]),
        ("a {b} fox", ["a {b} fox"]),
        ("{x,x}", ["x"]),
    ],
)
def test_expand_prompt(text, expected):
    assert sorted(expand_prompt(text)) == sorted(expected)


def test_last_group_changes_fastest():
    assert expand_prompt("{a,b}{c,d}") == ["ac", "ad", "bc", "bd"]


def test_expansion_is_bounded():
    assert len(expand_prompt("{a,b,c,d,e,f,g,h,i,j}{0,1,2,3,4,5,6,7,8,9}")) == 100
    with pytest.raises(InputError, match="more than 100 prompts"):
        expand_prompt("{a,b}" * 40)


def test_an_empty_alternative_alone_is_refused():
    with pytest.raises(InputError, match="empty"):
        expand_prompt("{fox,}")
