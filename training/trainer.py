"""The training loop: one page on accelerate, for every task.

All randomness of a batch comes from a generator seeded by (seed, index) that draws for the *whole*
batch, of which each process takes its rows. Hence resuming needs no random state and continues
bit-exactly on a CPU, and two processes compute what one computes with the joined batch. (Dropout
masks, too, are seeded by the batch's index, but apart in each process.)
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..modalities.errors import InputError
from .tasks import TASKS, Task

PRECISIONS = {"fp32": "no", "bf16": "bf16"}
COUNTS = ("steps", "batch_size", "gradient_accumulation", "log_every", "save_every", "sample_every")


def train(recipe: dict[str, Any], resume: bool = False) -> Path:
    """Run a recipe to its last step and return the folder of the exported EMA model.

    The run's folder ``recipe["output"]`` gets ``recipe.json``, ``checkpoint-<step>/`` (the newest
    one), ``samples/``, ``log.jsonl``, ``tensorboard/`` and ``model/``. Under ``torchrun`` every
    process trains on its share of each batch; the metrics are those of the first process.
    Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt.

    Args:
        recipe: a recipe of `load_recipe`.
        resume: continue from the newest checkpoint; without it the folder must hold none.

    Raises:
        InputError: a setting that means nothing, nothing to resume, a run that would be
            overwritten, a checkpoint of another model, or a loss that is not finite.
    """
    settings = recipe["training"]
    check_settings(recipe)
    output = Path(recipe["output"])
    checkpoint = newest_checkpoint(output)
    if resume and checkpoint is None:
        raise InputError(f'Nothing to resume in "{output}": start without --resume.')
    if not resume and checkpoint is not None:
        raise InputError(f'"{output}" already holds a run: pass --resume, or another output=.')

    batch_size, accumulation = settings["batch_size"], settings["gradient_accumulation"]
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=PRECISIONS[settings["precision"]],
        gradient_accumulation_steps=accumulation,
    )
    world, rank = accelerator.num_processes, accelerator.process_index
    if batch_size % world:
        raise InputError(
            f"batch_size {batch_size} must be a multiple of the {world} processes: change it."
        )
    rows = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    main = accelerator.is_main_process

    torch.manual_seed(recipe["seed"])
    task: Task = TASKS[recipe["task"]](recipe, accelerator.device)
    model = task.model.to(accelerator.device).train()
    ema = EMAModel(
        model.parameters(),
        decay=settings["ema"],
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        foreach=True,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings["weight_decay"]),
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        fused=True,
    )
    step = 0 if checkpoint is None else load_checkpoint(checkpoint, model, ema, optimizer)
    trained = accelerator.prepare_model(model)
    if settings["compile"]:
        trained = torch.compile(trained)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.json").write_text(json.dumps(recipe, indent=2), encoding="utf8")

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not main,
    )
    events = SummaryWriter(output / "tensorboard", purge_step=step + 1) if main else nullcontext()
    with progress, events, deferred_interrupt() as interrupted:
        bar = progress.add_task(output.name, total=settings["steps"], completed=step, note="")
        logged_at, logged_step = time.perf_counter(), step
        while step < settings["steps"]:
            lr = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            metrics: dict[str, Tensor] = {}
            for index in range(step * accumulation, (step + 1) * accumulation):
                seed = recipe["seed"] * 1_000_003 + index
                torch.manual_seed(seed + rank * 2**40)
                generator = torch.Generator().manual_seed(seed)
                batch = task.batch(index, batch_size, generator, rows)
                with accelerator.accumulate(trained):
                    loss, parts = trained(**to_device(batch, accelerator.device))
                    accelerator.backward(loss)
                for key, value in {"loss": loss, **parts}.items():
                    metrics[key] = metrics.get(key, 0.0) + value.detach() / accumulation
            norm = accelerator.clip_grad_norm_(model.parameters(), settings["clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(model.parameters())
            step += 1
            progress.update(bar, completed=step)

            last = step == settings["steps"]
            log = last or step % settings["log_every"] == 0
            save = last or interrupted.is_set() or step % settings["save_every"] == 0
            # Only now are the numbers fetched, so that a GPU need not wait for them every step.
            if (log or save) and not math.isfinite(metrics["loss"]):
                raise InputError(
                    f"The loss is {float(metrics['loss'])} after step {step}: lower training.lr "
                    "and begin again."
                )
            if main and log:
                rate = (step - logged_step) * accumulation * batch_size
                rate /= time.perf_counter() - logged_at
                logged_at, logged_step = time.perf_counter(), step
                row = {key: float(value) for key, value in metrics.items()}
                row |= {"lr": lr, "grad_norm": float(norm), "items_per_second": rate}
                for key, value in row.items():
                    events.add_scalar(key, value, step)
                with open(output / "log.jsonl", "a", encoding="utf8") as file:
                    file.write(json.dumps({"step": step, **row}) + "\n")
                progress.update(bar, note=f"loss {row['loss']:.4f}  {rate:.0f}/s")
            if main and save:
                save_checkpoint(output, step, model, ema, optimizer)
            if interrupted.is_set():
                raise KeyboardInterrupt
            if main and (last or step % settings["sample_every"] == 0):
                with averaged(model, ema):
                    task.sample(output / "samples" / f"{step:06d}.png")
    if main:
        with averaged(model, ema):
            replace_folder(output / "model", task.export)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output / "model"


def check_settings(recipe: dict[str, Any]) -> None:
    """Raise InputError for an unknown task or precision, or a count below 1."""
    settings = recipe["training"]
    if recipe["task"] not in TASKS:
        raise InputError(f'Unknown task "{recipe["task"]}": choose from {", ".join(TASKS)}.')
    if settings["precision"] not in PRECISIONS:
        raise InputError(
            f'Unknown training.precision "{settings["precision"]}": choose from '
            f"{', '.join(PRECISIONS)}."
        )
    for key in COUNTS:
        if settings[key] < 1:
            raise InputError(f"training.{key} must be at least 1, got {settings[key]}.")


def learning_rate(step: int, settings: dict[str, Any]) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then cosine decay to ``min_lr``."""
    lr, warmup, total = settings["lr"], settings["warmup"], settings["steps"]
    if step < warmup:
        return lr * (step + 1) / warmup
    fraction = min(1.0, (step - warmup) / max(1, total - warmup))
    return settings["min_lr"] + (lr - settings["min_lr"]) * 0.5 * (1 + math.cos(math.pi * fraction))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No weight decay on vectors: biases, norms, single tokens."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors moved; to a GPU while it still computes the step before."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)

    return {key: move(value) for key, value in batch.items()}


@contextmanager
def averaged(model: nn.Module, ema: EMAModel) -> Iterator[None]:
    """The model holds the averaged weights inside, its own again outside."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        ema.restore(model.parameters())
        model.train()


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C only sets the event, so that a step can finish; a second one interrupts."""
    event = threading.Event()

    def on_interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, previous)
        event.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


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
