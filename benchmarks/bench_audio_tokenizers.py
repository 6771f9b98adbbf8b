"""Speed of the audio tokenizers at their published sizes, with random weights, on CPU.

    python -m tessera.benchmarks.bench_audio_tokenizers --out codecs.json [--only "wav*"]

encodes and decodes ten seconds of sound, and writes ``codecs.json`` and the same as a table,
``codecs.md``. The floor of a stage is its FLOPs (matrix products, convolutions, attention and LSTMs,
counted as it runs) at the rate of a large matrix product or convolution in the same dtype and
threads, measured in the same run. It is in CPU-seconds, which count all threads and so depend less
on what else the machine does than wall time.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..modalities.files import atomic_path
from ..tokenizers.base import AudioTokenizer
from ..weights.registry import model_info
from .measure import flop_rate, processor, time_stages

# What the published code, or transformers alone, needed for ten seconds on a like machine:
# CPU-seconds at batch 1, float32, one thread (encode, decode). DAC: with all 32 codebooks.
PUBLISHED = {
    "wavtokenizer-large-unify-40": (0.69, 0.69),
    "wavtokenizer-large-speech-75": (1.04, 1.27),
    "encodec-24khz": (0.97, 0.95),
    "mimi": (1.30, 1.46),
    "dac-24khz": (9.5, 18.1),
}
# Where transformers' default configuration is of another variant.
CONFIGS = {
    "dac-24khz": {
        "model_type": "dac",
        "encoder_hidden_size": 64,
        "decoder_hidden_size": 1536,
        "downsampling_ratios": [2, 4, 5, 8],
        "upsampling_ratios": [8, 5, 4, 2],
        "n_codebooks": 32,
        "sampling_rate": 24_000,
    },
}


def build(name: str) -> AudioTokenizer:
    """A registered tokenizer with random weights."""
    info = model_info(name)
    config = dict(info.config)
    if name in CONFIGS:
        config["codec_config"] = CONFIGS[name]
    torch.manual_seed(0)
    return info.model_class()(**config).eval()


@torch.no_grad()
def measure(
    tokenizer: AudioTokenizer, seconds: float, rate: float, repeats: int
) -> dict[str, dict[str, float]]:
    """Encode and decode: seconds, CPU-seconds, GFLOP, and the floor at ``rate`` FLOP a CPU-second."""
    audio = torch.rand(1, 1, round(seconds * tokenizer.sample_rate)) - 0.5
    tokens = tokenizer.encode(audio)
    stages = {
        "encode": lambda: tokenizer.encode(audio),
        "decode": lambda: tokenizer.decode(tokens),
    }
    rows = time_stages(stages, repeats)
    for row in rows.values():
        row["floor_cpu_seconds"] = 1e9 * row["gflop"] / rate
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['dtype']}, torch "
        f"{machine['torch']}; {report['gflop_per_cpu_second']:.0f} GFLOP a CPU-second at best; {report['seconds']:g} s of "
        "sound. Published: CPU-seconds of the published code, of codecs of transformers those of "
        "transformers alone, for ten seconds on a like machine.",
        "",
        "| tokenizer | stage | s | CPU-s | GFLOP | floor CPU-s | times the floor | published |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {row['tokenizer']} | {row['stage']} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | "
        f"{row['gflop']:.1f} | {row['floor_cpu_seconds']:.2f} | "
        f"{row['cpu_seconds'] / row['floor_cpu_seconds']:.1f} | {row['published_cpu_seconds']:.2f} |"
        for row in report["rows"]
    ]
    return "\n".join([*lines, ""])


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it.")],
    only: Annotated[str, typer.Option(help="Names, with wildcards.")] = "*",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = torch.get_num_threads(),
    seconds: Annotated[float, typer.Option(min=0.1, help="Of sound.")] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each stage.")] = 3,
) -> None:
    """Measure the audio tokenizers on this machine."""
    torch.set_num_threads(threads)
    rate = flop_rate(torch.float32, clock=time.process_time)
    rows: list[dict[str, Any]] = []
    with atomic_path(out) as json_path, atomic_path(out.with_suffix(".md")) as table_path:
        for name, published in PUBLISHED.items():
            if not fnmatchcase(name, only):
                continue
            tokenizer = build(name)
            found = measure(tokenizer, seconds, rate, repeats)
            for (stage, row), best in zip(found.items(), published, strict=True):
                labels = {"tokenizer": name, "stage": stage}
                rows.append({**labels, **row, "published_cpu_seconds": best})
                typer.echo(f"{name} {stage}: {row['cpu_seconds']:.2f} CPU-s", err=True)
            del tokenizer
            gc.collect()
        report = {
            "machine": {
                "processor": processor(),
                "threads": threads,
                "dtype": "float32",
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "seconds": seconds,
            "gflop_per_cpu_second": rate / 1e9,
            "rows": rows,
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n", "utf8")
        table_path.write_text(markdown(report), "utf8")
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
