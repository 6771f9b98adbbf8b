"""Speed of the text-to-image model on CPU, each stage beside the floor that its arithmetic sets.

    python -m tessera.benchmarks.bench_sticker --out sticker.json

writes ``sticker.json`` and the same as a table, ``sticker.md``. A floor is the longer of two times:
the stage's FLOPs (matrix products, convolutions and attention, counted as it runs) at the rate of a
large matrix product or convolution, and the bytes of its weights, once a step, at the rate at which
a buffer of the generator's size is read; both rates are measured in the same run, in the same dtype
and threads. The machine should have nothing else to do.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..pipelines.seeds import seed_generators
from ..pipelines.text_to_image import TextToImagePipeline
from .measure import count_flop, flop_rate, processor, read_rate, seconds_of

PROMPT = "a red heart with an arrow"
BATCH_SIZES = (1, 8)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def generator_bytes(pipeline: TextToImagePipeline) -> int:
    """Weight bytes that the decode loop must read: the text's once, all others at every token."""
    model = pipeline.generator
    text = weight_bytes([block.cross_attn.kv for block in model.blocks])
    step = weight_bytes([model.blocks, model.norm, model.head]) - text
    return weight_bytes([model.text_projection]) + text + step * pipeline.default_num_tokens


def stage(
    name: str,
    batch: int,
    function: Callable[[], Any],
    items: int,
    unit: str,
    weights: int,
    rates: dict[str, float],
    repeats: int,
    least: float = 0.0,
) -> dict[str, Any]:
    """Time a stage beside its floor.

    Args:
        items: what one call makes, counted in ``unit``.
        weights: bytes of weights that one call must read.
        least: seconds that the floor cannot be below: those of the parts that run in turn.
    """
    flop = count_flop(function)
    seconds = seconds_of(function, repeats)
    by_flop, by_bytes = flop / rates["flop_per_s"], weights / rates["bytes_per_s"]
    floor = max(by_flop, by_bytes, least)
    return {
        "stage": name,
        "batch": batch,
        "seconds": seconds,
        "rate": items / seconds,
        "unit": f"{unit}/s",
        "gflop": flop / 1e9,
        "weight_mb": weights / 1e6,
        "floor_flop_seconds": by_flop,
        "floor_bytes_seconds": by_bytes,
        "floor_seconds": floor,
        "times_the_floor": seconds / floor,
    }


@torch.no_grad()
def measure_stages(
    pipeline: TextToImagePipeline, batch_sizes: Iterable[int] = BATCH_SIZES, repeats: int = 5
) -> dict[str, Any]:
    """The generator's decode loop, the flow decoder, the VAE under it, and the whole, warm.

    Returns:
        "rates" (FLOP/s, bytes/s), "stages" (a row for each stage and batch) and "batch_cost" (what
        the largest batch costs in units of the smallest).
    """
    pipeline.set_progress_bar_config(disable=True)
    tokenizer, config = pipeline.tokenizer, pipeline.config
    count, steps = pipeline.default_num_tokens, tokenizer.config.num_inference_steps
    model = pipeline.generator
    rates = {
        "flop_per_s": flop_rate(pipeline.dtype),
        "bytes_per_s": read_rate(weight_bytes([model.blocks, model.head])),
    }
    stages = []
    for batch in batch_sizes:
        condition = model.text_condition(pipeline.clip, [PROMPT] * batch, [""] * batch)
        settings = {k: v for k, v in pipeline.settings.items() if k != "num_inference_steps"}

        def generate(condition=condition, settings=settings, batch=batch):
            return model.generate(**condition, generators=seed_generators(0, batch), **settings)

        tokens = generate()

        def flow(tokens=tokens, batch=batch):
            return tokenizer.sample_latents(
                tokens,
                guidance_scale=config.decoder_guidance_scale,
                generator=seed_generators(0, batch),
            )

        latents = flow()
        parts = [
            ("generator, guided", generate, batch * count, "tokens", generator_bytes(pipeline)),
            (
                f"flow decoder, {steps} steps",
                flow,
                batch,
                "samples",
                steps * weight_bytes([tokenizer.decoder]),
            ),
        ]
        if tokenizer.vae is not None:

            def pixels(latents=latents):
                return tokenizer.decode_latents(latents)

            parts.append(
                ("VAE decoder", pixels, batch, "samples", weight_bytes([tokenizer.vae.decoder]))
            )

        def whole(batch=batch):
            return pipeline(
                PROMPT, num_images_per_prompt=batch, generator=seed_generators(0, batch)
            )

        rows = [
            stage(name, batch, function, items, unit, weights, rates, repeats)
            for name, function, items, unit, weights in parts
        ]
        least = sum(row["floor_seconds"] for row in rows)
        weights = weight_bytes([pipeline.clip.model.transformer]) + sum(part[4] for part in parts)
        rows.append(stage("whole", batch, whole, batch, "pictures", weights, rates, repeats, least))
        stages += rows

    smallest, largest = min(batch_sizes), max(batch_sizes)
    by_key = {(row["stage"], row["batch"]): row["seconds"] for row in stages}
    names = dict.fromkeys(row["stage"] for row in stages)
    return {
        "rates": rates,
        "stages": stages,
        "batch_cost": {name: by_key[name, largest] / by_key[name, smallest] for name in names},
    }


