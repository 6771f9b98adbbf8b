"""Sound files <-> tensors, spectra, loudness, and pictures of sound.

A recording is float32 ``[C, T]`` in [-1, 1] (channels x samples) with its sample rate in Hz; a batch
is ``[B, C, T]``. Files are read by soundfile; what it does not know (m4a, the sound of a video) by
PyAV. torchaudio lends its transforms only: its own file loading needs libraries of the system.
"""

from __future__ import annotations

import errno
import io
import math
import random
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import InputError
from .files import atomic_path, media_path, open_media
from .metadata import dump_record, parse_record

if TYPE_CHECKING:
    import soundfile

MAX_SECONDS = 3600.0
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 384_000
MAX_CHANNELS = 32
AUDIO_SUFFIXES = (
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".m4a",
    ".aac",
    ".aif",
    ".aiff",
)
# Suffix -> libsndfile's container and coding.
_SAVE_FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
}
SAVE_SUFFIXES = tuple(_SAVE_FORMATS)
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
_OPUS_RECORD_BYTES = 50_000  # libsndfile cannot read an Opus file with a longer comment.
# libsndfile crashes on one long write of Vorbis.
_BLOCK = 16_384
# Only these demuxers see files from strangers (ffmpeg's playlists, for one, open other files).
_DEMUXERS = "mov,mp4,m4a,matroska,webm,aac,mp3,ogg,flac,wav,avi,mpegts,mpeg,flv,asf,aiff,caf,amr"
_SILENCE = -math.inf
_LOUDNESS_BLOCK = 0.4  # Seconds that BS.1770 measures at once.

Source = str | Path | bytes | BinaryIO


def load_audio(
    source: Source,
    sample_rate: int | None = None,
    mono: bool = False,
    *,
    max_seconds: float = MAX_SECONDS,
    name: str | None = None,
) -> tuple[Tensor, int]:
    """Read a recording, or the first sound track of a video.

    What is louder than full scale is scaled down to it as a whole, so that nothing is clipped.

    Args:
        source: a file, the bytes of one, or an open binary file that can seek. No addresses.
        sample_rate: resample to this; default: the file's own rate.
        mono: mix all channels down to one, before resampling.
        max_seconds: longer recordings are refused.
        name: what error messages call the recording; default: its file name.

    Returns:
        float32 ``[C, T]`` in [-1, 1], T >= 1, and its sample rate in Hz.

    Raises:
        InputError: no such file, no sound in it, damaged, empty, too long, samples that are not
            finite, or more than 32 channels.
    """
    if isinstance(source, str | Path):
        path = media_path(source, "recording")
        name = name or f'"{path}"'
        with open_media(path, name, "recording") as file:
            audio, rate = _read(file, name, max_seconds)
    else:
        name = name or "the sound data"
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        audio, rate = _read(file, name, max_seconds)
    if mono:
        audio = to_channels(audio, 1)
    if sample_rate is not None and sample_rate != rate:
        audio, rate = resample(audio, rate, sample_rate), sample_rate
    return audio, rate


def _read(file: BinaryIO, name: str, max_seconds: float) -> tuple[Tensor, int]:
    start = file.tell()
    found = _read_soundfile(file, name, max_seconds)
    if found is None:
        file.seek(start)
        found = _read_av(file, name, max_seconds)
    samples, rate = found
    if not samples.shape[1]:
        raise InputError(f"Could not use {name}: it holds no samples, record it again.")
    audio = torch.from_numpy(samples)
    peak = audio.abs().max()
    if not peak.isfinite():
        raise InputError(
            f"Could not use {name}: some of its samples are not finite numbers, export it again."
        )
    return (audio / peak if peak > 1 else audio), rate


