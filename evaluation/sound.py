"""How well a model of sounds makes what it is told: labels heard by a classifier of real sounds, and
whether a note is the one that was asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from .. import __version__
from ..modalities.audio import log_mel, resample
from ..modalities.audio_datasets import SoundPack, open_audio_dataset, read_mono
from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..modalities.pitch import NOTES, named_note
from ..pipelines.seeds import seed_generators

if TYPE_CHECKING:
    from ..pipelines.text_to_sound import TextToSoundPipeline

RATE, SECONDS, MELS, HOP = 16_000, 3.0, 64, 256
FRAMES = 1 + round(SECONDS * RATE) // HOP
# Nearly 80 dB below a tone at full scale: what is quieter tells a file's making, not its sound.
FLOOR = 0.05
# Labels of fewer training sounds than this are left out.
FEWEST = 4
BATCH = 32
KINDS = ("recordings", "reconstructions", "generated")


def features(audio: Tensor, sample_rate: int) -> Tensor:
    """Sound ``[1, T]`` -> log-mel ``[64, 188]`` of its first 3 s, however loud it is as a whole."""
    audio = resample(audio.float(), sample_rate, RATE)[0, : round(SECONDS * RATE)]
    audio = audio / audio.abs().max().clamp(min=1e-4)
    padded = nn.functional.pad(audio, (0, round(SECONDS * RATE) - len(audio)))
    mel = log_mel(padded, RATE, n_fft=1024, hop_length=HOP, n_mels=MELS, floor=FLOOR)
    return mel / 4 + 1


class LabelClassifier(nn.Module):
    """Log-mel ``[B, 64, T]`` -> logits ``[B, labels]``: convolutions over time, mean and maximum."""

    def __init__(self, labels: Sequence[str], dim: int = 128):
        super().__init__()
        self.labels = list(labels)
        widths = [MELS, dim, dim, dim]
        self.layers = nn.Sequential(
            *(
                layer
                for a, b in pairwise(widths)
                for layer in (nn.Conv1d(a, b, 5, 2, 2), nn.GroupNorm(8, b), nn.GELU())
            )
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * dim, len(self.labels)))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.layers(mel)
        return self.head(torch.cat([x.mean(-1), x.amax(-1)], dim=-1))


def train_classifier(
    mels: Tensor, labels: Sequence[str], epochs: int = 40, seed: int = 0
) -> LabelClassifier:
    """A classifier of log-mels ``[N, 64, T]``, in eval mode.

    Each step sees them moved in time by up to a tenth, with a stripe of bands left out.
    """
    names = sorted(set(labels))
    targets = torch.tensor([names.index(label) for label in labels])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LabelClassifier(names)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        steps = epochs * -(-len(mels) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(mels)).split(BATCH):
                moved = torch.roll(mels[rows], int(torch.randint(FRAMES // 10, ())), -1)
                band = int(torch.randint(MELS - 8, ()))
                moved[:, band : band + 8] = 0
                loss = nn.functional.cross_entropy(model(moved), targets[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: LabelClassifier, mels: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Share of log-mels ``[N, 64, T]`` whose label comes first, and among the first five."""
    targets = torch.tensor([model.labels.index(label) for label in labels])[:, None]
    best = model(mels).topk(min(5, len(model.labels)), dim=-1).indices
    return {
        "top1": float((best[:, :1] == targets).float().mean()),
        "top5": float((best == targets).any(-1).float().mean()),
    }


def strongest_note(audio: Tensor, sample_rate: int) -> str:
    """The note, whatever its octave, whose bins hold most energy of ``[1, T]`` from 55 to 1,500 Hz.

    Of 113 notes of the sound pack it is the right one in 84 %.
    """
    audio = resample(audio.float(), sample_rate, RATE)[0]
    n_fft = 8192
    audio = nn.functional.pad(audio, (0, max(0, n_fft - len(audio))))
    spectrum = torch.stft(
        audio, n_fft, n_fft // 4, window=torch.hann_window(n_fft), return_complex=True
    )
    energy = spectrum.abs().mean(-1).square()
    hertz = torch.arange(len(energy)) * RATE / n_fft
    heard = (hertz > 55) & (hertz < 1500)
    classes = (12 * torch.log2(hertz[heard] / 440) + NOTES.index("A")).round().long() % 12
    return NOTES[int(torch.zeros(12).index_add_(0, classes, energy[heard]).argmax())]


