"""The training loop: one page on accelerate, for every task.

All randomness of step ``s`` comes from a generator seeded by (seed, s) that draws for the *whole*
batch, of which each process takes its rows. Hence resuming needs no random state and continues
bit-exactly on a CPU, and two processes compute what one computes with the joined batch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter

from ..modalities.errors import InputError
from .tasks import TASKS, Task


def train(recipe: dict[str, Any], resume: bool = False) -> Path:
    """Run a recipe to its last step and return the folder of the exported EMA model.

    The run's folder ``recipe["output"]`` gets ``recipe.json``, ``checkpoint-<step>/``, ``samples/``,
    TensorBoard events and ``model/``. Under ``torchrun`` every process trains on its share of each batch.

    Args:
        recipe: a recipe of `load_recipe`.
        resume: continue from the newest checkpoint; without it the folder must hold none.

    Raises:
        InputError: an unknown task, nothing to resume, or a run that would be overwritten.
    """
    if recipe["task"] not in TASKS:
        raise InputError(f'Unknown task "{recipe["task"]}": choose from {", ".join(TASKS)}.')
    settings = recipe["training"]
    output = Path(recipe["output"])
    checkpoint = newest_checkpoint(output)
    if resume and checkpoint is None:
        raise InputError(f'Nothing to resume in "{output}": start without --resume.')
    if not resume and checkpoint is not None:
        raise InputError(f'"{output}" already holds a run: pass --resume, or another output=.')

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=settings["precision"],
        dataloader_config=DataLoaderConfiguration(),
    )
    torch.manual_seed(recipe["seed"])
    task: Task = TASKS[recipe["task"]](recipe, accelerator.device)
    model = task.model.to(accelerator.device)
    model.train()
    ema = EMAModel(
        model.parameters(),
        decay=settings["ema"],
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        foreach=True,
    )
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings["weight_decay"]),
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        fused=True,
    )
    step = 0
    if checkpoint is not None:
        step = load_checkpoint(checkpoint, model, ema, optimizer)
    trained = accelerator.prepare_model(model)
    if settings["compile"]:
        trained = torch.compile(trained)

    main = accelerator.is_main_process
    if main:
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.json").write_text(json.dumps(recipe, indent=2))
    writer = SummaryWriter(output / "tensorboard") if main else None
    world, rank = accelerator.num_processes, accelerator.process_index
    batch_size, accumulation = settings["batch_size"], settings["gradient_accumulation"]
    if batch_size % world:
        raise InputError(
            f"batch_size {batch_size} must be a multiple of the {world} processes; change it."
        )
    rows = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not main,
    )
    with progress:
        bar = progress.add_task(output.name, total=settings["steps"], completed=step, note="")
        started, done_before = time.perf_counter(), step
        while step < settings["steps"]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            parts: dict[str, float] = {}
            for micro in range(accumulation):
                index = step * accumulation + micro
                generator = torch.Generator().manual_seed(recipe["seed"] * 1_000_003 + index)
                batch = task.batch(index, batch_size, generator, rows)
                batch = {
                    key: value.to(accelerator.device) if torch.is_tensor(value) else value
                    for key, value in batch.items()
                }
                sync = micro == accumulation - 1
                context = accelerator.no_sync(trained) if not sync else _nothing()
                with context:
                    with accelerator.autocast():
                        loss, values = trained(**batch)
                    accelerator.backward(loss / accumulation)
                for key, value in {"loss": loss.detach(), **values}.items():
                    parts[key] = parts.get(key, 0.0) + float(value) / accumulation
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(model.parameters())
            step += 1

            rate = (step - done_before) * batch_size * accumulation
            rate /= time.perf_counter() - started
            progress.update(bar, completed=step, note=f"loss {parts['loss']:.4f}  {rate:.0f}/s")
            if main and step % settings["log_every"] == 0:
                parts |= {"lr": learning_rate(step, settings), "grad_norm": float(norm)}
                for key, value in {**parts, "items_per_second": rate}.items():
                    writer.add_scalar(key, value, step)
                with open(output / "log.jsonl", "a", encoding="utf8") as log:
                    log.write(json.dumps({"step": step, **parts, "rate": rate}) + "\n")
            last = step == settings["steps"]
            if main and (last or step % settings["save_every"] == 0):
                save_checkpoint(output, step, model, ema, optimizer)
            if main and (last or step % settings["sample_every"] == 0):
                with _ema_weights(ema, model):
                    task.sample(output / "samples" / f"{step:06d}.png")
    if main:
        writer.close()
        with _ema_weights(ema, model):
            _replace_folder(output / "model", task.export)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output / "model"


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _ema_weights:
    """The model holds the averaged weights inside, its own again outside."""

    def __init__(self, ema: EMAModel, model: torch.nn.Module):
        self.ema, self.model = ema, model

    def __enter__(self) -> None:
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.ema.restore(self.model.parameters())
        self.model.train()


def learning_rate(step: int, settings: dict[str, Any]) -> float:
    """Linear warm-up, then cosine decay to ``min_lr``."""
    lr, warmup, total = settings["lr"], settings["warmup"], settings["steps"]
    if step < warmup:
        return lr * (step + 1) / warmup
    fraction = min(1.0, (step - warmup) / max(1, total - warmup))
    return settings["min_lr"] + (lr - settings["min_lr"]) * 0.5 * (1 + math.cos(math.pi * fraction))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No weight decay on vectors: biases, norms, single tokens."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def newest_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint with the highest step, if any."""
    found = sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    return found[-1] if found else None


def save_checkpoint(
    output: Path,
    step: int,
    model: torch.nn.Module,
    ema: EMAModel,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write ``checkpoint-<step>`` whole (rename of a finished folder) and drop the older ones."""

    def write(folder: Path) -> None:
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
        )
        shadow = {str(i): p.contiguous() for i, p in enumerate(ema.shadow_params)}
        save_file(shadow, folder / "ema.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "state.json").write_text(
            json.dumps({"step": step, "ema_step": ema.optimization_step})
        )

    older = list(output.glob("checkpoint-*"))
    _replace_folder(output / f"checkpoint-{step}", write)
    for folder in older:
        if folder.name != f"checkpoint-{step}":
            shutil.rmtree(folder)


def load_checkpoint(
    folder: Path, model: torch.nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer
) -> int:
    """Restore a checkpoint in place and return its step."""
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        shadow = load_file(folder / "ema.safetensors")
        for index, parameter in enumerate(ema.shadow_params):
            parameter.copy_(shadow[str(index)])
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        state = json.loads((folder / "state.json").read_text())
    except (RuntimeError, KeyError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'"{folder}" is not a checkpoint of this recipe: {reason}.') from error
    ema.optimization_step = state["ema_step"]
    return state["step"]


def _replace_folder(folder: Path, write: Any) -> None:
    """Fill a sibling folder, then rename it into place, so that no half-written folder is found."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
