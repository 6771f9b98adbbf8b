"""Pictures -> token shards, by one or several processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..modalities.datasets import ImageTextDataset, open_dataset
from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..modalities.image import fit_image, to_tensor
from ..modalities.token_shards import (
    INDEX,
    is_token_folder,
    read_index,
    shard_count,
    shard_path,
    write_shard,
)
from ..tokenizers.auto import AutoTokenizer
from ..tokenizers.base import Tokenizer


def tokenize_dataset(
    data: str | Path,
    output: str | Path,
    tokenizer: str | Path,
    batch_size: int = 8,
    shard_size: int = 1000,
    options: dict[str, Any] | None = None,
) -> int:
    """Write every item's tokens and captions to ``output`` (see `token_shards`).

    Under ``torchrun`` process r of w writes shards r, r + w, ... A run that was stopped goes on with
    the shards that are missing when it is started again with the same arguments.

    Args:
        data: what `open_dataset` opens; ``options`` go to it.
        output: folder, made if missing.
        tokenizer: what `AutoTokenizer` loads.
        batch_size: pictures encoded together.
        shard_size: items a shard.

    Returns:
        Number of shards that this process wrote.

    Raises:
        InputError: no such data or tokenizer, a folder that holds something else, or the tokens of
            another run.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    output = Path(output)
    dataset = open_dataset(data, **(options or {}))
    model = AutoTokenizer.from_pretrained(tokenizer)
    state = PartialState(cpu=not torch.cuda.is_available())
    model.to(state.device)
    index = {
        "tokenizer": str(tokenizer),
        "num_tokens": model.num_tokens,
        "vocab_size": model.vocab_size,
        "latent_dim": model.latent_dim,
        "items": len(dataset),
        "shard_size": shard_size,
    }
    if state.is_main_process:
        _begin(output, index)
    state.wait_for_everyone()
    missing = [
        number
        for number in range(state.process_index, shard_count(index), state.num_processes)
        if not shard_path(output, number).is_file()
    ]
    console = Console(stderr=True)
    with Progress(console=console, disable=not state.is_main_process) as progress:
        bar = progress.add_task("Tokenizing", total=len(missing) * shard_size)
        for number in missing:
            rows = range(number * shard_size, min((number + 1) * shard_size, len(dataset)))
            samples = _encode(model, dataset, rows, batch_size, state.device)
            write_shard(shard_path(output, number), progress.track(samples, len(rows), task_id=bar))
    state.wait_for_everyone()
    return len(missing)


def _begin(output: Path, index: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if is_token_folder(output):
        if read_index(output) != index:
            raise InputError(
                f'"{output}" holds tokens of other data, another tokenizer or shard size: give '
                "another folder."
            )
        return
    if any(output.iterdir()):
        raise InputError(f'"{output}" holds something else: give a new or empty folder.')
    with atomic_path(output / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf8")


@torch.no_grad()
def _encode(
    model: Tokenizer, dataset: ImageTextDataset, rows: range, batch_size: int, device: torch.device
) -> Iterator[tuple[str, Tensor, list[str]]]:
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        images = [fit_image(dataset.image(i), model.image_size, background="white") for i in part]
        for i, tokens in zip(part, model.encode(to_tensor(images).to(device)), strict=True):
            yield f"{i:09d}", tokens, dataset.captions(i)