def _read_soundfile(file: BinaryIO, name: str, max_seconds: float) -> tuple[np.ndarray, int] | None:
    """Samples ``[C, T]`` and rate, or None where libsndfile does not know the format."""
    import soundfile

    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless, as ".raw" would be.
        return None
    with sound:
        _check_form(sound.channels, sound.samplerate, name)
        # Read to the end, whatever length the header claims.
        blocks, limit, count = [], max_seconds * sound.samplerate, 0
        try:
            if sound.seekable():
                # Only a seek makes libsndfile 1.2.2 leave out what Opus asks to be left out at the
                # start of files by FFmpeg; soundfile seeks after each block.
                sound.seek(0)
            while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.T)
                count += len(block)
                _check_length(count, limit, max_seconds, name)
        except soundfile.LibsndfileError as error:
            raise InputError(
                f"Could not read {name}: the recording is damaged or cut off, fetch it again."
            ) from error
        empty = np.zeros((sound.channels, 0), np.float32)
        return np.concatenate([empty, *blocks], axis=1), sound.samplerate


def _read_av(file: BinaryIO, name: str, max_seconds: float) -> tuple[np.ndarray, int]:
    import av
    import av.error

    refusal = InputError(
        f"Could not open {name}: not a WAV, FLAC, OGG, Opus, MP3, M4A or AIFF recording or a "
        "video, or a damaged one."
    )
    try:
        container = av.open(file, options={"format_whitelist": _DEMUXERS})
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise refusal from error
    with container:
        if not container.streams.audio:
            if container.streams.video:
                raise InputError(f"Could not use {name}: it has no sound track, choose another.")
            raise refusal
        stream = container.streams.audio[0]
        channels, rate = stream.codec_context.channels, stream.codec_context.sample_rate
        if not channels or not rate:
            raise refusal
        _check_form(channels, rate, name)
        resampler = av.AudioResampler(
            format="fltp", layout=stream.codec_context.layout.name, rate=rate
        )
        blocks, limit, count = [np.zeros((channels, 0), np.float32)], max_seconds * rate, 0
        try:
            for frame in container.decode(stream):
                for part in resampler.resample(frame):
                    blocks.append(part.to_ndarray())
                    count += part.samples
                _check_length(count, limit, max_seconds, name)
            for part in resampler.resample(None):
                blocks.append(part.to_ndarray())
        except InputError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            raise InputError(
                f"Could not read {name}: the sound is damaged or cut off, fetch it again."
            ) from error
        return np.concatenate(blocks, axis=1), rate


def _check_form(channels: int, rate: int, name: str) -> None:
    if channels > MAX_CHANNELS:
        raise InputError(
            f"Could not use {name}: it has {channels} channels, the limit is {MAX_CHANNELS}, mix "
            "it down first."
        )
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise InputError(
            f"Could not use {name}: its sample rate is {rate:,} Hz, export it with "
            f"{MIN_SAMPLE_RATE:,} to {MAX_SAMPLE_RATE:,} Hz."
        )


def _check_length(count: int, limit: float, max_seconds: float, name: str) -> None:
    if count > limit:
        raise InputError(
            f"Could not use {name}: it is longer than {max_seconds:g} seconds, cut it first."
        )


# --- Channels, rate, level, length ---


def to_channels(audio: Tensor, channels: int) -> Tensor:
    """``[..., C, T]`` -> ``[..., channels, T]``: as it is, the mean of all, or that mean repeated.

    Raises:
        InputError: fewer than one channel.
    """
    if channels < 1:
        raise InputError(f"A recording has at least 1 channel, got {channels}.")
    if audio.shape[-2] == channels:
        return audio
    mean = audio.mean(-2, keepdim=True)
    return mean.expand(*mean.shape[:-2], channels, mean.shape[-1]).contiguous()


def resample(audio: Tensor, rate: int, new_rate: int) -> Tensor:
    """``[..., T]`` at ``rate`` Hz -> ``[..., ceil(T * new_rate / rate)]``.

    Windowed-sinc interpolation (torchaudio's defaults: Hann window, width 6, rolloff 0.99).

    Raises:
        InputError: a rate outside 1,000 to 384,000 Hz.
    """
    for value in (rate, new_rate):
        if not MIN_SAMPLE_RATE <= value <= MAX_SAMPLE_RATE:
            raise InputError(
                f"A sample rate must lie in {MIN_SAMPLE_RATE:,} to {MAX_SAMPLE_RATE:,} Hz, got "
                f"{value:,}."
            )
    if rate == new_rate:
        return audio
    return _resampler(rate, new_rate, str(audio.device))(audio.float()).to(audio.dtype)


