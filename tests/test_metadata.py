from __future__ import annotations

import base64
import json

import pytest
import torch

from tessera.modalities.errors import InputError
from tessera.modalities.metadata import (
    MAX_TEXT_CHARACTERS,
    as_parameters,
    decode_tokens,
    dump_record,
    encode_tokens,
    make_record,
    parse_record,
)


@pytest.fixture
def record():
    settings = {"num_tokens": 3, "guidance_scale": 2.5, "num_inference_steps": 8, "style": "3d"}
    return make_record(
        "TextToImagePipeline",
        "sticker",
        'ein rotes Herz ❤, <b>"fett" & mehr',
        7,
        2,
        settings,
        torch.tensor([0, 255, 4095]),
        "sticker",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    "ids", [[], [0], [1, 2, 65535], [65536], [0, 2**32 - 1, 5], list(range(0, 64000, 64))]
)
def test_tokens_round_trip(ids):
    tokens = torch.tensor(ids, dtype=torch.int64)
    text = encode_tokens(tokens)
    decoded = decode_tokens(text)
    assert decoded.dtype == torch.int64 and torch.equal(decoded, tokens)
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def test_token_bytes_are_little_endian_with_a_header():
    def data(ids):
        text = encode_tokens(torch.tensor(ids))
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

    assert data([1, 0x1234]) == b"\x10\x01\x00\x34\x12"
    assert data([1, 0x12345]) == b"\x20\x01\x00\x00\x00\x45\x23\x01\x00"


@pytest.mark.parametrize(
    "tokens", [torch.zeros(1, 4).long(), torch.zeros(4), torch.tensor([-1]), torch.tensor([2**32])]
)
def test_wrong_tokens_are_refused(tokens):
    with pytest.raises(InputError):
        encode_tokens(tokens)


@pytest.mark.parametrize(
    "text", ["", "hello world", "AAAA", "EAEAA", "EAE", "é", "EAE\nAAAA" * 20000]
)
def test_foreign_token_texts_are_refused(text):
    with pytest.raises(InputError, match="not a Tessera token text"):
        decode_tokens(text)


def test_keys_stand_in_the_agreed_order(record):
    keys = (
        "v, software, pipeline, model, revision, sha256, prompt, negative_prompt, seed, index, "
        "settings, tokens, tokenizer, device, dtype, torch, created"
    )
    assert ", ".join(record) == keys
    assert record["v"] == 1 and record["software"].startswith("tessera ")
    assert record["dtype"] == "bfloat16" and record["device"] == "cpu"
    assert record["created"].endswith("Z")


def test_round_trip(record):
    parsed = parse_record(dump_record(record))
    assert parsed == record
    assert list(parsed) == list(record)
    assert decode_tokens(parsed["tokens"]).tolist() == [0, 255, 4095]


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ("sticker", "sticker"),
        ("someone/model-1.0", "someone/model-1.0"),
        ("/home/me/secret folder/my model", "my-model"),
        ("../../etc", "etc"),
        ("./runs/", "runs"),
    ],
)
def test_a_record_holds_names_and_never_folders(model, kept):
    record = make_record("TextToImagePipeline", model, "fox", 0)
    assert record["model"] == kept
    assert parse_record(dump_record(record)) == record


def test_unknown_keys_and_nested_settings_are_dropped(record):
    text = json.dumps(
        record
        | {"command": "rm -rf", "settings": {"num_tokens": 4, "x": [1], "Bad key": 1, "y": "z"}}
    )
    parsed = parse_record(text)
    assert "command" not in parsed
    assert parsed["settings"] == {"num_tokens": 4, "y": "z"}


def test_control_characters_never_reach_a_terminal(record):
    parsed = parse_record(json.dumps(record | {"prompt": "fox\x1b]0;owned\x07\ud800"}))
    assert parsed["prompt"] == "fox ]0;owned  "


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": True},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": "7"},
        {"seed": 1.5},
        {"index": -1},
        {"prompt": 5},
        {"prompt": "x" * (MAX_TEXT_CHARACTERS + 1)},
        {"model": "/etc/passwd"},
        {"model": "../weights"},
        {"model": "a/../../b"},
        {"model": "a/b/c"},
        {"tokenizer": "C:\\x"},
        {"tokens": "not tokens"},
        {"tokens": [1, 2]},
        {"settings": []},
        {"settings": {"num_tokens": 0}},
        {"settings": {"num_tokens": 1.5}},
        {"settings": {"num_tokens": 10**300}},
        {"settings": {"temperature": -0.1}},
        {"settings": {"top_p": True}},
    ],
)
def test_records_out_of_range_are_refused(record, change):
    assert parse_record(json.dumps(record)) is not None
    assert parse_record(json.dumps(record | change)) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "a fox\nSteps: 20, Seed: 7",
        "{" * 30_000,
        '{"v":1,"settings":' + "[" * 60_000,
        '{"v":1,"seed":NaN}',
        '{"v":1,"seed":' + "9" * 5000 + "}",
        '{"v":1,"settings":{"temperature":1e999}}',
        '{"v":1,"x":"' + "y" * 66_000 + '"}',
        b"\xff\xfe\x00",
        "\ud800",
    ],
)
def test_hostile_texts_give_none(text):
    assert parse_record(text) is None


def test_infinite_and_huge_unknown_settings_are_dropped():
    parsed = parse_record('{"v":1,"settings":{"a":1e999,"b":' + "9" * 400 + ',"c":2}}')
    assert parsed["settings"] == {"c": 2}


def test_a_record_nobody_could_read_is_not_written(record):
    with pytest.raises(InputError, match="the limit is 65,536"):
        dump_record(record | {"settings": {"x": "y" * 70_000}})


def test_parameters_text(record):
    lines = as_parameters(record | {"negative_prompt": "text", "sha256": "0123456789abcdef"}).split(
        "\n"
    )
    assert lines[0] == record["prompt"]
    assert lines[1] == "Negative prompt: text"
    assert lines[2].startswith("Steps: 8, CFG scale: 2.5, Seed: 7, Model: sticker, ")
    assert "Model hash: 0123456789, Num tokens: 3, Style: 3d, Version: tessera" in lines[2]
    quoted = as_parameters({"settings": {"style": 'a, b: "c"'}})
    assert 'Style: "a, b: \\"c\\""' in quoted
