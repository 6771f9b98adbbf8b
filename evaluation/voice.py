"""How good a voice is: what its codec keeps, whether its words are understood, how fast it speaks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from .. import __version__
from ..modalities.audio import decibels
from ..modalities.audio_datasets import VOICES, AudioTextDataset, SpeechPack, open_audio_dataset
from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..modalities.phonemes import phonemise
from .audio import (
    Recogniser,
    codec_table,
    has_package,
    open_test_split,
    pick,
    reconstruct_recordings,
    word_error_rate,
)

if TYPE_CHECKING:
    from ..pipelines.text_to_speech import TextToSpeechPipeline

# Speech this many times shorter or longer than the recordings' pace is empty or endless.
FAR_OFF = 3.0
# The loudest 20 ms of speech are above this, in dB of full scale.
SILENCE = -50.0


@dataclass
class Spoken:
    """One text as it was spoken.

    Attributes:
        audio: ``[1, n]``.
        first: seconds of wall clock until the first piece was there.
        took, cpu: until all of it was: wall clock, and work of all threads.
    """

    audio: Tensor
    seconds: float
    first: float
    took: float
    cpu: float


def speak(pipeline: TextToSpeechPipeline, text: str, seed: int) -> Spoken:
    """Speak a text as a stream, against the clock."""
    start, cpu, first, pieces = time.perf_counter(), time.process_time(), 0.0, []
    for chunk in pipeline.stream(text, seed=seed):
        first = first or time.perf_counter() - start
        pieces.append(chunk.audio)
    audio = torch.cat(pieces, dim=-1)
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Spoken(audio, audio.shape[-1] / pipeline.sample_rate, first, took, cpu)


def phone_count(text: str) -> int:
    return sum(len(sentence.phones) for sentence in phonemise(text))


def peak_memory() -> float | None:
    """The most memory that the process has had so far, in MB; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@torch.no_grad()
