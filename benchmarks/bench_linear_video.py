"""Speed of the linear video systems, with random weights: VFIMamba beside its floor and the published
code, LinGen beside a diffusion transformer of the same size.

    python -m tessera.benchmarks.bench_linear_video --out video.json [--device cuda] [--threads 1]

writes ``video.json`` and the same as tables, ``video.md``. Seconds are CPU-seconds of all threads on a
CPU, seconds of the device on a GPU. VFIMamba's floor is its FLOPs (products and convolutions) at the
rate of a large one, plus the exponentials of its scans at the rate of `torch.exp`; the scans' other
arithmetic and all traffic of memory are not in it.
"""

from __future__ import annotations

import time
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..generators.layers.mixer import build_mixer
from ..generators.linear_video.lingen import LinGen
from ..generators.linear_video.vfimamba import VFIMamba
from ..weights.registry import model_info
from .bench_scans import event_seconds, table
from .measure import count_flop, flop_rate
from .report import machine, write_report

# CPU-seconds of the published code for one frame: float32, one thread, its scans in plain torch.
PUBLISHED = {("vfimamba-s", 256, 448): 15.0}
FRAMES = ((256, 448), (1088, 1920))
# Latent frames of 17, 34 and 68 s at 512 pixels (8x8x8 compression, 16 a second).
CLIPS = {"17 s": (34, 64, 64), "34 s": (68, 64, 64), "68 s": (136, 64, 64)}
SMALL_CLIPS = {f"{frames} frames": (frames, 16, 16) for frames in (8, 16, 32, 64)}
LINGEN = {"dim": 3072, "depth": 4, "head_dim": 128, "d_state": 128}
SMALL_LINGEN = {"dim": 256, "depth": 2, "head_dim": 64, "d_state": 64}


def exp_rate(device: str) -> float:
    """Exponentials a second, of tensors that stay in cache."""
    x = torch.randn(2**16 if device == "cpu" else 2**24, device=device)

    def run() -> None:
        for _ in range(50):
            x.exp()

    return 50 * x.numel() / event_seconds(run, 5, device)[0]


def scan_exponentials(model: VFIMamba, height: int, width: int) -> int:
    """Of the scans over one pair: four directions, one for each step, channel and state."""
    total = 0
    for stage, blocks in enumerate(model.features.blocks[3:], start=3):
        steps = 2 * (height >> stage) * (width >> stage)
        total += sum(steps * block.scan.A_log.numel() for block in blocks)
    return total


@torch.no_grad()
def interpolation_rows(device: str, repeats: int) -> list[dict[str, Any]]:
    """One frame between two in float32, of the published sizes of model."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    flops, exponentials = flop_rate(torch.float32, device, clock=clock), exp_rate(device)
    rows = []
    for name in ("vfimamba-s", "vfimamba"):
        info = model_info(name)
        torch.manual_seed(0)
        model = info.model_class()(**info.config).eval()
        for height, width in FRAMES[: 1 if device == "cpu" else None]:
            frames = (torch.rand(2, 1, 3, height, width) * 2 - 1).unbind()
            flop = count_flop(partial(model.interpolate, *frames)) if device == "cpu" else None
            placed = model.to(device)
            frames = [frame.to(device) for frame in frames]
            seconds, _ = event_seconds(partial(placed.interpolate, *frames), repeats, device)
            row = {"model": name, "frame": f"{width}x{height}", "seconds": seconds}
            if flop is not None:
                floor = flop / flops + scan_exponentials(model, height, width) / exponentials
                row |= {"gflop": flop / 1e9, "floor": floor, "times the floor": seconds / floor}
                row["published"] = PUBLISHED.get((name, height, width))
            rows.append(row)
    return rows


def as_dit(model: LinGen, head_dim: int) -> LinGen:
    """The same transformer with full attention in place of MATE, changed in place."""
    weight = model.blocks[0].table
    for block in model.blocks:
        mixer = build_mixer("attention", weight.shape[1], head_dim=head_dim)
        block.mate = mixer.to(weight.device, weight.dtype)
    return model


@torch.no_grad()
def lingen_rows(
    device: str, repeats: int, config: dict[str, Any], clips: dict[str, tuple[int, int, int]]
) -> list[dict[str, Any]]:
    """One step of sampling a clip, without guidance; bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found: dict[str, dict[str, Any]] = {clip: {"clip": clip} for clip in clips}
    for kind in ("lingen", "dit"):
        torch.manual_seed(0)
        model = LinGen(**config).to(device, dtype).eval()
        if kind == "dit":
            model = as_dit(model, config["head_dim"])
        text = torch.randn(1, 77, model.config.text_dim, device=device, dtype=dtype)
        condition = model.condition(text, torch.ones(1, 77, dtype=torch.bool, device=device))
        now = torch.ones(1, device=device)
        for clip, shape in clips.items():
            x = torch.randn(1, model.config.latent_channels, *shape, device=device)
            row = found[clip]
            row["tokens"] = prod(model.grid(shape))
            row[f"{kind} tflop"] = model.flops(shape) / 1e12
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run = partial(model.velocity, x, now, condition)
            row[f"{kind} seconds"], _ = event_seconds(run, repeats, device)
            if device == "cuda":
                row[f"{kind} GB"] = torch.cuda.max_memory_allocated() / 1e9
    for row in found.values():
        row["flop ratio"] = row["dit tflop"] / row["lingen tflop"]
        row["speed-up"] = row["dit seconds"] / row["lingen seconds"]
    return list(found.values())


def report_on(device: str, repeats: int) -> dict[str, Any]:
    """All figures of a device."""
    on_gpu = device == "cuda"
    config = LINGEN if on_gpu else SMALL_LINGEN
    return {
        "machine": machine(device),
        "interpolation": interpolation_rows(device, repeats),
        "lingen": lingen_rows(device, repeats, config, CLIPS if on_gpu else SMALL_CLIPS),
        "lingen config": config,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    about = report["machine"]
    config = report["lingen config"]
    lines = [f"{about['name']}, {about['threads']} threads, torch {about['torch']}.", ""]
    lines += [*table(report["interpolation"]), ""]
    lines += [f"LinGen and a DiT of {config['depth']} blocks of {config['dim']}, one step:", ""]
    return "\n".join([*lines, *table(report["lingen"]), ""])


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the tables go beside it.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = torch.get_num_threads(),
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each form.")] = 3,
) -> None:
    """Measure the linear video systems on this machine."""
    torch.set_num_threads(threads)
    write_report(out, partial(report_on, device, repeats), markdown)


if __name__ == "__main__":
    typer.run(main)
