"""Speed and memory of a text-to-video model and of an interpolator on CPU.

    python -m tessera.benchmarks.bench_animated --out animated.json [--model animated-sticker]
        [--interpolation interpolation] [--frames 16,64,256,1024]

writes ``animated.json`` and the same as tables, ``animated.md``. The first preview is the time from the
call until decoded frames can be seen. The floor is the longer of two times: the FLOPs of a clip at the
rate of a large matrix product, and the bytes of weights that the generator's products read at the rate
at which memory is read; both rates are measured in the same run. Memory is the peak of a process of
its own, import and model included, that writes an MP4 of so many frames; the interpolator reads a clip
of so many frames and doubles them. The machine should have nothing else to do.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from ..modalities.errors import InputError
from ..modalities.video import save_video
from ..pipelines.auto import load_video_pipeline
from ..pipelines.text_to_video import TextToVideoPipeline
from .bench_sticker import run_process
from .measure import count_work, flop_rate, read_rate
from .report import machine, write_report

PROMPTS = ("a butterfly flapping", "red heart pulsing", "rocket rising up")
# Side of the clips that are interpolated.
SIZE = 128


def clip_times(pipeline: TextToVideoPipeline, prompt: str, seed: int) -> dict[str, float]:
    """Seconds and CPU-seconds of a clip of the default length, and until its first frames."""
    start, cpu, first = time.perf_counter(), time.process_time(), None
    for partial in pipeline.stream(prompt, seed=seed):
        if first is None and partial.preview()[0]:
            first = time.perf_counter() - start
    return {
        "first_preview": first,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


def measure_speed(pipeline: TextToVideoPipeline, repeats: int) -> list[dict[str, Any]]:
    """Each prompt: medians over calls, after one that does not count."""
    rows = []
    for prompt in PROMPTS:
        clip_times(pipeline, prompt, 0)
        runs = [clip_times(pipeline, prompt, seed) for seed in range(repeats)]
        found = {name: median(run[name] for run in runs) for name in runs[0]}
        rows.append({"prompt": prompt, "frames": pipeline.default_num_frames, **found})
    return rows


def measure_floor(pipeline: TextToVideoPipeline) -> dict[str, float]:
    """Of one clip: GFLOP, bytes of the generator's weights read, and the floor in seconds."""
    flop, read = count_work(lambda: pipeline(PROMPTS[0], seed=0), pipeline.generator)
    weights = sum(parameter.nbytes for parameter in pipeline.generator.parameters())
    rates = {"flop": flop_rate(torch.float32), "read": read_rate(weights)}
    return {
        "gflop": flop / 1e9,
        "weights_read_gb": read / 1e9,
        "gflop_per_second": rates["flop"] / 1e9,
        "read_gb_per_second": rates["read"] / 1e9,
        "seconds": max(flop / rates["flop"], read / rates["read"]),
    }


def measure_memory(
    model: str | None, interpolation: str | None, lengths: list[int]
) -> list[dict[str, Any]]:
    """A process of its own for each model and length."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source.mp4", Path(folder) / "made.mp4"
        written = ["-o", str(out), "--force", "--model"]
        for length in lengths:
            if model is not None:
                command = ["-m", "tessera", "video", PROMPTS[0], "--frames", str(length)]
                found = run_process([*command, "--seed", "0", *written, model])
                rows.append({"what": model, "frames": length, **found})
            if interpolation is not None:
                noise = torch.rand(3, 1, SIZE // 8, SIZE // 8) * 2 - 1
                still = torch.nn.functional.interpolate(noise[:, 0][None], (SIZE, SIZE))[0]
                # Something that moves: the picture shifts by a pixel a frame.
                frames = torch.stack([still.roll(i, -1) for i in range(length)], 1)
                save_video(frames, source, 24, overwrite=True)
                found = run_process(
                    ["-m", "tessera", "interpolate", str(source), *written, interpolation]
                )
                rows.append({"what": interpolation, "frames": length, **found})
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    about = report["machine"]
    lines = [
        f"{about['name']}, {about['threads']} threads, torch {about['torch']}, Python "
        f"{about['python']}.",
        "",
    ]
    if report["clips"]:
        floor = report["floor"]
        lines += [
            f"{report['model']}: loaded in {report['load_seconds']:.1f} s; floor {floor['seconds']:.2f} "
            f"s a clip ({floor['gflop']:.1f} GFLOP and {floor['weights_read_gb']:.1f} GB of weights "
            f"at {floor['gflop_per_second']:.0f} GFLOP/s and {floor['read_gb_per_second']:.1f} GB/s).",
            "",
            "| prompt | frames | first preview s | s | CPU-s |",
            "| --- | --: | --: | --: | --: |",
        ]
        lines += [
            f"| {row['prompt']} | {row['frames']} | {row['first_preview']:.2f} | "
            f"{row['seconds']:.2f} | {row['cpu_seconds']:.2f} |"
            for row in report["clips"]
        ]
        lines.append("")
    if report["memory"]:
        lines += ["| model | frames | took s | peak MB |", "| --- | --: | --: | --: |"]
        lines += [
            f"| {row['what']} | {row['frames']} | {row['seconds']:.1f} | {row['peak_mb']:.0f} |"
            for row in report["memory"]
        ]
    return "\n".join([*lines, ""])


def parse_frames(text: str) -> list[int]:
    """ "16,64" -> [16, 64]; "" -> none.

    Raises:
        InputError: not whole numbers from 2 to 1024.
    """
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f'"{text}" are no lengths: write for example --frames 16,64.') from error
    if not all(2 <= value <= 1024 for value in values):
        raise InputError(f'Lengths must lie from 2 to 1024 frames, got "{text}".')
    return values


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the tables go beside it.")],
    model: Annotated[
        str, typer.Option(help='Name or folder of a text-to-video model; "" for none.')
    ] = "animated-sticker",
    interpolation: Annotated[
        str, typer.Option(help='Name or folder of an interpolator; "" for none.')
    ] = "interpolation",
    frames: Annotated[
        str, typer.Option(help="Lengths of clips whose memory is measured.")
    ] = "16,64,256,1024",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = torch.get_num_threads(),
    repeats: Annotated[int, typer.Option(min=1, help="Timed clips of each prompt.")] = 3,
) -> None:
    """Measure the small models of video on this machine."""
    torch.set_num_threads(threads)
    lengths = parse_frames(frames)

    def measure() -> dict[str, Any]:
        report: dict[str, Any] = {"model": model, "machine": machine("cpu"), "clips": []}
        if model:
            start = time.perf_counter()
            pipeline = load_video_pipeline(model)
            report["load_seconds"] = time.perf_counter() - start
            report["clips"] = measure_speed(pipeline, repeats)
            report["floor"] = measure_floor(pipeline)
        report["memory"] = measure_memory(model or None, interpolation or None, lengths)
        return report

    write_report(out, measure, markdown)


if __name__ == "__main__":
    typer.run(main)
