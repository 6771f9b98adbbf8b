"""How good a codec or a voice is: signal metrics, use of the codebooks, speed, and word error rate.

Metrics come from torchmetrics, pystoi, pesq and pocketsphinx. The last three are optional, and what
needs a missing one is left out (`evaluate_audio`) or refused with the name of the package.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from .. import __version__
from ..modalities.audio import log_mel, resample
from ..modalities.audio_datasets import (
    PERMISSIVE_VOICES,
    AudioTextDataset,
    SoundPack,
    SpeechPack,
    open_audio_dataset,
    read_mono,
)
from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..modalities.phonemes import pronounce
from ..modalities.spoken_text import PAUSE_MARK, clean_text, read_sentence, split_sentences
from ..pipelines.audio_reconstruction import decode_audio, encode_audio
from ..tokenizers.base import AudioTokenizer

PESQ_RATE = 16_000
MEL_WINDOWS = (512, 1024, 2048)
RECOGNISER_RATE = 16_000


# --- Signals ---


def si_snr(audio: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio in dB (Luo and Mesgarani, arXiv 1809.07454): ``[B]``.

    Args:
        audio, reference: ``[B, 1, T]``. Phase counts: a codec that invents it scores low.
    """
    from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio

    return scale_invariant_signal_noise_ratio(audio, reference)[:, 0]


