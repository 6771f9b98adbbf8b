"""Speed and memory of a text-to-speech model on CPU, its work beside the floor of its arithmetic.

    python -m tessera.benchmarks.bench_voice --out voice.json [--model voice] [--minutes 1,2,5]

writes ``voice.json`` and the same as a table, ``voice.md``. The real-time factor is seconds of work
a second of speech; the first audio is the time from the call until the first piece of a stream is
there. The floor is the longer of two times: the FLOPs of a sentence at the rate of a large matrix
product, and the bytes of weights that its products read at the rate at which memory is read; both
rates are measured in the same run. Memory is the peak of a process of its own that writes a text of
so many minutes to a file, import and model included. The machine should have nothing else to do.
"""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from ..evaluation.voice import long_text, phone_count, speak
from ..modalities.errors import InputError
from ..pipelines.text_to_speech import TextToSpeechPipeline
from .bench_sticker import run_process
from .measure import count_work, flop_rate, read_rate
from .report import machine, write_report

TEXTS = (
    "The kettle is boiling.",
    "Would you like a cup of tea, or shall we wait for the others?",
    "He turned sharply and faced Gregson across the table.",
    "The train to London leaves at half past nine from platform four.",
)


def measure_speed(pipeline: TextToSpeechPipeline, repeats: int) -> list[dict[str, Any]]:
    """Each text: medians over calls, after one that does not count."""
    rows = []
    for text in TEXTS:
        speak(pipeline, text, 0)
        runs = [speak(pipeline, text, seed) for seed in range(repeats)]
        rows.append(
            {
                "text": text,
                "seconds": runs[0].seconds,
                "first_audio": median(run.first for run in runs),
                "real_time_factor": median(run.took / run.seconds for run in runs),
                "cpu_real_time_factor": median(run.cpu / run.seconds for run in runs),
            }
        )
    return rows


def measure_floor(pipeline: TextToSpeechPipeline, threads: int) -> dict[str, float]:
    """Of the longest text, a second of speech: GFLOP, bytes of weights, and the floor in seconds."""
    text = max(TEXTS, key=len)
    seconds = speak(pipeline, text, 0).seconds
    flop, read = count_work(lambda: speak(pipeline, text, 0), pipeline.generator)
    weights = sum(parameter.nbytes for parameter in pipeline.generator.parameters())
    rates = {"flop": flop_rate(torch.float32), "read": read_rate(weights)}
    floor = max(flop / rates["flop"], read / rates["read"]) / seconds
    return {
        "gflop": flop / seconds / 1e9,
        "weights_read_gb": read / seconds / 1e9,
        "gflop_per_second": rates["flop"] / 1e9,
        "read_gb_per_second": rates["read"] / 1e9,
        "real_time_factor": floor,
        "threads": threads,
    }


def measure_memory(model: str, pace: float, minutes: list[float]) -> list[dict[str, Any]]:
    """A process of its own speaks a text of each length into a file.

    Args:
        pace: seconds a phone.
    """
    rows = []
    for each in minutes:
        with tempfile.TemporaryDirectory() as folder:
            text, sound = Path(folder) / "text.txt", Path(folder) / "speech.wav"
            text.write_text(long_text(TEXTS, pace, 60 * each), "utf8")
            command = ["-m", "tessera", "speak", "--file", str(text), "-o", str(sound)]
            found = run_process([*command, "--seed", "0", "--model", model])
            import soundfile

            rows.append({"minutes": each, "spoken": soundfile.info(sound).duration, **found})
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    about, floor = report["machine"], report["floor"]
    lines = [
        f"{report['model']} on {about['name']}, {about['threads']} threads, torch {about['torch']}, "
        f"Python {about['python']}. Loaded in {report['load_seconds']:.1f} s. Floor: real-time factor "
        f"{floor['real_time_factor']:.3f} ({floor['gflop']:.2f} GFLOP and "
        f"{floor['weights_read_gb']:.2f} GB of weights a second of speech, at "
        f"{floor['gflop_per_second']:.0f} GFLOP/s and {floor['read_gb_per_second']:.1f} GB/s).",
        "",
        "| text | seconds | first audio s | real-time factor | CPU-s a second |",
        "| --- | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {row['text']} | {row['seconds']:.1f} | {row['first_audio']:.2f} | "
        f"{row['real_time_factor']:.3f} | {row['cpu_real_time_factor']:.3f} |"
        for row in report["texts"]
    ]
    if report["memory"]:
        lines += [
            "",
            "| minutes of text | spoken s | took s | peak MB |",
            "| --: | --: | --: | --: |",
        ]
        lines += [
            f"| {row['minutes']:g} | {row['spoken']:.0f} | {row['seconds']:.0f} | {row['peak_mb']:.0f} |"
            for row in report["memory"]
        ]
    return "\n".join([*lines, ""])


def parse_minutes(text: str) -> list[float]:
    """ "1,2,5" -> [1, 2, 5]; "" -> none.

    Raises:
        InputError: not numbers above 0 and up to 60.
    """
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f'"{text}" are no minutes: write for example --minutes 1,2,5.') from error
    if not all(0 < value <= 60 for value in values):
        raise InputError(f'Minutes must lie above 0 and up to 60, got "{text}".')
    return values


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it.")],
    model: Annotated[str, typer.Option(help="Name or folder of a voice.")] = "voice",
    minutes: Annotated[
        str, typer.Option(help="Lengths of text whose memory is measured.")
    ] = "1,2,5",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = torch.get_num_threads(),
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each text.")] = 3,
) -> None:
    """Measure a voice on this machine."""
    torch.set_num_threads(threads)
    lengths = parse_minutes(minutes)

    def measure() -> dict[str, Any]:
        start = time.perf_counter()
        pipeline = TextToSpeechPipeline.from_pretrained(model)
        loaded = time.perf_counter() - start
        texts = measure_speed(pipeline, repeats)
        pace = sum(row["seconds"] for row in texts) / sum(phone_count(text) for text in TEXTS)
        return {
            "model": model,
            "machine": {**machine("cpu"), "system": platform.system()},
            "load_seconds": loaded,
            "texts": texts,
            "floor": measure_floor(pipeline, threads),
            "memory": measure_memory(model, pace, lengths),
        }

    write_report(out, measure, markdown)


if __name__ == "__main__":
    typer.run(main)
