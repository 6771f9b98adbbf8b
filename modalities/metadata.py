"""The record of how a file was made, which travels inside the file.

One JSON object with the keys, in this order, v, software, pipeline, model, revision, sha256,
prompt, negative_prompt, seed, index, settings, tokens, tokenizer, device, dtype, torch, created.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from .errors import InputError
from .text import MAX_PROMPT_CHARACTERS, printable

MAX_RECORD_BYTES = 64 * 1024
# Of what was spoken or drawn.
MAX_TEXT_CHARACTERS = 10_000
MAX_SEED = 2**32 - 1

# A shipped name or a hub id. Never a path: a file from a stranger must not choose what is opened.
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_SETTING_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# Whole bounds ask for a whole number.
_SETTING_RANGES = {
    "num_tokens": (1, 65_536),
    "num_inference_steps": (1, 1_000),
    "num_steps": (1, 1_000),
    "class_label": (0, 65_535),
    "second_label": (0, 65_535),
    "keep": (1, 65_536),
    "stopped_at": (1, 1_000_000),
    "guidance_scale": (0.0, 100.0),
    "temperature": (0.0, 100.0),
    "top_k": (1, MAX_SEED),
    "top_p": (0.0, 1.0),
    "height": (1, 16_384),
    "width": (1, 16_384),
    "num_images_per_prompt": (1, 65_536),
}
_PARAMETER_LABELS = {"num_inference_steps": "Steps", "guidance_scale": "CFG scale"}


def encode_tokens(tokens: Tensor) -> str:
    """Token ids ``[N]`` or continuous tokens ``[N, D]`` -> base64url text without padding.

    The bytes are one header byte, 16 or 32 (bits of an id), then N little-endian unsigned ids; or 0, D
    in two bytes and N D little-endian float32 values.

    Raises:
        InputError: not integers, not one-dimensional, or an id outside 0 to 2**32 - 1.
    """
    if tokens.ndim == 2 and tokens.dtype.is_floating_point:
        data = b"\0" + tokens.shape[1].to_bytes(2, "little")
        data += tokens.cpu().numpy().astype("<f4").tobytes()
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
    if tokens.ndim != 1 or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise InputError(
            f"Tokens to write must be whole numbers of shape [count], got "
            f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}."
        )
    ids = tokens.cpu().numpy().astype(np.int64)
    highest = int(ids.max(initial=0))
    if ids.min(initial=0) < 0 or highest > 2**32 - 1:
        raise InputError(f"Token ids must lie in 0 to {2**32 - 1}, got {ids.min()} to {highest}.")
    bits = 16 if highest < 2**16 else 32
    data = bytes([bits]) + ids.astype(f"<u{bits // 8}").tobytes()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode_tokens(text: str) -> Tensor:
    """The int64 ids ``[N]`` or float32 tokens ``[N, D]`` that `encode_tokens` wrote.

    Raises:
        InputError: the text is longer than 64 kB or was not written by `encode_tokens`.
    """
    text = text.strip()
    try:
        if len(text) > MAX_RECORD_BYTES:
            raise ValueError
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        if data[:1] == b"\0":
            values = np.frombuffer(data, "<f4", offset=3)
            values = values.reshape(-1, int.from_bytes(data[1:3], "little"))
            if not np.isfinite(values).all():
                raise ValueError
            return torch.from_numpy(values.astype(np.float32))
        if data[:1] not in (b"\x10", b"\x20"):
            raise ValueError
        ids = np.frombuffer(data, f"<u{data[0] // 8}", offset=1)
    except (ValueError, binascii.Error) as error:
        shown = text if len(text) <= 24 else text[:24] + "…"
        raise InputError(
            f'"{shown}" is not a Tessera token text: copy it again, complete.'
        ) from error
    return torch.from_numpy(ids.astype(np.int64))


def make_record(
    pipeline: str,
    model: str,
    prompt: str,
    seed: int,
    index: int = 0,
    settings: dict[str, Any] | None = None,
    tokens: Tensor | None = None,
    tokenizer: str | None = None,
    *,
    negative_prompt: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> dict[str, Any]:
    """The record of one made item, in the agreed order of keys; what is unknown is None.

    Args:
        pipeline: class name of the pipeline.
        model: shipped name, hub id or folder; of a folder only its last name is kept, so that
            a shared file does not tell where its maker keeps things.
        prompt: the text as it was read.
        seed: 0 to 2**32 - 1, the item's own.
        index: position of the item in its batch.
        settings: the pipeline's arguments, plain values.
        tokens: ids ``[N]`` of the item.
        tokenizer: name of the tokenizer of these tokens.
    """
    return {
        "v": 1,
        "software": f"tessera {__version__}",
        "pipeline": pipeline,
        "model": _without_folders(model),
        "revision": revision,
        "sha256": sha256,
        "prompt": printable(prompt),
        "negative_prompt": None if negative_prompt is None else printable(negative_prompt),
        "seed": int(seed),
        "index": int(index),
        "settings": dict(settings or {}),
        "tokens": None if tokens is None else encode_tokens(tokens),
        "tokenizer": None if tokenizer is None else _without_folders(tokenizer),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def dump_record(record: dict[str, Any]) -> str:
    """The record as it is written into files.

    Raises:
        InputError: it is longer than 64 kB, so that no reader would take it.
    """
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    size = len(text.encode())
    if size > MAX_RECORD_BYTES:
        raise InputError(
            f"The settings to save take {size:,} bytes, the limit is {MAX_RECORD_BYTES:,}: "
            "save without them."
        )
    return text


def parse_record(text: str | bytes) -> dict[str, Any] | None:
    """Read a record that anybody may have written; None unless it is one of ours in all parts.

    At most 64 kB of JSON; unknown keys are dropped; types and ranges are checked; names of models
    are names, never paths; control characters become spaces. Settings keep plain values only.
    """
    try:
        data = text.encode() if isinstance(text, str) else text
        if len(data) > MAX_RECORD_BYTES:
            return None
        raw = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or raw.get("v") != 1 or isinstance(raw["v"], bool):
        return None
    try:
        return {
            "v": 1,
            "software": _short_text(raw, "software"),
            "pipeline": _name(raw, "pipeline"),
            "model": _name(raw, "model"),
            "revision": _short_text(raw, "revision"),
            "sha256": _short_text(raw, "sha256"),
            "prompt": _short_text(raw, "prompt", MAX_TEXT_CHARACTERS),
            "negative_prompt": _short_text(raw, "negative_prompt", MAX_PROMPT_CHARACTERS),
            "seed": _whole_number(raw, "seed", MAX_SEED),
            "index": _whole_number(raw, "index", 65_535),
            "settings": _settings(raw.get("settings")),
            "tokens": _token_text(raw.get("tokens")),
            "tokenizer": _name(raw, "tokenizer"),
            "device": _short_text(raw, "device"),
            "dtype": _short_text(raw, "dtype"),
            "torch": _short_text(raw, "torch"),
            "created": _short_text(raw, "created"),
        }
    except ValueError:
        return None


def as_parameters(record: dict[str, Any]) -> str:
    """The record in the text form that A1111's web UI started and most picture tools show."""
    settings = record.get("settings") or {}
    lines = [record.get("prompt") or ""]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    fields = {label: settings.get(key) for key, label in _PARAMETER_LABELS.items()}
    fields["Seed"] = record.get("seed")
    if settings.get("width") and settings.get("height"):
        fields["Size"] = f"{settings['width']}x{settings['height']}"
    fields["Model"] = record.get("model")
    if record.get("sha256"):
        fields["Model hash"] = record["sha256"][:10]
    for key, value in settings.items():
        if key not in (*_PARAMETER_LABELS, "width", "height"):
            fields[key.replace("_", " ").capitalize()] = value
    fields["Version"] = record.get("software")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def _without_folders(model: str) -> str:
    if _MODEL_NAME.fullmatch(model):
        return model
    return re.sub(r"[^\w.-]+", "-", Path(model).name, flags=re.ASCII).strip(".-")[:96] or "model"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _short_text(raw: dict[str, Any], key: str, limit: int = 128) -> str | None:
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError(key)
    return printable(value)


def _name(raw: dict[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not (isinstance(value, str) and _MODEL_NAME.fullmatch(value)):
        raise ValueError(key)
    return value


def _whole_number(raw: dict[str, Any], key: str, highest: int) -> int | None:
    value = raw.get(key)
    if value is not None and not (type(value) is int and 0 <= value <= highest):
        raise ValueError(key)
    return value


def _token_text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("tokens")
    decode_tokens(value)
    return value


def _settings(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > 64:
        raise ValueError("settings")
    kept: dict[str, Any] = {}
    for key, setting in value.items():
        if not _SETTING_NAME.fullmatch(key):
            continue
        if key in _SETTING_RANGES and setting is not None:
            low, high = _SETTING_RANGES[key]
            if type(setting) not in (int, type(high)) or not low <= setting <= high:
                raise ValueError(key)
        if isinstance(setting, str):
            kept[key] = _short_text(value, key, MAX_PROMPT_CHARACTERS)
        elif setting is None or (isinstance(setting, int | float) and abs(setting) < 2**63):
            kept[key] = setting
    return kept
