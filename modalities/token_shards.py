"""A data set's tokens on disk, so that a generator trains without running the tokenizer.

A folder of WebDataset shards ``tokens-000000.tar``, ``tokens-000001.tar``, ... and ``tokens.json``.
A sample is ``<number>.npy`` (the tokens of one item as the tokenizer gave them) beside
``<number>.json`` (``{"text": [captions]}``). ``tokens.json`` says which tokenizer wrote them and how
many items there are; it is written first, and a shard is there whole or not at all, so that an
interrupted run can go on.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .datasets import index_members, read_span, row_captions
from .errors import InputError
from .files import atomic_path

INDEX = "tokens.json"


def is_token_folder(path: str | Path) -> bool:
    return (Path(path) / INDEX).is_file()


def read_index(folder: str | Path) -> dict[str, Any]:
    """``tokens.json``: tokenizer, num_tokens, vocab_size, items, shard_size.

    Raises:
        InputError: it is missing or not such a file.
    """
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(index["items"], int) or not isinstance(index["shard_size"], int):
            raise TypeError
    except FileNotFoundError as error:
        raise InputError(
            f'"{path}" is missing: give a folder made by "tessera tokenize".'
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'"{path}" is damaged: tokenize the data again.') from error
    return index


def shard_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"tokens-{number:06d}.tar"


def shard_count(index: dict[str, Any]) -> int:
    return -(-index["items"] // index["shard_size"])


def write_shard(path: Path, samples: Iterator[tuple[str, Tensor, list[str]]]) -> None:
    """Write (key, tokens of one item, captions) as one tar, whole or not at all."""
    from webdataset import TarWriter  # Imports torch's data loading.

    with atomic_path(path) as temporary, TarWriter(str(temporary), mtime=0) as tar:
        for key, tokens, captions in samples:
            buffer = io.BytesIO()
            np.save(buffer, _small(tokens), allow_pickle=False)
            tar.write({"__key__": key, "npy": buffer.getvalue(), "json": {"text": captions}})


def _small(tokens: Tensor) -> np.ndarray:
    """Ids below 65,536 take two bytes each."""
    array = tokens.cpu().numpy()
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    # Adaptive tokenizers write -1 for no token.
    small = array.size == 0 or (array.min() >= 0 and array.max() < 2**16)
    return array.astype(np.uint16 if small else np.int32)


class TokenShards:
    """Tokens and captions written by ``tessera tokenize``, read at random by position.

    Raises:
        InputError: not such a folder, a shard that is missing or damaged, or an unfinished run.
    """

    def __init__(self, folder: str | Path):
        self.root = Path(folder)
        self.index = read_index(folder)
        self.samples: list[dict[str, tuple[Path, int, int]]] = []
        for number in range(shard_count(self.index)):
            path = shard_path(folder, number)
            if not path.is_file():
                raise InputError(
                    f'"{path}" is missing: run "tessera tokenize" again, it goes on where it stopped.'
                )
            self.samples += [s for s in index_members(path) if {"npy", "json"} <= s.keys()]
        if len(self.samples) != self.index["items"]:
            raise InputError(
                f'"{folder}" holds {len(self.samples)} of {self.index["items"]} items: tokenize again.'
            )

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, index: int) -> Tensor:
        """int64 ``[N]`` (or what the tokenizer gives), float32 of a continuous tokenizer."""
        span = self.samples[index]["npy"]
        try:
            array = np.load(io.BytesIO(read_span(*span)), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(
                f'Sample {index} of "{span[0]}" is damaged: tokenize again.'
            ) from error
        return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))

    def name(self, index: int) -> str:
        return self.captions(index)[0]

    def captions(self, index: int) -> list[str]:
        span = self.samples[index]["json"]
        try:
            captions = row_captions(json.loads(read_span(*span)))
        except (ValueError, RecursionError, AttributeError):
            captions = []
        if not captions:
            raise InputError(f'Sample {index} of "{span[0]}" has no caption: tokenize again.')
        return captions

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions(index))