def log_mel_distance(audio: Tensor, reference: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of natural log-mel spectra over windows of 512, 1024 and 2048: ``[B]``.

    Args:
        audio, reference: ``[B, 1, T]``; amplitudes below 1e-5 count as 1e-5.
    """
    total = torch.zeros(len(audio))
    for window in MEL_WINDOWS:
        options = {"n_fft": window, "hop_length": window // 4, "n_mels": 80, "floor": 1e-5}
        short = max(0, window - audio.shape[-1])
        first, second = (
            log_mel(torch.nn.functional.pad(each, (0, short)), sample_rate, **options)
            for each in (audio, reference)
        )
        total += (first - second).abs().mean((1, 2, 3)).cpu() / len(MEL_WINDOWS)
    return total


def stoi(audio: Tensor, reference: Tensor, sample_rate: int) -> Tensor:
    """Short-time objective intelligibility (Taal et al., 2011), up to 1: ``[B]``.

    NaN where less than 0.4 s of the reference is louder than 40 dB below its loudest part, or one
    of the two is silent.

    Args:
        audio, reference: ``[B, 1, T]``.

    Raises:
        InputError: the package pystoi is missing.
    """
    _require("pystoi", "STOI")
    from pystoi import stoi as measure

    values = []
    for ours, theirs in zip(audio[:, 0], reference[:, 0], strict=True):
        if not (ours.any() and theirs.any()):
            values.append(math.nan)
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = measure(theirs.cpu().numpy(), ours.cpu().numpy(), sample_rate)
        values.append(math.nan if caught or not math.isfinite(value) else value)
    return torch.tensor(values)


def pesq(audio: Tensor, reference: Tensor, sample_rate: int) -> Tensor:
    """Perceptual evaluation of speech quality, wide band (ITU-T P.862.2), 1 to 4.6: ``[B]``.

    NaN where no speech is found.

    Args:
        audio, reference: ``[B, 1, T]``; resampled to 16 kHz.

    Raises:
        InputError: the package pesq is missing.
    """
    _require("pesq", "PESQ")
    from pesq import PesqError
    from pesq import pesq as measure

    ours, theirs = (
        resample(each[:, 0], sample_rate, PESQ_RATE).cpu() for each in (audio, reference)
    )
    values = [
        measure(PESQ_RATE, t, o, "wb", on_error=PesqError.RETURN_VALUES) if o.any() else -1
        for t, o in zip(theirs.numpy(), ours.numpy(), strict=True)
    ]
    return torch.tensor([value if value >= 0 else math.nan for value in values])


def codebook_use(tokens: Iterable[Tensor], vocab_size: int) -> dict[str, float]:
    """How evenly the ids of all tokens ``[B, Q, T]`` are used, mean over codebooks.

    Returns:
        ``perplexity``, from 1 (one id) to ``vocab_size`` (all alike); ``used``, the share of ids that
        occur; ``bits``, the entropy of a token, below log2 of ``vocab_size``.
    """
    counts: Tensor | None = None
    for part in tokens:
        found = torch.stack(
            [torch.bincount(row.flatten(), minlength=vocab_size) for row in part.unbind(1)]
        )
        counts = found if counts is None else counts + found
    if counts is None or not counts.sum():
        raise InputError("There are no tokens to count.")
    shares = counts.double() / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return {
        "perplexity": float(entropy.exp().mean()),
        "used": float((counts > 0).double().mean()),
        "bits": float(entropy.mean() / math.log(2)),
    }


# --- Words ---


def spoken_words(text: str) -> list[str]:
    """The words of a text as one says them, lower case: ``"Dr. Lee owes $5"`` ->
    ``["doctor", "lee", "owes", "five", "dollars"]``."""
    spoken = [
        word
        for sentence in split_sentences(clean_text(text))
        for written in read_sentence(sentence)
        for word in written.spoken
        if word != PAUSE_MARK
    ]
    return [word for word in (word.lower().strip("'") for word in spoken) if word]


def word_error_rate(heard: Sequence[str], texts: Sequence[str]) -> float:
    """Words substituted, left out and added, over the words of the texts: 0 is perfect.

    Raises:
        InputError: different numbers of both, or texts without words.
    """
    from torchmetrics.functional.text import word_error_rate as measure

    if len(heard) != len(texts):
        raise InputError(f"{len(heard)} transcripts cannot be compared with {len(texts)} texts.")
    references = [" ".join(spoken_words(text)) for text in texts]
    if not any(references):
        raise InputError("The texts to compare with hold no words.")
    return float(measure([text.lower() for text in heard], references))


class Recogniser:
    """pocketsphinx with its US English models: independent of everything trained here.

    Args:
        sentences: it hears one of these; default: any words, by its language model. Words that its
            dictionary lacks are read by `modalities.phonemes`.

    Raises:
        InputError: the package pocketsphinx is missing, or sentences without words.
    """

    def __init__(self, sentences: Sequence[str] | None = None):
        _require("pocketsphinx", "The word error rate")
        from pocketsphinx import Decoder

        # Means over each recording: what was heard before must not matter.
        options = {"samprate": RECOGNISER_RATE, "loglevel": "FATAL", "cmn": "batch"}
        if sentences is None:
            self.decoder = Decoder(**options)
            return
        self.decoder = Decoder(lm=None, **options)
        lines = [spoken_words(sentence) for sentence in sentences]
        if not lines or not all(lines):
            raise InputError("A grammar needs sentences, each with a word.")
        for word in {word for line in lines for word in line}:
            if self.decoder.lookup_word(word) is None:
                self.decoder.add_word(word, _sphinx_phones(word), False)
        rule = " | ".join(" ".join(line) for line in lines)
        self.decoder.add_jsgf_string("sentences", f"#JSGF V1.0; grammar g; public <s> = {rule};")
        self.decoder.activate_search("sentences")

    def __call__(self, audio: Tensor, sample_rate: int) -> str:
        """``[C, T]`` -> the words heard, lower case; empty where none are."""
        mono = resample(audio.detach().float().cpu().mean(0), sample_rate, RECOGNISER_RATE)
        pcm = (mono.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
        if not pcm.any():
            return ""
        self.decoder.start_utt()
        self.decoder.process_raw(pcm.tobytes(), full_utt=True)
        self.decoder.end_utt()
        hypothesis = self.decoder.hyp()
        return "" if hypothesis is None else hypothesis.hypstr


def _sphinx_phones(word: str) -> str:
    return " ".join("AH" if phone == "ax" else phone.upper() for phone in pronounce(word))


def _require(package: str, what: str) -> None:
    if not has_package(package):
        raise InputError(f"{what} needs the package {package}: pip install {package}.")


def has_package(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- A codec on recordings ---


@torch.no_grad()
def evaluate_audio(
    model: str | Path | AudioTokenizer,
    data: str | Path,
    recordings: int = 40,
    seed: int = 0,
    voices: Sequence[str] | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what a codec keeps of recordings; print a table, write JSON, return the same.

    Of a pack the test split is measured, of sentences that were read several times the last
    reading. Means over recordings of SI-SNR (dB), log-mel distance, STOI and PESQ; use of the
    codebooks; seconds of work (wall clock, one recording at a time) a second of sound; and, of the
    speech pack, the word error rate of the recordings themselves and of their reconstructions, by
    free decoding.

    Args:
        model: an audio tokenizer, or the name or folder of one.
        data: a speech or sound pack, a folder of recordings, or WebDataset shards.
        recordings: how many are drawn.
        seed: picks them.
        voices: of a speech pack; default: all under permissive licences.
        out: JSON file to write.
        console: where progress and the table go; default stderr.

    Raises:
        InputError: a number out of range, no such model, data or file, or no recordings.
    """
    if recordings < 1:
        raise InputError(f"recordings must be at least 1, got {recordings}.")
    console = console or Console(stderr=True)
    with nullcontext() if out is None else atomic_path(out) as temporary:
        dataset = open_test_split(data, voices)
        label = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        if isinstance(model, (str, Path)):
            from ..tokenizers.auto import AutoTokenizer

            model = AutoTokenizer.from_pretrained(model)
        if not isinstance(model, AudioTokenizer):
            raise InputError(f'"{label}" is no audio tokenizer: choose one, such as "mimi".')
        picked = pick(dataset, recordings, seed)
        listen = isinstance(dataset, SpeechPack) and has_package("pocketsphinx")
        listeners = {"free": Recogniser()} if listen else {}
        report = {
            "model": label,
            "data": str(data),
            "software": {"tessera": __version__, "torch": torch.__version__},
            "seed": seed,
            **reconstruct_recordings(model, dataset, picked, listeners, console),
        }
        report["word_error_rate"] = report["word_error_rate"].get("free")
        console.print(codec_table(report))
        if temporary is not None:
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf8")
    return report


def pick(dataset: AudioTextDataset, count: int, seed: int) -> list[int]:
    """At most so many recordings, drawn by the seed."""
    return random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))