@lru_cache(maxsize=8)
def _resampler(rate: int, new_rate: int, device: str) -> torch.nn.Module:
    from torchaudio.transforms import Resample

    return Resample(rate, new_rate).to(device)


def decibels(amplitude: Tensor | float) -> Tensor:
    """20 log10 of an amplitude; -inf for 0."""
    return 20 * torch.as_tensor(amplitude).abs().log10()


def loudness(audio: Tensor, sample_rate: int) -> float:
    """Integrated loudness of ``[C, T]`` in LUFS (ITU-R BS.1770-4); -inf for silence.

    What is shorter than 0.4 s, one block of the standard, is repeated to that length; more than
    five channels are measured as their mean.
    """
    from torchaudio.functional import loudness as bs1770

    if audio.shape[-2] > 5:
        audio = to_channels(audio, 1)
    least = math.ceil(_LOUDNESS_BLOCK * sample_rate) + 1
    audio = audio.float().repeat(1, math.ceil(least / audio.shape[-1]))
    # torchaudio's filters clip at full scale, and the first one adds 4 dB.
    scale = max(1.0, 2 * float(audio.abs().max()))
    value = float(bs1770(audio / scale, sample_rate)) + float(decibels(scale))
    return _SILENCE if math.isnan(value) else value


def normalize_loudness(
    audio: Tensor, sample_rate: int, target: float = -20.0, peak: float = -1.0
) -> Tensor:
    """Scale ``[C, T]`` to a loudness in LUFS, or less where its peak would pass ``peak`` dBFS.

    Silence stays silence.
    """
    level = loudness(audio, sample_rate)
    if level == _SILENCE:
        return audio
    highest = float(decibels(audio.abs().max()))
    return audio * 10 ** (min(target - level, peak - highest) / 20)


def normalize_peak(audio: Tensor, peak: float = -1.0) -> Tensor:
    """Scale ``[..., T]`` so that its largest sample is ``peak`` dBFS; silence stays silence."""
    highest = audio.abs().max()
    return audio if highest == 0 else audio * (10 ** (peak / 20) / highest)