def evaluate_voice(
    model: str | Path | TextToSpeechPipeline,
    data: str | Path,
    recordings: int = 40,
    sentences: int = 200,
    minutes: float = 5.0,
    seed: int = 0,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a voice on sentences it was not trained on; print tables, write JSON, return the same.

    - The codec on held-out recordings: see `evaluation.audio.evaluate_audio`.
    - Word error rate of the recordings, of the codec's reconstructions of them, and of the same
      sentences as the model speaks them: by free decoding, and as a choice among these sentences.
    - Empty and endless outputs: less than a third or more than three times as long as the pace of
      the recordings (seconds a phone) would have it, or silent. Where the held-out sentences are too
      few, training sentences follow them.
    - Seconds of work a second of speech, and seconds until the first piece (after one sentence that
      does not count).
    - The process's highest memory after one minute of a long text, and after all of it.

    Args:
        model: a text-to-speech pipeline, or the name or folder of one.
        data: a speech pack, a folder of recordings with texts, or WebDataset shards.
        recordings: held-out recordings, and sentences that are recognised.
        sentences: spoken to find empty and endless ones.
        minutes: of the long text; 0 leaves it out.
        seed: picks the recordings, and speaks.
        out: JSON file to write.
        console: where progress and tables go; default stderr.

    Raises:
        InputError: a number out of range, no such model, data or file, or no recordings.
    """
    if recordings < 1 or sentences < 1 or not 0 <= minutes <= 60:
        raise InputError(
            "recordings and sentences must be at least 1 and minutes from 0 to 60, got "
            f"{recordings}, {sentences} and {minutes}."
        )
    console = console or Console(stderr=True)
    with nullcontext() if out is None else atomic_path(out) as temporary:
        label = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        if isinstance(model, (str, Path)):
            from ..pipelines.text_to_speech import TextToSpeechPipeline

            model = TextToSpeechPipeline.from_pretrained(model)
        voice = model.config.default_voice or model.voices[0]
        known = voice in VOICES and isinstance(open_audio_dataset(data), SpeechPack)
        dataset = open_test_split(data, [voice] if known else None)
        picked = pick(dataset, recordings, seed)
        texts = [dataset.text(index) for index in picked]
        listeners = {}
        if has_package("pocketsphinx"):
            listeners = {"free": Recogniser(), "sentences": Recogniser(texts)}
        codec = reconstruct_recordings(model.codec, dataset, picked, listeners, console)
        errors = codec.pop("word_error_rate")
        pace = median(_length(dataset, i) / phone_count(dataset.text(i)) for i in picked)
        more = [text for text in _other_texts(dataset, data) if text not in set(texts)]
        every = [*texts, *dict.fromkeys(more)][:sentences]
        speak(model, texts[0], seed)
        spoken, heard = [], {name: [] for name in listeners}
        with Progress(console=console, transient=True) as progress:
            for number, text in enumerate(progress.track(every, description="Speaking")):
                found = speak(model, text, seed + number)
                spoken.append((text, found, _outcome(model, found, pace * phone_count(text))))
                if number < len(texts):
                    for name, listener in listeners.items():
                        heard[name].append(listener(found.audio, model.sample_rate))
        for name, words in heard.items():
            errors[name]["generated"] = word_error_rate(words, texts[: len(words)])
        report = {
            "model": label,
            "voice": voice,
            "data": str(data),
            "software": {"tessera": __version__, "torch": torch.__version__},
            "seed": seed,
            "codec": {**codec, "word_error_rate": None},
            "word_error_rate": errors,
            "sentences": _sentence_report(spoken, pace),
            "speed": _speed_report([found for _, found, _ in spoken]),
            "long_text": _long_text(model, every, pace, minutes, seed) if minutes else None,
        }
        console.print(codec_table(report["codec"]))
        console.print(voice_table(report))
        if temporary is not None:
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf8")
    return report


def _length(dataset: AudioTextDataset, index: int) -> float:
    audio, rate = dataset.audio(index)
    return audio.shape[-1] / rate


def _other_texts(dataset: AudioTextDataset, data: str | Path) -> Iterator[str]:
    yield from (dataset.text(i) for i in range(len(dataset)))
    if isinstance(dataset, SpeechPack):
        train = SpeechPack(data, [dataset.rows[0].voice], "train", last_takes=True)
        yield from (train.text(i) for i in range(len(train)))


def _outcome(pipeline: TextToSpeechPipeline, spoken: Spoken, expected: float) -> str:
    """ "fine", "empty" or "endless", by the seconds that its phones should take."""
    window = round(0.02 * pipeline.sample_rate)
    power = spoken.audio[0].unfold(0, window, window).square().mean(-1).max()
    if spoken.seconds < expected / FAR_OFF or float(decibels(power.sqrt())) < SILENCE:
        return "empty"
    return "endless" if spoken.seconds > expected * FAR_OFF else "fine"


def _sentence_report(spoken: Sequence[tuple[str, Spoken, str]], pace: float) -> dict[str, Any]:
    outcomes = [outcome for _, _, outcome in spoken]
    return {
        "count": len(spoken),
        "empty": outcomes.count("empty"),
        "endless": outcomes.count("endless"),
        "failed": [text for text, _, outcome in spoken if outcome != "fine"],
        "seconds_a_phone": {
            "recordings": pace,
            "generated": median(found.seconds / phone_count(text) for text, found, _ in spoken),
        },
    }


def _speed_report(spoken: Sequence[Spoken]) -> dict[str, float]:
    seconds = sum(each.seconds for each in spoken)
    return {
        "real_time_factor": sum(each.took for each in spoken) / seconds,
        "cpu_real_time_factor": sum(each.cpu for each in spoken) / seconds,
        "first_audio": median(each.first for each in spoken),
        "first_audio_worst": max(each.first for each in spoken),
        "threads": torch.get_num_threads(),
    }


def long_text(texts: Sequence[str], pace: float, seconds: float) -> str:
    """The texts over and over, until they should last so long at a pace in seconds a phone."""
    lengths = [pace * phone_count(text) for text in texts]
    chosen: list[str] = []
    while seconds > 0:
        for text, length in zip(texts, lengths, strict=True):
            if seconds > 0:
                chosen.append(text)
                seconds -= length
    return "\n\n".join(chosen)


def _long_text(
    pipeline: TextToSpeechPipeline, texts: Sequence[str], pace: float, minutes: float, seed: int
) -> dict[str, Any]:
    first, start, seconds = None, time.perf_counter(), 0.0
    for chunk in pipeline.stream(long_text(texts, pace, 60 * minutes), seed=seed):
        seconds = chunk.seconds
        if first is None and seconds >= 60:
            first = peak_memory()
    return {
        "seconds": seconds,
        "took": time.perf_counter() - start,
        "peak_mb_after_a_minute": first,
        "peak_mb": peak_memory(),
    }


def voice_table(report: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, rates in report["word_error_rate"].items():
        for kind, rate in rates.items():
            table.add_row(f"word error rate ({name}), {kind}", f"{rate:.3f}")
    sentences, speed, long = report["sentences"], report["speed"], report["long_text"]
    paces = sentences["seconds_a_phone"]
    rows = {
        "sentences": f"{sentences['count']}: {sentences['empty']} empty, {sentences['endless']} endless",
        "milliseconds a phone": f"{1000 * paces['generated']:.0f} "
        f"({1000 * paces['recordings']:.0f} recorded)",
        "real-time factor": f"{speed['real_time_factor']:.3f} "
        f"(CPU {speed['cpu_real_time_factor']:.3f})",
        "first audio": f"{speed['first_audio']:.2f} s, worst {speed['first_audio_worst']:.2f} s",
    }
    if long is not None:
        before, after = long["peak_mb_after_a_minute"], long["peak_mb"]
        memory = "" if None in (before, after) else f", {before:.0f} -> {after:.0f} MB"
        rows["long text"] = f"{long['seconds']:.0f} s{memory}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table
