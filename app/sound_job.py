"""A text becomes speech, piece by piece; a caption becomes sounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modalities.audio import (
    load_audio,
    read_record,
    save_audio,
    spectrogram_image,
    waveform_image,
    write_audio,
)
from ..modalities.image import save_image
from ..pipelines.seeds import MAX_SEED, seed_generators
from .audio_records import one_line, sampling_settings, sound_record, speech_record, spoken_text
from .commands_audio import pcm
from .commands_image import weights_sha256
from .jobs import StudioJob
from .studio import Studio

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.text_to_speech import SpeechChunk

# Formats beside the saved WAV that a page can download.
MORE_FORMATS = ("flac", "ogg")


@dataclass
class Sound:
    """One sound in the making.

    Attributes:
        name: of the saved WAV in the outputs folder, empty while there is none.
        files: format -> file.
        wave, spectrum: files with pictures of it.
    """

    seed: int
    seconds: float = 0.0
    name: str = ""
    files: dict[str, str] = field(default_factory=dict)
    wave: str = ""
    spectrum: str = ""


class AudioJob(StudioJob):
    """What jobs that make sound share: their files and pictures."""

    def __init__(self, studio: Studio, owner: str, seeds: list[int]):
        super().__init__(studio, owner)
        self.items = [Sound(seed) for seed in seeds]
        self.step, self.total = 0, 0

    def afterwards(self) -> Iterator[None]:
        """The other formats for downloads."""
        for item in self.items:
            if not item.name:
                continue
            source = Path(item.files["wav"])
            audio, rate = load_audio(source)
            record = read_record(source)
            for suffix in MORE_FORMATS:
                path = self.scratch / f"{source.stem}.{suffix}"
                save_audio(audio, rate, path, record)
                item.files = {**item.files, suffix: str(path)}
                yield

    def saved(self) -> list[str]:
        return [item.name for item in self.items if item.name]

    def view(self) -> dict[str, Any]:
        return {
            **super().view(),
            "step": self.step,
            "total": self.total,
            "items": [vars(item).copy() for item in self.items],
        }

    def _finish(self, item: Sound, path: Path, audio: Tensor, rate: int) -> None:
        """Show a sound that has been saved."""
        item.files = {"wav": str(path)}
        item.name = f"{path.parent.name}/{path.name}"
        item.seconds = round(audio.shape[-1] / rate, 2)
        for kind, draw in (("wave", waveform_image), ("spectrum", spectrogram_image)):
            picture = self.scratch / f"{kind}-{item.seed}.webp"
            # Several stand side by side, where a wide picture's labels would be too small.
            width = 800 if len(self.items) == 1 else 440
            save_image(draw(audio, rate, width=width), picture)
            setattr(item, kind, str(picture))
        self.touch()


class SpeechJob(AudioJob):
    """
    Args:
        text: what to speak, checked.
        voice: None is the model's usual one.
    """

    kind = "speech"

    def __init__(
        self,
        studio: Studio,
        owner: str,
        text: str,
        seed: int,
        voice: str | None = None,
        speed: float = 1.0,
    ):
        super().__init__(studio, owner, [seed])
        self.line, self.voice, self.speed = one_line(text), voice, speed
        self.rate = 0
        self.spoken = 0.0
        self.pieces = 0
        self.words: list[tuple[str, float, float]] = []

    def run(self) -> None:
        pipeline = self.studio.sounds.voice()
        (item,) = self.items
        self.voice = self.voice or pipeline.config.default_voice or pipeline.voices[0]
        self.rate = pipeline.sample_rate
        settings = {
            "voice": self.voice,
            "speed": self.speed,
            **sampling_settings(pipeline, {}),
        }
        chunks = pipeline.stream(spoken_text(self.line), seed=item.seed, **settings)
        first = next(chunks)
        if self.cancel.is_set():
            return
        outputs = self.studio.outputs(self.owner)
        sha256 = weights_sha256(pipeline.name)
        record = speech_record(pipeline, self.line, item.seed, settings, sha256)
        path = outputs.new_path(record["prompt"], record["seed"], ".wav")
        with write_audio(path, self.rate, 1, record if outputs.metadata else None) as writer:
            for chunk in chain([first], chunks):
                writer.write(chunk.audio)
                self._hear(chunk)
                if self.cancel.is_set():
                    break
        self._finish(item, path, *load_audio(path))

    def _hear(self, chunk: SpeechChunk) -> None:
        """Put the next piece where the page fetches it."""
        path = self.scratch / f"{self.pieces}.pcm"
        path.write_bytes(pcm(chunk.audio))
        self.pieces += 1
        self.words += [
            (word.text, round(word.start, 3), round(word.end, 3)) for word in chunk.words
        ]
        self.step, self.total = chunk.sentence + 1, chunk.sentences
        self.spoken = round(chunk.seconds, 2)
        self.touch()

    def view(self) -> dict[str, Any]:
        return {
            **super().view(),
            "title": self.line,
            "unit": "sentence",
            "voice": self.voice or "",
            "speed": self.speed,
            "rate": self.rate,
            "spoken": self.spoken,
            "folder": str(self.studio.scratch / self.id),
            "pieces": self.pieces,
            "words": list(self.words),
        }


class SoundJob(AudioJob):
    """
    Args:
        caption: cleaned.
        seconds: None is as long as such sounds are.
        count: variants, of the seeds ``seed``, ``seed + 1``, ...
    """

    kind = "sound"

    def __init__(
        self,
        studio: Studio,
        owner: str,
        caption: str,
        seed: int,
        seconds: float | None = None,
        count: int = 1,
    ):
        super().__init__(studio, owner, [(seed + i) % (MAX_SEED + 1) for i in range(count)])
        self.caption, self.length = caption, seconds

    def run(self) -> None:
        pipeline = self.studio.sounds.sound()
        settings = {"seconds": self.length, **sampling_settings(pipeline, {})}
        count = len(self.items)
        generators = [seed_generators(item.seed, 1)[0] for item in self.items]
        for progress in pipeline.stream(
            self.caption, num_sounds_per_prompt=count, generator=generators, **settings
        ):
            self.step, self.total = progress.step, progress.total
            self.touch()
            if self.cancel.is_set():
                return
        made = progress.output
        outputs = self.studio.outputs(self.owner)
        sha256 = weights_sha256(pipeline.name)
        for index, (item, audio, tokens) in enumerate(
            zip(self.items, made.sounds, made.tokens, strict=True)
        ):
            record = sound_record(
                pipeline, self.caption, item.seed, index, settings, count, tokens, sha256
            )
            path = outputs.new_path(record["prompt"], record["seed"], ".wav")
            save_audio(audio, made.sample_rate, path, record if outputs.metadata else None)
            self._finish(item, path, audio, made.sample_rate)

    def view(self) -> dict[str, Any]:
        return {**super().view(), "title": self.caption, "unit": "frame"}