def open_test_split(data: str | Path, voices: Sequence[str] | None) -> AudioTextDataset:
    """The held-out recordings of a pack, of sentences read several times the last; else all.

    Raises:
        InputError: none, or voices of what is no speech pack.
    """
    dataset = open_audio_dataset(data)
    if isinstance(dataset, SpeechPack):
        dataset = SpeechPack(data, voices or PERMISSIVE_VOICES, "test", last_takes=True)
    elif voices is not None:
        raise InputError(f'"{data}" is no speech pack and has no voices: leave them out.')
    elif isinstance(dataset, SoundPack):
        dataset = SoundPack(data, "test")
    if not len(dataset):
        raise InputError(f'There are no test recordings in "{data}": give the whole pack.')
    return dataset


def reconstruct_recordings(
    tokenizer: AudioTokenizer,
    dataset: AudioTextDataset,
    picked: Sequence[int],
    listeners: Mapping[str, Recogniser],
    console: Console,
) -> dict[str, Any]:
    """What a codec keeps of some recordings of a dataset; see `evaluate_audio`.

    Args:
        listeners: ``word_error_rate`` has an entry for each, of recordings and reconstructions.
    """
    rate = tokenizer.sample_rate
    metrics = {
        "si_snr": lambda a, b: si_snr(a, b),
        "log_mel": lambda a, b: log_mel_distance(a, b, rate),
    }
    if has_package("pystoi"):
        metrics["stoi"] = lambda a, b: stoi(a, b, rate)
    if has_package("pesq"):
        metrics["pesq"] = lambda a, b: pesq(a, b, rate)
    values: dict[str, list[float]] = {name: [] for name in metrics}
    tokens, seconds, encoding, decoding = [], 0.0, 0.0, 0.0
    heard: dict[tuple[str, str], list[str]] = {
        (name, kind): [] for name in listeners for kind in ("recordings", "reconstructions")
    }
    with Progress(console=console, transient=True) as progress:
        for index in progress.track(picked, description="Reconstructing"):
            audio = read_mono(dataset, index, rate)[None].to(tokenizer.device)
            start = time.perf_counter()
            found = encode_audio(tokenizer, audio)
            middle = time.perf_counter()
            decoded = decode_audio(tokenizer, found)[..., : audio.shape[-1]].float().clamp(-1, 1)
            end = time.perf_counter()
            seconds += audio.shape[-1] / rate
            encoding, decoding = encoding + middle - start, decoding + end - middle
            tokens.append(found.cpu())
            audio, decoded = audio.cpu(), decoded.cpu()
            for name, metric in metrics.items():
                values[name].append(float(metric(decoded, audio)))
            for name, listener in listeners.items():
                heard[name, "recordings"].append(listener(audio[0], rate))
                heard[name, "reconstructions"].append(listener(decoded[0], rate))
    report: dict[str, Any] = {
        "recordings": len(picked),
        "seconds": round(seconds, 2),
        "sample_rate": rate,
        "frame_rate": tokenizer.frame_rate,
        "num_codebooks": tokenizer.num_codebooks,
        "bitrate": tokenizer.bitrate,
        **{name: _mean(found) for name, found in values.items()},
        "codebooks": codebook_use(tokens, tokenizer.vocab_size) if tokenizer.vocab_size else None,
        "real_time_factor": {"encode": encoding / seconds, "decode": decoding / seconds},
        "word_error_rate": {name: {} for name in listeners},
    }
    texts = [dataset.text(index) for index in picked]
    for (name, kind), words in heard.items():
        report["word_error_rate"][name][kind] = word_error_rate(words, texts)
    return report


def _mean(values: Sequence[float]) -> float | None:
    """Mean of those that could be measured."""
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else None


def codec_table(report: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    bitrate, use, speed = report["bitrate"], report["codebooks"], report["real_time_factor"]
    rows = {
        "recordings": f"{report['recordings']}, {report['seconds']:.0f} s",
        "tokens": f"{report['num_codebooks']} x {report['frame_rate']:g}/s",
        "bit rate": None if bitrate is None else f"{bitrate / 1000:.2f} kbit/s",
        "SI-SNR": _number(report["si_snr"], ".1f", " dB"),
        "log-mel distance": _number(report["log_mel"], ".3f"),
        "STOI": _number(report.get("stoi"), ".3f"),
        "PESQ": _number(report.get("pesq"), ".2f"),
        "ids in use": None
        if use is None
        else f"{use['used']:.0%}, perplexity {use['perplexity']:.0f}",
        "real-time factor": f"encode {speed['encode']:.3f}, decode {speed['decode']:.3f}",
    }
    for kind, rate in (report["word_error_rate"] or {}).items():
        rows[f"word error rate of {kind}"] = f"{rate:.3f}"
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, value)
    return table


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{form}}{unit}"
