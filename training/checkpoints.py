"""Checkpoints: folders that are there whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..modalities.errors import InputError


def newest_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint with the highest step, if any."""
    steps = [path.name.removeprefix("checkpoint-") for path in output.glob("checkpoint-*")]
    steps = [int(step) for step in steps if step.isdecimal()]
    return output / f"checkpoint-{max(steps)}" if steps else None


def save_checkpoint(
    output: Path, step: int, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer
) -> None:
    """Write ``checkpoint-<step>`` whole (rename of a finished folder) and drop the older ones."""

    def write(folder: Path) -> None:
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        shadow = {str(i): p.contiguous() for i, p in enumerate(ema.shadow_params)}
        save_file(shadow, folder / "ema.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        state = {"step": step, "ema_step": ema.optimization_step}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf8")

    new = output / f"checkpoint-{step}"
    replace_folder(new, write)
    for folder in output.glob("checkpoint-*"):
        if folder != new:
            shutil.rmtree(folder)


def load_checkpoint(
    folder: Path, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer
) -> int:
    """Restore a checkpoint in place and return its step.

    Raises:
        InputError: a damaged checkpoint, or that of another model.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        shadow = load_file(folder / "ema.safetensors")
        moments = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        state = json.loads((folder / "state.json").read_text(encoding="utf8"))
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError(
            f'"{folder}" is damaged and cannot be resumed: delete it and begin again.'
        ) from error
    found = {key: value.shape for key, value in weights.items()}
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    if found != wanted:
        key = next(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
        raise InputError(
            f'"{folder}" is of another model (they differ in "{key}"): resume with the recipe '
            "that began it, or set another output=."
        )
    model.load_state_dict(weights)
    for index, parameter in enumerate(ema.shadow_params):
        parameter.copy_(shadow[str(index)])
    optimizer.load_state_dict(moments)
    ema.optimization_step = state["ema_step"]
    return state["step"]


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a sibling folder, then rename it into place, so that no half-written folder is found."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
