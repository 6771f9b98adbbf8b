"""Generators of sound that need no codec: SaShiMi over samples, ARDiT over continuous frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..generators.autoregressive.sashimi import SaShiMi
from ..generators.flow.ardit import ARDiT
from ..modalities.audio import spectrogram_image
from ..modalities.audio_datasets import (
    AudioTextDataset,
    AudioTextFolder,
    SoundPack,
    SpeechPack,
    open_audio_dataset,
    read_mono,
)
from ..modalities.errors import InputError
from ..tokenizers.audio.mel import LogMel
from ..tokenizers.auto import AutoTokenizer
from .audio_tasks import random_crops, save_stack
from .tasks import Task, build, shuffled_index

TEXTS = ("characters", "phones", "none")


def read_label(dataset: AudioTextDataset, index: int) -> str:
    """What kind of sound a recording is: its label or voice in a pack, its folder, else its text."""
    if isinstance(dataset, SoundPack):
        return dataset.rows[index].label
    if isinstance(dataset, SpeechPack):
        return dataset.rows[index].voice
    if isinstance(dataset, AudioTextFolder):
        return dataset.files[index].parent.relative_to(dataset.root).as_posix()
    return dataset.text(index)


def read_symbols(dataset: AudioTextDataset, index: int, kind: str) -> list[str]:
    """The text of a recording as "characters", in lower case, or as "phones".

    Raises:
        InputError: phones of something that has none.
    """
    if kind == "characters":
        return list(dataset.text(index).lower())
    if not isinstance(dataset, SpeechPack):
        raise InputError("Only the speech pack has phones: set data.text=characters.")
    return list(dataset.rows[index].phones)


def class_indices(dataset: AudioTextDataset, wanted: bool) -> tuple[list[str], Tensor | None]:
    """Names of all classes, and the class of each recording ``[M]``; none where none are wanted."""
    if not wanted:
        return [], None
    labels = [read_label(dataset, i) for i in range(len(dataset))]
    names = sorted(set(labels))
    return names, torch.tensor([names.index(label) for label in labels])


class SaShiMiTask(Task):
    """SaShiMi on random crops of sounds, of their classes where ``data.classes`` is true."""

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        data = recipe["data"]
        dataset = open_audio_dataset(data["root"], **data["options"])
        names, self.labels = class_indices(dataset, data["classes"])
        self.model = build(SaShiMi, classes=names, **recipe["model"])
        rate = self.model.config.sample_rate
        self.sounds = [read_mono(dataset, i, rate)[0].half() for i in range(len(dataset))]
        self.samples = round(data["seconds"] * rate)

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        picked = shuffled_index(index, size, len(self.sounds), self.recipe["seed"])
        crops = random_crops([self.sounds[int(i)] for i in picked], self.samples, generator)
        labels = None if self.labels is None else self.labels[picked][rows]
        return {"tokens": self.model.quantizer.encode(crops[rows]), "labels": labels}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Spectrograms of four short sounds."""
        model = self.model
        labels = None
        if self.labels is not None:
            labels = torch.arange(4, device=self.device) % model.num_classes
        ids = model.generate(
            [torch.Generator().manual_seed(i) for i in range(4)],
            min(self.samples, self.recipe["data"]["sample_length"]),
            labels=labels,
        )
        sounds = model.quantizer.decode(ids).cpu()
        rate = model.config.sample_rate
        save_stack([spectrogram_image(sound, rate) for sound in sounds], path)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


class ARDiTTask(Task):
    """ARDiT over the frames of a frozen continuous tokenizer, kept in memory.

    ``tokenizer: null`` takes log-mel frames with the settings under ``mel``; a folder or name takes that
    tokenizer. ``data.text`` is characters, phones or none, ``data.classes`` whether there are classes.
    """

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        data = recipe["data"]
        self.tokenizer = self.load_tokenizer().to(device)
        if data["text"] not in TEXTS:
            raise InputError(f'data.text is characters, phones or none, got "{data["text"]}".')
        dataset = open_audio_dataset(data["root"], **data["options"])
        names, self.labels = class_indices(dataset, data["classes"])
        longest = round(data["seconds"] * self.tokenizer.sample_rate)
        self.latents = [self.encode(dataset, i, longest) for i in range(len(dataset))]
        self.texts, symbols = None, []
        pace = None
        if data["text"] != "none":
            self.texts = [read_symbols(dataset, i, data["text"]) for i in range(len(dataset))]
            symbols = sorted({symbol for text in self.texts for symbol in text})
            pace = sum(map(len, self.latents)) / sum(map(len, self.texts))
        self.model = build(
            ARDiT,
            latent_dim=self.tokenizer.latent_dim,
            symbols=symbols,
            classes=names,
            latents_per_token=pace,
            **recipe["model"],
        )
        self.model.init_weights()
        every = torch.cat(self.latents)
        self.model.set_statistics(every.mean(0), every.std(0).clamp(min=1e-3))

    def load_tokenizer(self) -> nn.Module:
        """The frozen tokenizer of the recipe.

        Raises:
            InputError: it is not there, or its tokens are ids.
        """
        name = self.recipe["tokenizer"]
        if name is None:
            return build(LogMel, **self.recipe["mel"])
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.latent_dim is None:
            raise InputError(f'The tokens of "{name}" are ids: ARDiT needs a continuous tokenizer.')
        return tokenizer.requires_grad_(False)

    @torch.no_grad()
    def encode(self, dataset: AudioTextDataset, index: int, longest: int) -> Tensor:
        """A recording, cut to so many samples -> ``[N, latent_dim]``."""
        audio = read_mono(dataset, index, self.tokenizer.sample_rate)[:, :longest]
        return self.tokenizer.encode(audio[None].to(self.device))[0].float().cpu()

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        picked = shuffled_index(index, size, len(self.latents), self.recipe["seed"])[rows]
        latents = [self.latents[int(i)] for i in picked]
        texts = {}
        if self.texts is not None:
            texts = self.model.encode_text([self.texts[int(i)] for i in picked])
        return {
            "latents": nn.utils.rnn.pad_sequence(latents, batch_first=True),
            "lengths": torch.tensor([len(each) for each in latents]),
            "labels": None if self.labels is None else self.labels[picked],
            **texts,
        }

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Spectrograms of four recordings, and below each of a sound of its text and class."""
        picked = list(range(0, len(self.latents), max(1, len(self.latents) // 4)))[:4]
        texts, labels = {}, None
        if self.texts is not None:
            texts = self.model.encode_text([self.texts[i] for i in picked])
        if self.labels is not None:
            labels = self.labels[picked].to(self.device)
        lengths = torch.tensor([len(self.latents[i]) for i in picked], device=self.device)
        made = self.model.generate(
            [torch.Generator().manual_seed(i) for i in range(len(picked))],
            lengths=lengths,
            labels=labels,
            **texts,
        )
        pictures, rate = [], self.tokenizer.sample_rate
        for i, latents in zip(picked, made, strict=True):
            for each in (self.latents[i].to(self.device), latents[: len(self.latents[i])]):
                sound = self.tokenizer.decode(each[None])[0].cpu()
                pictures.append(spectrogram_image(sound, rate))
        save_stack(pictures, path)

    def export(self, folder: Path) -> None:
        """The generator, and in ``tokenizer/`` what its latents are of."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder / "tokenizer")
