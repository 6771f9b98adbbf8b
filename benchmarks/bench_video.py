"""Speed of the published video systems at their published sizes, with random weights, on CPU.

    python -m tessera.benchmarks.bench_video --out video.json [--only "larp*"]

writes ``video.json`` and the same as a table, ``video.md``. Everything is in CPU-seconds of all threads,
which depend less than wall time on what else the machine does; those of the published code were taken
on a like machine (float32, two threads). The floor is the longer of two times: the FLOPs of a call at
the rate of a large product or convolution, and the bytes of the weights that it reads at the rate of
reading a buffer of that size, both measured in the same run.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..generators.autoregressive.larp_ar import LARPGenerator
from ..generators.next_block.nbp import NBP
from ..generators.sampling import sample
from ..modalities.files import atomic_path
from ..tokenizers.video.larp import LARP
from ..tokenizers.video.nbp import NBPTokenizer
from .measure import count_work, cpu_seconds, flop_rate, processor, read_rate

# A stage, its call, and the CPU-seconds of the published code.
Stage = tuple[str, Callable[[], Any], float]


def larp() -> tuple[nn.Module, list[Stage]]:
    """The tokenizer LARP-L-long over one clip."""
    model = LARP(prior_depth=0).eval()
    model.init_weights()
    clip = torch.rand(1, 3, 16, 128, 128) * 2 - 1
    tokens = torch.randint(0, model.vocab_size, (1, model.num_tokens))
    return model, [
        ("encode a clip", lambda: model.encode(clip), 8.0),
        ("decode a clip", lambda: model.decode(tokens), 8.0),
    ]


def larp_ar() -> tuple[nn.Module, list[Stage]]:
    """The generator of size B at its last token, with the longest cache."""
    model = LARPGenerator(dim=768, depth=12, heads=12, mlp_hidden=2048).eval()
    model.init_weights()
    labels, streams = torch.zeros(1, dtype=torch.int64), [torch.Generator()]
    place = model.num_tokens - 1
    ids = torch.randint(0, model.vocab_size, (1, place))

    def token(scale: float) -> Callable[[], Tensor]:
        decoder = model.decoder(labels, scale)
        return lambda: sample(decoder(ids, place, 1)[:, 0], 1.0, None, 1.0, streams)

    return model, [("a token, guided", token(1.25), 1.1), ("a token, not guided", token(1.0), 0.53)]


def nbp() -> tuple[nn.Module, list[Stage]]:
    """The 700M transformer that continues two latent frames (K600)."""
    model = NBP(text_vocab_size=0, text_length=0).eval()
    prefix = torch.randint(0, model.vocab_size, (1, 512))

    def stream() -> Iterator[Tensor]:
        return model.stream(prefix, [torch.Generator().manual_seed(0)])

    running = stream()
    next(running)
    return model, [
        ("512 tokens read, 16 written", lambda: next(stream()), 17.8),
        ("16 tokens written", lambda: next(running), 4.8),
    ]


def nbp_tokenizer() -> tuple[nn.Module, list[Stage]]:
    """The tokenizer over one frame."""
    model = NBPTokenizer().eval()
    frame = torch.rand(1, 3, 1, 128, 128) * 2 - 1
    tokens = torch.randint(0, model.vocab_size, (1, model.tokens_per_step))
    return model, [
        ("encode a frame", lambda: model.encode(frame), 6.1),
        ("decode a frame", lambda: model.decode(tokens), 7.4),
    ]


SYSTEMS = {
    "larp-l-long": larp,
    "larp-ar-b": larp_ar,
    "nbp-700m": nbp,
    "nbp-tokenizer": nbp_tokenizer,
}


@torch.no_grad()
def measure(name: str, rate: float, repeats: int) -> list[dict[str, Any]]:
    """Rows of one system: CPU-seconds, work, and the floor."""
    torch.manual_seed(0)
    model, stages = SYSTEMS[name]()
    rows = []
    for stage, function, published in stages:
        flop, read = count_work(function, model)
        seconds = {
            "by_flop": flop / rate,
            "by_bytes": read / read_rate(read, clock=time.process_time),
        }
        rows.append(
            {
                "system": name,
                "stage": stage,
                "cpu_seconds": cpu_seconds(function, repeats),
                "gflop": flop / 1e9,
                "weights_mb": read / 1e6,
                "floor_cpu_seconds": max(seconds.values()),
                **seconds,
                "published_cpu_seconds": published,
            }
        )
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, float32, torch {machine['torch']}; "
        f"{report['gflop_per_cpu_s']:.0f} GFLOP per CPU-second at best.",
        "",
        "| system | stage | CPU-s | published CPU-s | times faster | GFLOP | weights, MB | floor, CPU-s "
        "| times the floor |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in report["rows"]:
        ours, theirs, floor = (
            row[key] for key in ("cpu_seconds", "published_cpu_seconds", "floor_cpu_seconds")
        )
        lines.append(
            f"| {row['system']} | {row['stage']} | {ours:.3f} | {theirs:g} | {theirs / ours:.1f} | "
            f"{row['gflop']:.1f} | {row['weights_mb']:.0f} | {floor:.3f} | {ours / floor:.1f} |"
        )
    return "\n".join([*lines, ""])


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it.")],
    only: Annotated[str, typer.Option(help="Names, with wildcards.")] = "*",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = torch.get_num_threads(),
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each stage.")] = 3,
) -> None:
    """Measure the published video systems on this machine."""
    torch.set_num_threads(threads)
    rate = flop_rate(torch.float32, clock=time.process_time)
    rows: list[dict[str, Any]] = []
    with atomic_path(out) as json_path, atomic_path(out.with_suffix(".md")) as table_path:
        for name in SYSTEMS:
            if fnmatchcase(name, only):
                rows += measure(name, rate, repeats)
                typer.echo(f"{name}: {rows[-1]['cpu_seconds']:.2f} CPU-s", err=True)
                gc.collect()
        report = {
            "machine": {
                "processor": processor(),
                "threads": threads,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "gflop_per_cpu_s": rate / 1e9,
            "rows": rows,
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n", "utf8")
        table_path.write_text(markdown(report), "utf8")
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