def evaluate_sound(
    model: str | Path | TextToSoundPipeline,
    data: str | Path,
    variants: int = 2,
    epochs: int = 40,
    seed: int = 0,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a model of sounds; print a table, write JSON, return the same.

    A small classifier learns labels from real training sounds alone. It then hears real test sounds,
    the codec's reconstructions of them, and sounds that the model makes of their captions. Labels of
    fewer than four training sounds are left out. Where captions name a note ("a flute playing a long
    C note") the report says how often it is the strongest one.

    Args:
        model: a text-to-sound pipeline, or the name or folder of one.
        data: a sound pack.
        variants: sounds of each test caption.
        epochs: of the classifier.
        seed: of the classifier and of the first variant.
        out: JSON file to write.
        console: where progress and the table go; default stderr.

    Raises:
        InputError: a number out of range, no such model or file, or data that are no sound pack.
    """
    if variants < 1 or epochs < 1:
        raise InputError(f"variants and epochs must be at least 1, got {variants} and {epochs}.")
    console = console or Console(stderr=True)
    with nullcontext() if out is None else atomic_path(out) as temporary:
        label = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        if not isinstance(open_audio_dataset(data), SoundPack):
            raise InputError(f'"{data}" is no sound pack: labels are needed, give such a folder.')
        if isinstance(model, (str, Path)):
            from ..pipelines.text_to_sound import TextToSoundPipeline

            model = TextToSoundPipeline.from_pretrained(model)
        counts = Counter(row.label for row in SoundPack(data, "train").rows)
        kept = {name for name, count in counts.items() if count >= FEWEST}
        train, train_labels, _ = _real(SoundPack(data, "train"), kept)
        test, test_labels, captions = _real(SoundPack(data, "test"), kept)
        if not test_labels:
            raise InputError(
                f'"{data}" has no test sounds of labels with {FEWEST} training sounds.'
            )
        classifier = train_classifier(
            torch.stack([features(x, RATE) for x in train]), train_labels, epochs, seed
        )
        decoded, made = [], []
        notes: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        with Progress(console=console, transient=True) as progress, torch.no_grad():
            for audio, caption in progress.track(
                list(zip(test, captions, strict=True)), description="Making"
            ):
                codec, rate = model.codec, model.sample_rate
                wave = resample(audio, RATE, rate)[None].to(model.device)
                again = codec.decode(codec.encode(wave))[0, :, : wave.shape[-1]].float().cpu()
                decoded.append(features(again, rate))
                wanted = named_note(caption)
                sounds = model(
                    caption,
                    num_sounds_per_prompt=variants,
                    generator=seed_generators(seed, variants),
                )
                made += [features(sound, rate) for sound in sounds.sounds]
                if wanted is not None:
                    heard = [wave[0].cpu()], [again], sounds.sounds
                    for kind, versions in zip(KINDS, heard, strict=True):
                        notes[kind] += [strongest_note(x, rate) == wanted for x in versions]
        made_labels = [name for name in test_labels for _ in range(variants)]
        report = {
            "model": label,
            "data": str(data),
            "software": {"tessera": __version__, "torch": torch.__version__},
            "seed": seed,
            "labels": len(classifier.labels),
            "training_sounds": len(train),
            "test_sounds": len(test),
            "made_sounds": len(made),
            "accuracy": {
                "recordings": accuracy(
                    classifier, torch.stack([features(x, RATE) for x in test]), test_labels
                ),
                "reconstructions": accuracy(classifier, torch.stack(decoded), test_labels),
                "generated": accuracy(classifier, torch.stack(made), made_labels),
            },
        }
        if notes["recordings"]:
            report["notes"] = {kind: fmean(right) for kind, right in notes.items()}
            report["test_notes"] = len(notes["recordings"])
        console.print(sound_table(report))
        if temporary is not None:
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf8")
    return report


def _real(pack: SoundPack, kept: set[str]) -> tuple[list[Tensor], list[str], list[str]]:
    """Sounds of the kept labels at 16 kHz, their labels and captions."""
    rows = [i for i, row in enumerate(pack.rows) if row.label in kept]
    sounds = [read_mono(pack, i, RATE)[:, : round(SECONDS * RATE)] for i in rows]
    return sounds, [pack.rows[i].label for i in rows], [pack.text(i) for i in rows]


def sound_table(report: dict[str, Any]) -> Table:
    columns = ["", f"right of {report['labels']} labels", "among five"]
    table = Table(*columns, *(["right note"] if "notes" in report else []))
    for kind, rates in report["accuracy"].items():
        row = [f"{rates['top1']:.1%}", f"{rates['top5']:.1%}"]
        if "notes" in report:
            row.append(f"{report['notes'][kind]:.1%}")
        table.add_row(kind, *row)
    return table
