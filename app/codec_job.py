"""A recording through one or several codecs, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..modalities.audio import save_audio, spectrogram_image
from ..modalities.image import save_image
from .faults import explain
from .jobs import StudioJob
from .studio import Studio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CodecRow:
    """What one codec makes of the recording.

    Attributes:
        rate: in Hz.
        bitrate: in bits a second; None of a continuous one.
        token_rate: columns of tokens a second.
        si_snr: in dB; None of silence.
        encode, decode: seconds of work a second of sound.
        approximate: it was long, and in windows since the codec does not stream.
        source, spectrum: files with the sound and with its picture.
    """

    name: str
    state: str = "queued"
    error: str = ""
    rate: int = 0
    bitrate: float | None = None
    token_rate: float = 0.0
    codebooks: int = 0
    si_snr: float | None = None
    encode: float = 0.0
    decode: float = 0.0
    approximate: bool = False
    source: str = ""
    spectrum: str = ""


class CodecJob(StudioJob):
    """
    Args:
        audio: ``[1, T]`` at ``rate`` Hz.
        name: what people call the recording.
        codecs: names of `SoundModels.codec_names`.
    """

    kind = "codecs"

    def __init__(
        self,
        studio: Studio,
        owner: str,
        audio: Tensor,
        rate: int,
        name: str,
        codecs: Sequence[str],
    ):
        super().__init__(studio, owner)
        self.audio, self.name = audio, name
        self.original = CodecRow(name, rate=rate)
        self.rows = [CodecRow(codec) for codec in codecs]

    def run(self) -> None:
        self._show(self.original, self.audio)
        self.original.state = "done"
        for row in self.rows:
            if self.cancel.is_set():
                return
            row.state = "running"
            self.touch()
            try:
                self._through(row)
                row.state = "done"
            except Exception as error:  # One codec that fails leaves the others.
                row.error, row.state = explain(error), "failed"
            self.touch()

    def view(self) -> dict[str, Any]:
        return {
            **super().view(),
            "name": self.name,
            "seconds": round(self.audio.shape[-1] / self.original.rate, 2),
            "original": vars(self.original).copy(),
            "rows": [vars(row).copy() for row in self.rows],
        }

    def _through(self, row: CodecRow) -> None:
        from ..pipelines.audio_reconstruction import reconstruct_audio

        codec = self.studio.sounds.codec(row.name)
        result = reconstruct_audio(codec, (self.audio, self.original.rate))
        row.rate, row.bitrate = codec.sample_rate, codec.bitrate
        row.token_rate, row.codebooks = codec.frame_rate, codec.num_codebooks
        (si_snr,), (speed,) = result.si_snr, result.real_time_factor
        known = self.audio.any() and math.isfinite(si_snr)
        row.si_snr = round(si_snr, 1) if known else None
        row.encode, row.decode = round(speed["encode"], 3), round(speed["decode"], 3)
        row.approximate = result.approximate[0]
        self._show(row, result.audios[0])

    def _show(self, row: CodecRow, audio: Tensor) -> None:
        number = 0 if row is self.original else 1 + self.rows.index(row)
        source, spectrum = self.scratch / f"{number}.wav", self.scratch / f"{number}.webp"
        save_audio(audio, row.rate, source)
        save_image(spectrogram_image(audio, row.rate), spectrum)
        row.source, row.spectrum = str(source), str(spectrum)
