"""Speed of the published image tokenizers at their published sizes, with random weights, on CPU.

    python -m tessera.benchmarks.bench_image_tokenizers --out tokenizers.json [--only "titok*"]

writes ``tokenizers.json`` and the same as a table, ``tokenizers.md``. The floor of a stage is its
FLOPs (matrix products, convolutions and attention, counted as it runs) at the rate of a large matrix
product or convolution in the same dtype and threads, measured in the same run. CPU-seconds count all
threads and so depend less on what else the machine does than wall time. Where CUDA is there, the
same is measured on the GPU in bf16 as well, without a floor.
"""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..modalities.files import atomic_path
from ..tokenizers.base import Tokenizer
from ..weights.registry import model_info
from .measure import flop_rate, processor, seconds_of, time_stages

# One of each system (TA-TiTok is TiTok's network and wants a text beside the tokens), and what its published code needed on a like machine: CPU-seconds at batch 1,
# float32, two threads, (encode, decode); None where it was not measured.
PUBLISHED = {
    "titok-l-32": (None, None),
    "flextok-d12-d12": (8.5, 25 * 2 * 4.2 + 9.2),  # 25 guided steps and the VAE.
    "karl-small": (10.0, None),  # Of which decoding is a part.
    "comit-b": (None, None),
    "var-vqvae-256": (4.0, 6.7),
    "kl16": (2.7, 5.2),
    "maskgit-vqgan": (None, None),
}


@torch.no_grad()
def measure(
    tokenizer: Tokenizer, batch: int, rate: float, repeats: int
) -> dict[str, dict[str, float]]:
    """Encode and decode ``batch`` pictures: seconds, CPU-seconds, GFLOP and the floor in seconds."""
    images = torch.rand(batch, 3, tokenizer.image_size, tokenizer.image_size) * 2 - 1
    tokens = tokenizer.encode(images)
    stages = {
        "encode": lambda: tokenizer.encode(images),
        "decode": lambda: tokenizer.decode(tokens),
    }
    rows = time_stages(stages, repeats)
    for row in rows.values():
        row["floor_seconds"] = 1e9 * row["gflop"] / rate
    return rows


@torch.no_grad()
def measure_gpu(tokenizer: Tokenizer, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of encode and decode in bf16 on the first GPU."""
    tokenizer = tokenizer.to("cuda", torch.bfloat16)
    images = torch.rand(batch, 3, tokenizer.image_size, tokenizer.image_size, device="cuda") * 2 - 1

    def timed(function: Callable[[], Tensor]) -> float:
        def run() -> None:
            function()
            torch.cuda.synchronize()

        return seconds_of(run, repeats)

    tokens = tokenizer.encode(images)
    return {
        "encode": timed(lambda: tokenizer.encode(images)),
        "decode": timed(lambda: tokenizer.decode(tokens)),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['dtype']}, torch "
        f"{machine['torch']}; {report['gflop_per_s']:.0f} GFLOP/s at best. Published: CPU-seconds of "
        "the published code at batch 1 on a like machine.",
        "",
        "| tokenizer | stage | batch | s | CPU-s | GFLOP | floor s | times the floor | published |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in report["rows"]:
        published = row["published_cpu_seconds"]
        lines.append(
            f"| {row['tokenizer']} | {row['stage']} | {row['batch']} | {row['seconds']:.2f} | "
            f"{row['cpu_seconds']:.2f} | {row['gflop']:.0f} | {row['floor_seconds']:.2f} | "
            f"{row['seconds'] / row['floor_seconds']:.1f} | "
            f"{'' if published is None else f'{published:.1f}'} |"
        )
    return "\n".join([*lines, ""])


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it.")],
    only: Annotated[str, typer.Option(help="Names, with wildcards.")] = "*",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = torch.get_num_threads(),
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each stage.")] = 3,
) -> None:
    """Measure the published image tokenizers on this machine."""
    torch.set_num_threads(threads)
    rate = flop_rate(torch.float32)
    rows: list[dict[str, Any]] = []
    gpu: list[dict[str, Any]] = []
    with atomic_path(out) as json_path, atomic_path(out.with_suffix(".md")) as table_path:
        for name, published in PUBLISHED.items():
            if not fnmatchcase(name, only):
                continue
            info = model_info(name)
            torch.manual_seed(0)
            tokenizer = info.model_class()(**info.config).eval()
            for batch in (int(text) for text in batches.split(",")):
                found = measure(tokenizer, batch, rate, repeats)
                for (stage, row), seconds in zip(found.items(), published, strict=True):
                    best = seconds if batch == 1 else None
                    labels = {"tokenizer": name, "stage": stage, "batch": batch}
                    rows.append({**labels, **row, "published_cpu_seconds": best})
                    typer.echo(f"{name} {stage} x{batch}: {row['seconds']:.2f} s", err=True)
                if torch.cuda.is_available():
                    seconds = measure_gpu(tokenizer, batch, repeats)
                    gpu.append({"tokenizer": name, "batch": batch, **seconds})
                    tokenizer = tokenizer.to("cpu", torch.float32)
            del tokenizer
            gc.collect()
        report = {
            "machine": {
                "processor": processor(),
                "threads": threads,
                "dtype": "float32",
                "torch": torch.__version__,
                "python": platform.python_version(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            },
            "gflop_per_s": rate / 1e9,
            "rows": rows,
            "gpu_bf16_seconds": gpu,
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n", "utf8")
        table_path.write_text(markdown(report), "utf8")
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
