"""The training loop: one page on accelerate, for every task.

All randomness of a batch comes from a generator seeded by (seed, index) that draws for the *whole*
batch, of which each process takes its rows. Hence resuming needs no random state and continues
bit-exactly on a CPU, and two processes compute what one computes with the joined batch. (Dropout
masks, too, are seeded by the batch's index, but apart in each process.)
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..modalities.errors import InputError
from .checkpoints import load_checkpoint, newest_checkpoint, replace_folder, save_checkpoint
from .registry import TASKS
from .tasks import Task

PRECISIONS = {"fp32": "no", "bf16": "bf16"}
COUNTS = ("steps", "batch_size", "gradient_accumulation", "log_every", "save_every", "sample_every")


def train(recipe: dict[str, Any], resume: bool = False) -> Path:
    """Run a recipe to its last step and return the folder of the exported EMA model.

    The run's folder ``recipe["output"]`` gets ``recipe.json``, ``checkpoint-<step>/`` (the newest
    one), ``samples/``, ``log.jsonl``, ``tensorboard/`` and ``model/``. Under ``torchrun`` every
    process trains on its share of each batch; the metrics are those of the first process.
    Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt.

    The task "pipeline" trains nothing: see `assemble`.

    Args:
        recipe: a recipe of `load_recipe`.
        resume: continue from the newest checkpoint; without it the folder must hold none.

    Raises:
        InputError: a setting that means nothing, nothing to resume, a run that would be
            overwritten, a checkpoint of another model, or a loss that is not finite.
    """
    if recipe["task"] == "pipeline":
        from .assemble import assemble

        return assemble(recipe)
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
    if task.branches:
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
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
            norm, *_ = [
                accelerator.clip_grad_norm_(network.parameters(), settings["clip"])
                for network in task.networks
            ]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(model.parameters())
            step += 1
            progress.update(bar, completed=step)

            last, stop = step == settings["steps"], interrupted.is_set()
            log = last or step % settings["log_every"] == 0
            save = last or stop or step % settings["save_every"] == 0
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
            if stop:
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
    """No weight decay on vectors (biases, norms, single tokens), nor where a layer says so
    (``_no_weight_decay`` of a state space's own parameters)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and not hasattr(p, "_no_weight_decay")]
    seen = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in seen], "weight_decay": 0.0},
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
