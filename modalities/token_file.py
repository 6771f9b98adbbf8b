"""The ``.tok`` file: one item's tokens and the name of the tokenizer that wrote them.

All numbers are little-endian; ids are packed without gaps, the highest bit first.

    offset  size  content
    0       8     "TESSERA" and the version of the format, 1
    8       1     n, length of the name
    9       n     name of the tokenizer, ASCII: a shipped or published name, never a path
    9+n     1     bits of an id, 1 to 32; 0: the tokens are continuous
    10+n    2     width of a continuous token; 1 for ids
    12+n    4     number of tokens
    16+n          ids of that many bits, zero bits up to a whole byte; or float32 values
    end-4   4     CRC-32 of everything before

A file is read as plain numbers and checked in all parts, so one from a stranger is safe to open.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .files import atomic_path

MAGIC = b"TESSERA\x01"
MAX_FILE_BYTES = 16_000_000
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)


@dataclass(frozen=True)
class TokenFile:
    """Tokens int64 ``[N]``, or float32 ``[N, D]`` of a continuous tokenizer (``bits`` is 0)."""

    tokenizer: str
    tokens: Tensor
    bits: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tokens alone."""
        return _payload_bytes(self.bits, len(self.tokens), _width(self.tokens))


def write_tokens(
    path: str | Path,
    tokens: Tensor,
    tokenizer: str,
    vocab_size: int | None,
    overwrite: bool = True,
) -> TokenFile:
    """Write ids ``[N]`` below ``vocab_size`` or continuous tokens ``[N, D]``, whole or not at all.

    Args:
        tokenizer: of a folder only its last name is kept.
        vocab_size: None for continuous tokens.

    Raises:
        InputError: another shape or kind of tokens, ids out of range, or see `atomic_path`.
    """
    continuous = vocab_size is None
    if tokens.ndim != 1 + continuous or tokens.dtype.is_floating_point != continuous:
        raise InputError(
            f"Tokens to write must be whole numbers [count] or real ones [count, width], got "
            f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}."
        )
    if continuous:
        bits = 0
        payload = tokens.detach().cpu().numpy().astype("<f4").tobytes()
    else:
        bits = max(1, (vocab_size - 1).bit_length())
        ids = tokens.cpu().numpy().astype(np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
            raise InputError(
                f"Token ids must lie in 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}."
            )
        payload = np.packbits(ids[:, None] >> np.arange(bits - 1, -1, -1) & 1).tobytes()
    if not _NAME.fullmatch(tokenizer):
        tokenizer = re.sub(r"[^\w.-]+", "-", Path(tokenizer).name, flags=re.ASCII).strip(".-")
        tokenizer = tokenizer[:96] or "tokenizer"
    name = tokenizer.encode("ascii")
    data = MAGIC + bytes([len(name)]) + name
    data += struct.pack("<BHI", bits, _width(tokens), len(tokens)) + payload
    with atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(data + struct.pack("<I", zlib.crc32(data)))
    return TokenFile(tokenizer, tokens, bits)


def read_tokens(path: str | Path) -> TokenFile:
    """Read what `write_tokens` wrote.

    Raises:
        InputError: no such file, another kind of file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'Could not open "{path}": there is no such file, check the path.')
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if not data.startswith(MAGIC):
        raise InputError(f'"{path}" is not a token file: give one that "tessera encode" wrote.')
    try:
        if len(data) > MAX_FILE_BYTES or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise ValueError
        end = 9 + data[8]
        name = data[9:end].decode("ascii")
        bits, width, count = struct.unpack("<BHI", data[end : end + 7])
        payload = data[end + 7 : -4]
        if not _NAME.fullmatch(name) or bits > 32 or not count or not width:
            raise ValueError
        if (bits and width != 1) or len(payload) != _payload_bytes(bits, count, width):
            raise ValueError
    except (ValueError, struct.error, IndexError) as error:
        raise InputError(f'"{path}" is damaged or cut off: copy it again.') from error
    if not bits:
        values = np.frombuffer(payload, "<f4").reshape(count, width)
        if not np.isfinite(values).all():
            raise InputError(f'"{path}" holds values that are not finite: encode it again.')
        return TokenFile(name, torch.from_numpy(values.astype(np.float32)), 0)
    rows = np.unpackbits(np.frombuffer(payload, np.uint8), count=count * bits).reshape(count, bits)
    ids = rows.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    return TokenFile(name, torch.from_numpy(ids), bits)


def _width(tokens: Tensor) -> int:
    return tokens.shape[1] if tokens.ndim == 2 else 1


def _payload_bytes(bits: int, count: int, width: int) -> int:
    return -(-bits * count // 8) if bits else 4 * count * width
