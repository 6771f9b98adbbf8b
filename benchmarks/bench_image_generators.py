"""Speed of the published image generators at their smallest sizes, with random weights.

    python -m tessera.benchmarks.bench_image_generators --out generators.json [--systems "var*,rar*"]

writes ``generators.json`` and the same as a table, ``generators.md``. The bound of a system is the longer
of two times: its FLOPs (matrix products, convolutions and attention, counted as it runs) at the rate of a
large product, and the bytes of the weights that its products read, every time that they do, at the
rate of reading a buffer as large as the model. Token-by-token decoders are bound by the second, parallel
ones by the first. Rates are measured in the same run, with the same device, dtype and threads.

On a CPU, CPU-seconds are those of one thread (they depend little on what else the machine does), and the
fraction of the bound is of them; seconds are wall time with all threads. On a GPU there is wall time alone.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..weights.registry import ModelInfo, model_info
from .measure import (
    count_work,
    flop_rate,
    processor,
    read_rate,
)

# Settings, where they are not the published ones of the paper's best result.
SYSTEMS: dict[str, dict[str, Any]] = {
    "rar-b": {},
    "flexar-113m-t2i": {},
    "tokenbridge-l": {"num_steps": 2},
    "maskgit-titok-l-32": {},
    "maskgit-titok-s-128": {},
    "maskgen-vq-l": {},
    "maskgen-kl-l": {},
    "enat-l-256": {"num_steps": 8},
    "himar-b": {},
    "var-d16": {},
    "flowar-s": {"num_steps": 25},
    "xar-b": {"num_steps": 8},
}
# Timed together with their tokenizer's decoding, as the published code was.
DECODED = {"var-d16": "var-vqvae-256"}
# CPU-seconds of the published code on a like machine: batch 1, float32, the same settings.
PUBLISHED = {
    "var-d16": 38.8,
    "xar-b": 57.1,
    "flowar-s": 83.6,
    "enat-l-256": 60.9,
    "tokenbridge-l": 122.5,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT_LENGTH = 77
# On a CPU rates are of CPU time, as the times of the systems: others may use the machine.
CLOCKS = {"cpu": time.process_time, "cuda": time.perf_counter}


def build(info: ModelInfo, device: str, dtype: torch.dtype) -> nn.Module:
    """A registered model with random weights."""
    torch.manual_seed(0)
    model = info.model_class()(**info.config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(device, dtype).eval()


def conditions(model: nn.Module, batch: int) -> dict[str, Any]:
    """Classes, or features of texts."""
    config, device = model.config, model.device
    if "num_classes" in config:
        return {"labels": torch.arange(batch, device=device) % config.num_classes}
    options = {"device": device, "dtype": model.dtype}
    features, null = (torch.randn(n, TEXT_LENGTH, config.text_dim, **options) for n in (batch, 1))
    found = {"text_features": features, "null_features": null}
    if "micro_dim" in config:
        return found | {"pooled": features[:, 0], "null_pooled": null[:, 0]}
    masks = (torch.ones(n, TEXT_LENGTH, dtype=torch.bool, device=device) for n in (batch, 1))
    return found | dict(zip(("text_mask", "null_mask"), masks, strict=True))


def sampler(
    name: str, device: str, dtype: torch.dtype, batch: int
) -> tuple[nn.Module, Callable[[int | None], Tensor]]:
    """A system and a function that runs it up to a yield of its stream (None: to the end)."""
    model = build(model_info(name), device, dtype)
    given = conditions(model, batch) | SYSTEMS[name]
    tokenizer = None
    if name in DECODED:
        tokenizer = build(model_info(DECODED[name]), device, dtype)
        given |= model.tokenizer_arguments(tokenizer)

    @torch.no_grad()
    def run(stop: int | None = None) -> Tensor:
        generators = [torch.Generator(device).manual_seed(i) for i in range(batch)]
        for step, drawn in enumerate(model.stream(generators=generators, **given), start=1):
            if step == stop:
                return drawn
        return drawn if tokenizer is None else tokenizer.decode(drawn)

    return nn.ModuleList(m for m in (model, tokenizer) if m is not None), run


def compile_blocks(model: nn.Module, device: str) -> None:
    """torch.compile on every repeated block; on a GPU as CUDA graphs."""
    mode = "reduce-overhead" if device == "cuda" else "default"
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(True for _ in block.children()):
                    block.compile(mode=mode, dynamic=True)


def measure(
    name: str,
    device: str,
    dtype: torch.dtype,
    batch: int,
    threads: int,
    compiled: bool,
    rate: float,
) -> dict[str, Any]:
    """Times, work and bound of one system; ``rate`` is that of large products, in FLOP/s."""
    parts, run = sampler(name, device, dtype, batch)
    model = parts[0]
    size = sum(p.nbytes for p in parts.parameters())
    flop, read = count_work(run, parts)
    rates = {"flop_per_s": rate, "bytes_per_s": read_rate(size, device, clock=CLOCKS[device])}
    if compiled:
        compile_blocks(parts, device)
        run()
    row = {
        "system": name,
        "settings": SYSTEMS[name],
        "batch": batch,
        "parameters_m": size / dtype.itemsize / 1e6,
        "gflop": flop / 1e9,
        "weights_read_gb": read / 1e9,
        **rates,
        "bound_flop_seconds": flop / rates["flop_per_s"],
        "bound_bytes_seconds": read / rates["bytes_per_s"],
    }
    row["bound_seconds"] = max(row["bound_flop_seconds"], row["bound_bytes_seconds"])

    def timed() -> tuple[float, float]:
        run(1)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    used, cpu = timed()
    row["seconds"] = used
    if device == "cpu":
        row["cpu_seconds"] = used = cpu
        if threads > 1:
            torch.set_num_threads(threads)
            row["seconds"], _ = timed()
            torch.set_num_threads(1)
    return row | {
        "seconds_a_picture": row["seconds"] / batch,
        "tokens_per_s": batch * model.num_tokens / row["seconds"],
        "steps_per_s": model.num_yields(num_steps=SYSTEMS[name].get("num_steps")) / row["seconds"],
        "fraction_of_bound": row["bound_seconds"] / used,
        "published_cpu_seconds": PUBLISHED.get(name) if batch == 1 else None,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['device']}, {machine['dtype']}, batch {machine['batch']}, "
        f"torch {machine['torch']}{', compiled' if machine['compiled'] else ''}. CPU-s and the bound "
        f"are of one thread, s a picture of {machine['threads']}.",
        "",
        "| system | CPU-s | s a picture | tokens/s | steps/s | GFLOP | weights read, GB | "
        "by FLOPs, s | by bytes, s | fraction of the bound | published CPU-s |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in report["rows"]:
        numbers = (
            ("cpu_seconds", ".1f"),
            ("seconds_a_picture", ".2f"),
            ("tokens_per_s", ".0f"),
            ("steps_per_s", ".1f"),
            ("gflop", ".0f"),
            ("weights_read_gb", ".1f"),
            ("bound_flop_seconds", ".2f"),
            ("bound_bytes_seconds", ".2f"),
            ("fraction_of_bound", ".2f"),
            ("published_cpu_seconds", ".1f"),
        )
        cells = ("" if row.get(key) is None else f"{row[key]:{form}}" for key, form in numbers)
        name = row["system"] + (" with decoding" if row["system"] in DECODED else "")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*lines, ""])


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it.")],
    systems: Annotated[str, typer.Option(help="Names with wildcards, comma-separated.")] = "*",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)}.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Pictures made together.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="For wall time.")] = torch.get_num_threads(),
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile; on a GPU with CUDA graphs.")
    ] = False,
) -> None:
    """Measure the published image generators on this machine."""
    patterns = [pattern.strip() for pattern in systems.split(",")]
    names = [n for n in SYSTEMS if any(fnmatchcase(n, pattern) for pattern in patterns)]
    if not names:
        raise InputError(f'No system matches "{systems}": choose from {", ".join(SYSTEMS)}.')
    if dtype not in DTYPES:
        raise InputError(f'Unknown dtype "{dtype}": choose from {", ".join(DTYPES)}.')
    if device not in CLOCKS:
        raise InputError(f'Unknown device "{device}": choose from {", ".join(CLOCKS)}.')
    if device == "cpu":
        torch.set_num_threads(1)
    rate = flop_rate(DTYPES[dtype], device, clock=CLOCKS[device])
    rows: list[dict[str, Any]] = []
    with atomic_path(out) as json_path, atomic_path(out.with_suffix(".md")) as table_path:
        for name in names:
            row = measure(name, device, DTYPES[dtype], batch, threads, compiled, rate)
            typer.echo(f"{name}: {row['seconds']:.2f} s", err=True)
            rows.append(row)
            gc.collect()
        report = {
            "machine": {
                "processor": processor(),
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "dtype": dtype,
                "batch": batch,
                "threads": threads,
                "compiled": compiled,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "rows": rows,
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n", "utf8")
        table_path.write_text(markdown(report), "utf8")
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