# The peak that a process reports includes what its parent held when it started it, so a small
# process stands between.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run_process(arguments: list[str]) -> dict[str, float]:
    """Run Python in a process of its own: wall seconds and peak memory in MB.

    Raises:
        InputError: it failed; with the last line it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f'"{" ".join(arguments)}" failed: {lines[-1]}')
    seconds, peak = map(float, done.stdout.split())
    # Linux counts in KiB, macOS in bytes.
    return {"seconds": seconds, "peak_mb": peak * (1 if sys.platform == "darwin" else 1024) / 1e6}


def measure_processes(model: str, repeats: int = 3) -> dict[str, Any]:
    """One picture by the command line in a new process, and what ``import tessera`` adds to one.

    The first process may have to read its files from disk; the others find them in memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            run_process(
                ["-m", "tessera", "image", PROMPT, "--model", model, "-o", f"{folder}/{i}.png"]
            )
            for i in range(repeats)
        ]
    code = "import time; t = time.perf_counter(); import tessera; print(time.perf_counter() - t)"
    imports = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in runs]
    return {
        "cold_first_seconds": runs[0]["seconds"],
        "cold_seconds": median(run["seconds"] for run in runs),
        "cold_peak_mb": max(run["peak_mb"] for run in runs),
        "import_seconds": median(imports),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    machine, rates = report["machine"], report["rates"]
    lines = [
        f"# {report['model']}: {report['num_tokens']} tokens, {report['image_size']} pixels",
        "",
        f"{machine['processor']}, {machine['threads']} threads, {machine['dtype']}, torch "
        f"{machine['torch']}; products at {rates['flop_per_s'] / 1e9:.0f} GFLOP/s, memory at "
        f"{rates['bytes_per_s'] / 1e9:.1f} GB/s.",
        "",
        "| stage | batch | seconds | rate | GFLOP | weights read, MB | by FLOPs, s "
        "| by bytes, s | floor, s | times the floor |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in report["stages"]:
        lines.append(
            f"| {row['stage']} | {row['batch']} | {row['seconds']:.3f} | {row['rate']:.2f} "
            f"{row['unit']} | {row['gflop']:.2f} | {row['weight_mb']:.1f} "
            f"| {row['floor_flop_seconds']:.4f} | {row['floor_bytes_seconds']:.4f} "
            f"| {row['floor_seconds']:.4f} | {row['times_the_floor']:.1f} |"
        )
    lines += ["", "| a large batch in units of the smallest | times |", "| --- | --: |"]
    lines += [f"| {name} | {cost:.2f} |" for name, cost in report["batch_cost"].items()]
    processes = report["processes"]
    lines += [
        "",
        "| one picture by the command line | |",
        "| --- | --: |",
        f"| cold, first run | {processes['cold_first_seconds']:.2f} s |",
        f"| cold, median | {processes['cold_seconds']:.2f} s |",
        f"| peak memory | {processes['cold_peak_mb']:.0f} MB |",
        f"| `import tessera` | {processes['import_seconds'] * 1000:.0f} ms |",
        "",
    ]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it.")],
    model: Annotated[str, typer.Option(help="Name or folder of the model.")] = "sticker",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = torch.get_num_threads(),
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each stage.")] = 5,
) -> None:
    """Measure the speed of a text-to-image model on this machine's CPU."""
    torch.set_num_threads(threads)
    try:
        with atomic_path(out) as json_path, atomic_path(out.with_suffix(".md")) as table_path:
            # Before this process reads the model's files and so brings them into memory.
            processes = measure_processes(model)
            pipeline = TextToImagePipeline.from_pretrained(model)
            report = {
                "model": model,
                "num_tokens": pipeline.default_num_tokens,
                "image_size": pipeline.image_size,
                "machine": {
                    "processor": processor(),
                    "threads": threads,
                    "dtype": str(pipeline.dtype).removeprefix("torch."),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "processes": processes,
                **measure_stages(pipeline, repeats=repeats),
            }
            json_path.write_text(json.dumps(report, indent=2) + "\n", "utf8")
            table_path.write_text(markdown(report), "utf8")
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