def trim_silence(
    audio: Tensor, sample_rate: int, threshold: float = -45.0, margin: float = 0.05
) -> Tensor:
    """Cut both ends of ``[C, T]`` off where 10 ms of it stay below ``threshold`` dB of the loudest.

    Args:
        threshold: in dB relative to the loudest 10 ms.
        margin: seconds kept before and after the sound.

    Returns:
        ``[C, T']``; all of it where there is only silence.
    """
    window = max(1, sample_rate // 100)
    samples = audio.shape[-1]
    padded = torch.nn.functional.pad(audio.float(), (0, -samples % window))
    power = padded.square().mean(-2).unfold(-1, window, window).mean(-1)
    if power.max() == 0:
        return audio
    loud = (power >= power.max() * 10 ** (threshold / 10)).nonzero().flatten()
    margin_samples = round(margin * sample_rate)
    first = max(0, int(loud[0]) * window - margin_samples)
    return audio[..., first : int(loud[-1] + 1) * window + margin_samples]


def random_crop(audio: Tensor, samples: int, rng: random.Random) -> Tensor:
    """``samples`` of ``[C, T]`` from a random place; a shorter recording is repeated to the length.

    Raises:
        InputError: fewer than one sample asked for, or an empty recording.
    """
    length = audio.shape[-1]
    if samples < 1 or not length:
        raise InputError(f"Cannot crop {samples} samples out of {length}.")
    if length < samples:
        audio = audio.repeat(1, math.ceil(samples / length))
        return audio[..., :samples]
    start = rng.randint(0, length - samples)
    return audio[..., start : start + samples]


def pad_batch(recordings: Sequence[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Recordings ``[C, T_i]`` -> one batch with zeros behind the shorter ones.

    Args:
        multiple: the common length is rounded up to a multiple of this.

    Returns:
        ``[B, C, T]`` and the lengths in samples, int64 ``[B]``.

    Raises:
        InputError: no recordings, or different numbers of channels.
    """
    channels = {audio.shape[0] for audio in recordings}
    if len(channels) != 1:
        raise InputError(
            f"Recordings of one batch must have one number of channels, got {sorted(channels)}: "
            "mix them down first."
        )
    lengths = torch.tensor([audio.shape[-1] for audio in recordings])
    longest = -(-int(lengths.max()) // multiple) * multiple
    batch = recordings[0].new_zeros(len(recordings), *channels, longest)
    for row, audio in zip(batch, recordings, strict=True):
        row[:, : audio.shape[-1]] = audio
    return batch, lengths


def unpad_batch(batch: Tensor, lengths: Tensor) -> list[Tensor]:
    """The recordings that `pad_batch` put together."""
    return [audio[..., :length] for audio, length in zip(batch, lengths.tolist(), strict=True)]


# --- Spectra ---


def mel_spectrogram(
    audio: Tensor,
    sample_rate: int,
    n_fft: int = 1024,
    hop_length: int = 256,
    n_mels: int = 100,
    power: float = 1.0,
    f_max: float | None = None,
) -> Tensor:
    """``[..., T]`` -> ``[..., n_mels, 1 + T // hop_length]``.

    Periodic Hann window, frames centred with reflection, HTK mel scale from 0 to ``f_max`` (default
    half the rate), filters of equal height: torchaudio's defaults, and the WavTokenizer loss's.

    Args:
        power: 1 for amplitudes, 2 for energies.
    """
    transform = _mel(sample_rate, n_fft, hop_length, n_mels, power, f_max, str(audio.device))
    return transform(audio)


def log_mel(audio: Tensor, sample_rate: int, floor: float = 1e-7, **options: Any) -> Tensor:
    """Natural logarithm of `mel_spectrogram`, values below ``floor`` raised to it."""
    return mel_spectrogram(audio, sample_rate, **options).clamp(min=floor).log()


@lru_cache(maxsize=32)
def _mel(
    sample_rate: int,
    n_fft: int,
    hop_length: int,
    n_mels: int,
    power: float,
    f_max: float | None,
    device: str,
) -> torch.nn.Module:
    from torchaudio.transforms import MelSpectrogram

    with warnings.catch_warnings(action="ignore"):  # Narrow filters between two bins are no fault.
        return MelSpectrogram(
            sample_rate,
            n_fft=n_fft,
            hop_length=hop_length,
            n_mels=n_mels,
            power=power,
            f_max=f_max,
        ).to(device)


# --- Writing ---


class AudioWriter:
    """Writes a recording piece by piece; made by `write_audio`.

    The encoder gets blocks of one size: what Vorbis and Opus make of a sound depends on the pieces
    in which it comes, and must not depend on those of the caller.
    """

    def __init__(self, sound: soundfile.SoundFile):
        self._sound = sound
        self._held = np.zeros((0, sound.channels), dtype=np.float32)
        self.samples = 0

    def write(self, audio: Tensor) -> None:
        """Append ``[C, n]`` in [-1, 1] (clamped) at the writer's rate.

        Raises:
            InputError: another number of channels, or samples that are not finite.
            OSError: the disk is full or broken.
        """
        if audio.ndim != 2 or audio.shape[0] != self._sound.channels:
            raise InputError(
                f"Sound to write must have shape [{self._sound.channels}, samples], got "
                f"{list(audio.shape)}."
            )
        audio = audio.detach().float().cpu()
        if not audio.isfinite().all():
            raise InputError("Sound to write has samples that are not finite numbers.")
        samples = np.concatenate([self._held, audio.clamp(-1, 1).T.numpy()])
        whole = len(samples) - len(samples) % _BLOCK
        for start in range(0, whole, _BLOCK):
            self._encode(samples[start : start + _BLOCK])
        self._held = samples[whole:]
        self.samples += audio.shape[1]

    def finish(self) -> None:
        """Write what is held back of the last block; called by `write_audio`."""
        self._encode(self._held)

    def _encode(self, samples: np.ndarray) -> None:
        import soundfile

        try:
            self._sound.write(np.ascontiguousarray(samples))
        except soundfile.LibsndfileError as error:
            raise _write_failure(error) from error


@contextmanager
def write_audio(
    path: str | Path,
    sample_rate: int,
    channels: int = 1,
    record: dict[str, Any] | None = None,
    overwrite: bool = True,
) -> Iterator[AudioWriter]:
    """Open a WAV, FLAC, OGG (Vorbis) or Opus file, by the suffix, to write it piece by piece.

    WAV and FLAC have 16 bits. The file appears, whole, when the block ends without an error.

    Args:
        record: how it was made (`modalities.metadata.make_record`); None gives a clean copy.

    Raises:
        InputError: an unknown suffix, a rate or a number of channels that the format cannot hold,
            a record too long for it, no samples; see also `atomic_path`.
        OSError: the disk is full or broken; nothing is left behind.
    """
    import soundfile

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SAVE_FORMATS:
        raise InputError(
            f'Could not write "{path}": its name must end in {", ".join(_SAVE_FORMATS)}.'
        )
    container, coding = _SAVE_FORMATS[suffix]
    if coding == "OPUS" and sample_rate not in _OPUS_RATES:
        raise InputError(
            f'Could not write "{path}": Opus has no sample rate of {sample_rate:,} Hz, resample '
            f"to one of {', '.join(map(str, _OPUS_RATES))} or save it as .flac."
        )
    text = None if record is None else dump_record(record)
    if coding == "OPUS" and text is not None and len(text.encode()) > _OPUS_RECORD_BYTES:
        raise InputError(
            f'Could not write "{path}": its settings take {len(text.encode()):,} bytes, too many '
            "for an Opus file, save it as .flac or .wav."
        )
    with atomic_path(path, overwrite) as temporary:
        with open(temporary, "wb"):
            pass  # Here a full or read-only disk raises as an OSError.
        try:
            sound = soundfile.SoundFile(
                temporary, "w", sample_rate, channels, format=container, subtype=coding
            )
        except (soundfile.LibsndfileError, ValueError) as error:
            raise InputError(
                f'Could not write "{path}": {suffix} cannot hold {channels} channels at '
                f"{sample_rate:,} Hz, mix it down or resample it, or save it as .wav."
            ) from error
        try:
            with sound:
                if text is not None and container != "WAV":
                    sound.comment = text
                writer = AudioWriter(sound)
                yield writer
                writer.finish()
        except soundfile.LibsndfileError as error:  # Of the last bytes, written on closing.
            raise _write_failure(error) from error
        if not writer.samples:
            raise InputError(f'Could not write "{path}": there are no samples to write.')
        if text is not None and container == "WAV":
            _append_wav_comment(temporary, text)


def save_audio(
    audio: Tensor,
    sample_rate: int,
    path: str | Path,
    record: dict[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    """Write ``[C, T]`` in [-1, 1] (clamped), whole or not at all; see `write_audio`.

    Opus knows five rates only: other sounds are resampled to the next higher one.
    """
    if Path(path).suffix.lower() == ".opus" and sample_rate not in _OPUS_RATES:
        rate = next((rate for rate in _OPUS_RATES if rate > sample_rate), _OPUS_RATES[-1])
        audio, sample_rate = resample(audio, sample_rate, rate), rate
    channels = audio.shape[0] if audio.ndim == 2 else 1
    with write_audio(path, sample_rate, channels, record, overwrite) as writer:
        writer.write(audio)


def _write_failure(error: Exception) -> OSError:
    return OSError(errno.EIO, f"the sound could not be written whole ({error}); is the disk full?")


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The generation record in a sound file, or None where there is no (sound) one.

    What comes back was checked by `parse_record`, yet anybody may have written it.

    Raises:
        InputError: no such file, or not a recording.
    """
    import soundfile

    path = media_path(path, "recording")
    with open_media(path, f'"{path}"', "recording") as file:
        if (text := _wav_comment(file)) is None:
            file.seek(0)
            try:
                with soundfile.SoundFile(file) as sound:
                    text = sound.comment
            except (soundfile.LibsndfileError, TypeError):
                file.seek(0)
                text = _av_comment(file, f'"{path}"')
    return parse_record(text) if text else None


# libsndfile keeps WAV comments of at most two thousand bytes, so this chunk is our own business.


def _append_wav_comment(path: Path, text: str) -> None:
    """Put ``LIST``/``INFO``/``ICMT`` behind the samples."""
    data = text.encode() + b"\0"
    data += b"\0" * (len(data) % 2)
    chunk = b"INFOICMT" + struct.pack("<I", len(data)) + data
    with open(path, "r+b") as file:
        file.seek(0, 2)
        file.write(b"\0" * (file.tell() % 2) + b"LIST" + struct.pack("<I", len(chunk)) + chunk)
        size = file.tell() - 8
        file.seek(4)
        file.write(struct.pack("<I", size))


def _wav_comment(file: BinaryIO) -> bytes | None:
    """The ICMT text of a RIFF WAVE file; None where there is none."""
    if file.read(4) != b"RIFF" or file.read(8)[4:] != b"WAVE":
        return None
    while len(header := file.read(8)) == 8:
        kind, size = header[:4], int.from_bytes(header[4:], "little")
        if kind == b"LIST" and size < 2**20:
            data = file.read(size + size % 2)
            place = 4
            while data[:4] == b"INFO" and place + 8 <= len(data):
                length = int.from_bytes(data[place + 4 : place + 8], "little")
                if data[place : place + 4] == b"ICMT":
                    return data[place + 8 : place + 8 + length].rstrip(b"\0")
                place += 8 + length + length % 2
        else:
            file.seek(size + size % 2, 1)
    return None


def _av_comment(file: BinaryIO, name: str) -> str | None:
    import av
    import av.error

    try:
        with av.open(file, options={"format_whitelist": _DEMUXERS}) as container:
            return container.metadata.get("comment")
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise InputError(f"Could not open {name}: not a recording, or a damaged one.") from error


# --- Pictures ---

_INK, _FAINT, _PAPER = "#3b3f46", "#e3e6ea", "#ffffff"
_WAVE, _WAVE_CORE = "#8db4e8", "#2f6fc4"
# Stops of a perceptually even ramp from black over violet and orange to a warm white.
_RAMP = ("#050310", "#2a1457", "#6a1c81", "#ab2f77", "#e65164", "#fb8861", "#fec287", "#fcfdbf")
_LEFT, _BOTTOM, _TOP, _RIGHT = 44, 24, 8, 12


def waveform_image(
    audio: Tensor, sample_rate: int, width: int = 800, height: int = 160
) -> Image.Image:
    """The samples of ``[C, T]`` (mixed to one channel) over time in seconds.

    Light: from the lowest to the highest sample of each column; dark: the RMS around it.

    Raises:
        InputError: no samples, or a picture too small for its axes.
    """
    inner = _inner_size(audio, width, height)
    columns, middle = 2 * inner[0], inner[1]
    wave = to_channels(audio.detach().float().cpu(), 1)[0].clamp(-1, 1)
    edges = [len(wave) * x // columns for x in range(columns + 1)]
    pieces = [wave[a : max(b, a + 1)] for a, b in pairwise(edges)]
    plot = Image.new("RGB", (columns, 2 * inner[1]), _PAPER)
    draw = ImageDraw.Draw(plot)
    draw.line((0, middle, columns, middle), _FAINT, 2)
    for x, piece in enumerate(pieces):
        rms = float(piece.square().mean().sqrt())
        low, high = float(piece.min()), float(piece.max())
        draw.line((x, middle * (1 - high), x, middle * (1 - low) + 1), _WAVE)
        low, high = max(low, -rms), min(high, rms)
        draw.line((x, middle * (1 - high), x, middle * (1 - low) + 1), _WAVE_CORE)
    plot = plot.resize(inner, Image.Resampling.BOX)
    canvas = Image.new("RGB", (width, height), _PAPER)
    canvas.paste(plot, (_LEFT, _TOP))
    levels = [(1.0, 0.0), (0.0, 0.5), (-1.0, 1.0)]
    _draw_axes(canvas, len(wave) / sample_rate, [(f"{v:g}", p) for v, p in levels])
    return canvas


def spectrogram_image(
    audio: Tensor, sample_rate: int, width: int = 800, height: int = 240, n_mels: int = 80
) -> Image.Image:
    """The log-mel spectrogram of ``[C, T]`` (mixed to one channel): seconds across, kHz upwards.

    80 dB from black to the loudest; frequencies above 24 kHz are left out.

    Raises:
        InputError: no samples, or a picture too small for its axes.
    """
    inner = _inner_size(audio, width, height)
    wave = to_channels(audio.detach().float().cpu(), 1)[0]
    # A window of about 46 ms tells the harmonics of a voice apart.
    n_fft = 2 ** round(math.log2(0.046 * sample_rate))
    hop = max(1, min(n_fft // 4, len(wave) // inner[0]))
    padded = torch.nn.functional.pad(wave, (0, max(0, n_fft - len(wave))))
    top = min(sample_rate / 2, 24_000.0)
    mel = mel_spectrogram(padded, sample_rate, n_fft, hop, n_mels, 2.0, top)
    mel = mel[:, : 1 + len(wave) // hop]
    level = 10 * mel.clamp(min=1e-10).log10()
    shade = ((level - level.max()) / 80 + 1).clamp(0, 1)
    if mel.max() <= 1e-10:
        shade.zero_()
    grey = Image.fromarray(shade.flip(0).numpy()).resize(inner, Image.Resampling.BICUBIC)
    shades = (np.asarray(grey).clip(0, 1) * 255).round().astype(np.uint8)
    canvas = Image.new("RGB", (width, height), _PAPER)
    canvas.paste(Image.fromarray(_ramp()[shades]), (_LEFT, _TOP))
    marks = [f for f in (0.25, 0.5, 1, 2, 4, 8, 16) if 1000 * f < 0.95 * top]
    places = [(f"{f:g}", 1 - _mels(1000 * f) / _mels(top)) for f in marks]
    _draw_axes(canvas, len(wave) / sample_rate, places, "kHz")
    return canvas


def _mels(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


@lru_cache(maxsize=1)
def _ramp() -> np.ndarray:
    """uint8 ``[256, 3]``."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _RAMP])
    at = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, i]) for i in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _inner_size(audio: Tensor, width: int, height: int) -> tuple[int, int]:
    if audio.ndim != 2 or not audio.shape[1]:
        raise InputError(
            f"A picture of sound needs samples of shape [channels, samples], got {list(audio.shape)}."
        )
    inner = (width - _LEFT - _RIGHT, height - _TOP - _BOTTOM)
    if min(inner) < 16:
        raise InputError(f"A picture of sound needs at least 80x60 pixels, got {width}x{height}.")
    return inner


def _draw_axes(
    canvas: Image.Image, seconds: float, marks: Sequence[tuple[str, float]], unit: str = ""
) -> None:
    """Frame, time in seconds below, and ``marks`` (label, 0 at the top to 1) at the left."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    width, height = canvas.size
    right, bottom = width - _RIGHT, height - _BOTTOM
    draw.rectangle((_LEFT - 1, _TOP - 1, right, bottom), outline=_FAINT)
    step = _tick(seconds, max(2, (right - _LEFT) // 80))
    for number in range(int(seconds / step + 1e-6) + 1):
        x = _LEFT + number * step / seconds * (right - _LEFT)
        draw.line((x, bottom, x, bottom + 3), _INK)
        label = f"{number * step:.10g}" + (" s" if number == 0 else "")
        draw.text((x, bottom + 5), label, _INK, font, anchor="mt")
    last = -100.0
    for label, place in sorted(marks, key=lambda mark: mark[1]):
        y = _TOP + place * (bottom - _TOP)
        draw.line((_LEFT - 4, y, _LEFT - 1, y), _INK)
        if y - last >= 12:
            text = f"{label} {unit}".strip() if last < 0 else label
            draw.text((_LEFT - 7, min(max(y, 6), bottom)), text, _INK, font, anchor="rm")
            last = y


def _tick(span: float, count: int) -> float:
    """A round distance (1, 2 or 5 times a power of ten) that cuts ``span`` into at most ``count``."""
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
