"""Video files <-> frames <-> tensors.

A clip is float32 ``[C, T, H, W]`` in [-1, 1] with 3 (RGB) or 4 (RGBA, straight alpha) channels, and its
frame rate; a batch is ``[B, C, T, H, W]``. decord decodes video files; PyAV those that decord cannot
and where it is absent (and encodes everywhere); Pillow animated WebP, GIF and PNG.
"""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from . import image
from .errors import InputError
from .files import atomic_path, media_path, open_media
from .image import Color, save_animation
from .metadata import dump_record, parse_record

MAX_BYTES = 4_000_000_000
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv")
ANIMATION_SUFFIXES = (".webp", ".gif", ".png", ".apng")
SAVE_SUFFIXES = (".mp4", ".webm", *ANIMATION_SUFFIXES)

# Only these demuxers see files from strangers (ffmpeg's playlists, for one, open other files).
_DEMUXERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,h264,hevc"
_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_ANIMATIONS = ("PNG", "WEBP", "GIF", "AVIF")
# Frames decoded and thrown away before a seek to the last key frame is tried instead.
_SEEK_AHEAD = 48
# Frames that decord gives at a time.
_DECORD_FRAMES = 8
# Frames below this many rows are colour-coded by BT.601, as players assume of small ones.
_BT709_HEIGHT = 720
# FFmpeg's own decoders of VP8 and VP9 leave the alpha plane out.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

Source = str | Path | bytes
Fit = Literal["cover", "contain", "stretch"]


@dataclass
class Video:
    """A clip.

    Attributes:
        frames: float32 ``[C, T, H, W]`` in [-1, 1], C 3 or 4.
        frame_rate: frames per second.
    """

    frames: Tensor
    frame_rate: float


class Decoder(Protocol):
    """Frames of one file in the order of time.

    Attributes:
        width, height: of a frame as it is shown.
        alpha: whether frames have an alpha channel.
        times: start of each frame in seconds, float64 ``[N]``, ascending, the first 0.
        duration: seconds from the start of the first frame to the end of the last.
    """

    width: int
    height: int
    alpha: bool
    times: np.ndarray
    duration: float

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 ``[H, W, 3 or 4]`` of each index, in the order given."""


class VideoReader:
    """Frames of a video file or animation by index or time; no more of it is held in memory.

    Attributes:
        num_frames: frames in the file.
        width, height: in pixels, after the rotation that the file asks for.
        channels: of the tensors that `read` gives: 3, or 4 where transparency is kept.
        times: start of each frame in seconds from the first, float64 ``[num_frames]``.
        duration: in seconds.
        frame_rate: frames per second. In a file of variable rate, that of the even grid on which
            its time stamps lie (a frame that is shown for three steps counts as three).

    Args:
        source: a file, or the bytes of one. No addresses.
        background: colour put behind transparent frames; None keeps transparency.
        backend: "decord", "pyav", or "auto" for the first that can read the file.
        name: what error messages call the file; default: its name.

    Raises:
        InputError: no such file, a picture, no video track, an unknown format, or damaged.
    """

    def __init__(
        self,
        source: Source,
        *,
        background: Color | None = "white",
        backend: Literal["auto", "decord", "pyav"] = "auto",
        name: str | None = None,
    ):
        self._background = None if background is None else _color(background)
        with ExitStack() as stack:
            if isinstance(source, bytes):
                path, self.name = None, name or "the video data"
                file: BinaryIO = stack.enter_context(io.BytesIO(source))
            else:
                path = media_path(source, "video")
                self.name = name or f'"{path}"'
                file = stack.enter_context(open_media(path, self.name, "video"))
            self._decoder = _open(file, path, self.name, backend, stack)
            self._stack = stack.pop_all()
        decoder = self._decoder
        self.width, self.height = decoder.width, decoder.height
        self.channels = 4 if decoder.alpha and background is None else 3
        self.times, self.duration = decoder.times, decoder.duration
        self.num_frames = len(self.times)
        self.frame_rate = _frame_rate(self.times, self.duration)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def frames(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """uint8 ``[H, W, channels]`` of each index, one after the other.

        Raises:
            InputError: an index outside 0 to num_frames - 1, or damaged data.
        """
        indices = [int(i) for i in indices]
        for i in indices:
            if not 0 <= i < self.num_frames:
                raise InputError(
                    f"{self.name} has the frames 0 to {self.num_frames - 1}, not {i}: "
                    "choose one of them."
                )
        for frame in self._decoder.frames(indices):
            if frame.shape[2] == 4 and self._background is not None:
                alpha = frame[..., 3:].astype(np.float32) / 255
                mixed = frame[..., :3] * alpha + np.float32(self._background) * (1 - alpha)
                frame = mixed.round().astype(np.uint8)
            yield frame

    def at(self, seconds: Sequence[float] | np.ndarray) -> np.ndarray:
        """Index int64 ``[T]`` of the frame on the screen at each time; before the first and after
        the last, those."""
        found = np.searchsorted(self.times, np.asarray(seconds, np.float64) + 1e-6, side="right")
        return (found - 1).clip(0, self.num_frames - 1)

    def plan(
        self,
        start: float = 0.0,
        end: float | None = None,
        frame_rate: float | None = None,
        num_frames: int | None = None,
    ) -> tuple[np.ndarray, float]:
        """Which frames make an even clip.

        Args:
            start, end: seconds; default: the whole file.
            frame_rate: of the clip; default: the file's. Each frame is the one nearest in time.
            num_frames: exactly so many from ``start`` on; the last frame is repeated where the file
                (or ``end``) comes too early.

        Returns:
            indices int64 ``[T]`` for `read`, and the clip's frame rate.

        Raises:
            InputError: times outside the file, or a rate or count that means nothing.
        """
        rate = self.frame_rate if frame_rate is None else frame_rate
        end = self.duration if end is None else min(end, self.duration)
        if not 0 <= start < end:
            raise InputError(
                f"{self.name} lasts {self.duration:.2f} s: start and end must lie in it, in this "
                f"order, got {start} and {end}."
            )
        _check_rate(rate)
        count = max(1, round((end - start) * rate)) if num_frames is None else num_frames
        if count < 1:
            raise InputError(f"A clip needs at least one frame, got num_frames={count}.")
        last = np.nextafter(end, 0) - 0.5 / self.frame_rate
        # Half a step of the file later, so that rounded time stamps do not lose a frame.
        seconds = np.minimum(start + np.arange(count) / rate, max(last, start))
        return self.at(seconds + 0.5 / self.frame_rate), rate

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        size: int | None = None,
        fit: Fit = "cover",
        max_bytes: int = MAX_BYTES,
    ) -> Tensor:
        """Frames -> float32 ``[C, T, H, W]`` in [-1, 1].

        Args:
            size: make them ``size`` x ``size``, see `fit_frames`; default: as they are.
            max_bytes: refuse what would take more memory.

        Raises:
            InputError: too many, an index outside the file, or damaged data.
        """
        height, width = (self.height, self.width) if size is None else (size, size)
        shape = (self.channels, len(indices), height, width)
        check_memory(shape, max_bytes, self.name)
        clip = torch.empty(shape)
        for k, pixels in enumerate(self.frames(indices)):
            frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()
            frame = frame / 127.5 - 1
            clip[:, k] = frame if size is None else fit_frames(frame[None], size, fit)[0]
        return clip

    def chunks(self, frames: int = 16, **options: Any) -> Iterator[Tensor]:
        """The clip that `plan` (of the same options) gives, ``frames`` at a time: ``[C, <= frames,
        H, W]``."""
        indices, _ = self.plan(**options)
        for first in range(0, len(indices), frames):
            yield self.read(indices[first : first + frames])


def load_video(
    source: Source,
    *,
    start: float = 0.0,
    end: float | None = None,
    frame_rate: float | None = None,
    num_frames: int | None = None,
    size: int | None = None,
    fit: Fit = "cover",
    background: Color | None = "white",
    max_bytes: int = MAX_BYTES,
    name: str | None = None,
) -> Video:
    """A clip of a file; see `VideoReader`, its `plan` and its `read` for the arguments.

    Raises:
        InputError: no video in it, one frame only, or more than fits into ``max_bytes``.
    """
    with VideoReader(source, background=background, name=name) as reader:
        if reader.num_frames < 2:
            raise InputError(
                f"Could not use {reader.name}: it has one frame, give a clip of at least two or "
                "open it as a picture."
            )
        indices, rate = reader.plan(start, end, frame_rate, num_frames)
        return Video(reader.read(indices, size, fit, max_bytes), rate)


def check_memory(shape: Sequence[int], max_bytes: int = MAX_BYTES, name: str = "A clip") -> None:
    """Refuse clips ``[..., T, H, W]`` of float32 that would take too much memory.

    Raises:
        InputError: with the estimate.
    """
    needed = 4 * int(np.prod(shape, dtype=object))
    if needed > max_bytes:
        *_, frames, height, width = shape
        raise InputError(
            f"{name}: {frames:,} frames of {width} x {height} would take {needed / 1e9:.1f} GB of "
            f"memory, the limit is {max_bytes / 1e9:.1f} GB: ask for fewer frames, fewer a second "
            "or smaller ones."
        )


def composite(frames: Tensor, background: Color = "white") -> Tensor:
    """Clip ``[C, T, H, W]`` in [-1, 1] over a plain colour -> ``[3, T, H, W]``; RGB stays as it is.

    Raises:
        InputError: not a colour.
    """
    if frames.shape[0] == 3:
        return frames
    color = torch.tensor(_color(background), dtype=frames.dtype, device=frames.device) / 127.5 - 1
    alpha = (frames[3:] + 1) / 2
    return frames[:3] * alpha + color[:, None, None, None] * (1 - alpha)


def fit_frames(frames: Tensor, size: int, fit: Fit = "cover") -> Tensor:
    """``[T, C, H, W]`` in [-1, 1] -> ``[T, C, size, size]`` by antialiased bilinear interpolation.

    "cover" crops the longer side around the middle, "contain" keeps everything and fills up with
    transparency (RGB: white), "stretch" gives up the aspect ratio. Colours are weighted by their alpha.

    Raises:
        InputError: size below 1, or an unknown way to fit.
    """
    if size < 1:
        raise InputError(f"A clip's size must be at least 1 pixel, got {size}.")
    if fit not in ("cover", "contain", "stretch"):
        raise InputError(f'Frames are fitted by "cover", "contain" or "stretch", got "{fit}".')
    height, width = frames.shape[2:]
    alpha = frames.shape[1] == 4
    x = (frames + 1) / 2
    if alpha:
        x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], dim=1)
    side = (min if fit == "cover" else max)(height, width)
    inner = (
        [size, size]
        if fit == "stretch"
        else [max(1, round(n * size / side)) for n in (height, width)]
    )
    if inner != [height, width]:
        x = F.interpolate(x, inner, mode="bilinear", antialias=True)
    top, left = (inner[0] - size) // 2, (inner[1] - size) // 2
    if fit == "cover":
        x = x[..., top : top + size, left : left + size]
    else:
        pad = (-left, size - inner[1] + left, -top, size - inner[0] + top)
        x = F.pad(x, pad, value=0.0 if alpha else 1.0)
    if alpha:
        x = torch.cat([x[:, :3] / x[:, 3:].clamp(min=1e-6), x[:, 3:]], dim=1)
    return x.clamp(0, 1) * 2 - 1


def save_video(
    frames: Tensor | Iterable[Tensor],
    path: str | Path,
    frame_rate: float,
    record: dict[str, Any] | None = None,
    *,
    loop: bool = True,
    overwrite: bool = True,
) -> None:
    """Write MP4 (H.264), WebM (VP9), or animated WebP, PNG or GIF by the suffix, whole or not at all.

    MP4 has no transparency: white lies behind it; GIF has no half transparency. H.264 has even sizes
    only: an odd row or column is repeated, with a warning.

    Args:
        frames: clip ``[C, T, H, W]`` in [-1, 1] (clamped), C 3 or 4, or one ``[C, H, W]`` after the
            other; to MP4 and WebM these are written as they come.
        frame_rate: above 0, at most 240 (animations 100).
        record: how the clip was made, see `metadata`; without it the file is a clean copy.
        loop: whether animations start again; of MP4 and WebM the player decides.

    Raises:
        InputError: no frames or ones of several sizes, a rate or suffix that does not fit.
        OSError: the disk is full or broken; nothing is left behind.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SAVE_SUFFIXES:
        raise InputError(
            f'Could not write "{path}": its name must end in {", ".join(SAVE_SUFFIXES)}.'
        )
    _check_rate(frame_rate)
    if isinstance(frames, Tensor):
        if frames.ndim != 4:
            raise InputError(
                "A clip to write has the shape [3 or 4, frames, height, width], got "
                f"{list(frames.shape)}."
            )
        frames = frames.unbind(1)
    pictures = (image.to_pil(frame[None])[0] for frame in frames)
    if suffix in ANIMATION_SUFFIXES:
        save_animation(list(pictures), path, frame_rate, record, overwrite, loop)
        return
    with atomic_path(path, overwrite) as temporary:
        _encode(pictures, temporary, path, frame_rate, record)


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The generation record in a video file or animation, or None where there is no (sound) one.

    What comes back was checked by `parse_record`, yet anybody may have written it.

    Raises:
        InputError: no such file, or neither.
    """
    path = media_path(path, "video")
    with open_media(path, f'"{path}"', "video") as file:
        if _picture(file) is not None:
            return image.read_record(path)
        with _open_container(file, f'"{path}"') as container:
            texts = {key.lower(): text for key, text in container.metadata.items()}
    return parse_record(texts["comment"]) if "comment" in texts else None


def count_pictures(source: Source) -> int:
    """Frames of a picture or animation, by its header; 0 of anything else, also of no file at all."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            picture = _picture(file)
            return 0 if picture is None else getattr(picture, "n_frames", 1)
    except OSError:
        return 0


def _color(background: Color) -> tuple[int, ...]:
    try:
        found = ImageColor.getrgb(background) if isinstance(background, str) else background
        return tuple(found)[:3]
    except (ValueError, TypeError) as error:
        raise InputError(
            f'"{background}" is not a colour: give a name such as "white" or a code such as '
            '"#ff8800".'
        ) from error


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 240:
        raise InputError(f"Frames per second must be above 0 and at most 240, got {rate}.")


def _frame_rate(times: np.ndarray, duration: float) -> float:
    """Steps a second of the even grid on which frames start, although equal neighbours may be merged
    into one frame and time stamps are rounded (to 10 ms in a GIF)."""
    spans = np.diff(np.append(times, duration))
    # A tenth of the spans may be short by accident.
    step = np.quantile(spans, 0.1, method="lower")
    for _ in range(3):
        steps = np.maximum(1, np.rint(spans / step)).sum()
        step = duration / steps
    whole = round(1 / step)
    if whole and abs(steps / whole - duration) < 0.006:
        return float(whole)
    return float(steps / duration)


def _picture(file: BinaryIO) -> Image.Image | None:
    """The header of a picture or animation; None where it is none. The file stands at 0 again."""
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            return Image.open(file, formats=_PICTURES)
    except MemoryError:
        raise
    except Exception:  # Damaged headers raise about every kind of exception.
        return None
    finally:
        file.seek(0)


def _open(file: BinaryIO, path: Path | None, name: str, backend: str, stack: ExitStack) -> Decoder:
    picture = _picture(file)
    if picture is not None:
        if picture.format not in _ANIMATIONS or getattr(picture, "n_frames", 1) < 2:
            raise InputError(
                f"Could not open {name}: it is a picture ({picture.format}), not a video, give a clip."
            )
        if picture.width * picture.height > image.MAX_PIXELS:
            raise InputError(
                f"Could not open {name}: its frames have {picture.width * picture.height:,} pixels, "
                f"the limit is {image.MAX_PIXELS:,}, make them smaller first."
            )
        return _AnimationDecoder(picture, name)
    from av.stream import Disposition

    container = stack.enter_context(_open_container(file, name))
    # Covers of recordings count as video tracks too.
    tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not tracks:
        raise InputError(f"Could not use {name}: it has no video track, choose another file.")
    track = tracks[0]
    track.thread_type = "AUTO"
    tags = {key.lower(): value for key, value in track.metadata.items()}
    alpha = tags.get("alpha_mode") == "1" and track.codec_context.name in _ALPHA_DECODERS
    # Of a track with transparency decord would give the colours alone, of a rotated one nothing, and
    # of several the first.
    if (
        backend != "pyav"
        and path is not None
        and track == container.streams.video[0]
        and not alpha
        and _first_frame(container, track, name).rotation == 0
    ):
        found = _open_decord(path, name)
        if found is not None:
            return found
    if backend == "decord":
        raise InputError(f"Could not open {name} by decord: let PyAV read it.")
    return _PyAVDecoder(container, track, alpha, name)


def _first_frame(container: Any, track: Any, name: str) -> Any:
    import av.error

    try:
        frame = next(container.decode(track))
        container.seek(0)
    except (av.error.FFmpegError, ValueError, StopIteration) as error:
        raise _damaged(name) from error
    return frame


def _open_container(file: BinaryIO, name: str) -> Any:
    import av
    import av.error

    try:
        return av.open(file, options={"format_whitelist": _DEMUXERS})
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise InputError(
            f"Could not open {name}: not an MP4, WebM, MOV, MKV or AVI video or an animated WebP, "
            "GIF or PNG, or a damaged one."
        ) from error


def _damaged(name: str) -> InputError:
    return InputError(f"Could not read {name}: the video is damaged or cut off, fetch it again.")


class _AnimationDecoder:
    """Animated WebP, GIF, PNG or AVIF by Pillow."""

    def __init__(self, picture: Image.Image, name: str):
        self._picture, self._name = picture, name
        self.width, self.height = picture.size
        self.alpha = True
        # The still picture of an APNG for old readers is no frame of it.
        self._first = int(bool(picture.info.get("default_image")))
        ends = [0.0]
        for k in range(self._first, picture.n_frames):
            milliseconds = self._seek(k).info.get("duration") or 0
            # What claims to last 10 ms or less is shown for 100 ms by every browser.
            ends.append(ends[-1] + (milliseconds if milliseconds > 10 else 100) / 1000)
        self.times, self.duration = np.array(ends[:-1]), ends[-1]

    def _seek(self, index: int) -> Image.Image:
        try:
            self._picture.seek(index)
            self._picture.load()
        except MemoryError:
            raise
        except Exception as error:  # As in `_picture`.
            raise _damaged(self._name) from error
        return self._picture

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for i in indices:
            yield np.array(self._seek(i + self._first).convert("RGBA"))


class _PyAVDecoder:
    """The frames of one track; found again by their time stamps after a seek."""

    def __init__(self, container: Any, stream: Any, alpha: bool, name: str):
        import av.error

        self._container, self._stream, self._name = container, stream, name
        self.alpha = alpha
        stamps, last = [], 0.0
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    stamps.append(packet.dts if packet.pts is None else packet.pts)
                    last = packet.duration or 0
            self._stamps = np.unique(stamps)
            self._restart(int(self._stamps[0]))
            first = self._pixels(next(self._decoded))
        except (av.error.FFmpegError, ValueError, TypeError, IndexError, StopIteration) as error:
            raise _damaged(name) from error
        self.height, self.width = first.shape[:2]
        self.times = (self._stamps - self._stamps[0]) * float(stream.time_base)
        if not last and len(stamps) > 1:
            last = np.median(np.diff(self._stamps))
        # A single frame without a duration is shown for a second.
        self.duration = float(self.times[-1]) + (float(last * stream.time_base) or 1.0)

    def _restart(self, stamp: int) -> None:
        """Go to the last key frame at or before a time stamp."""
        self._container.seek(stamp, stream=self._stream, backward=True)
        self._decoded = self._decode()

    def _decode(self) -> Iterator[Any]:
        import av

        if not self.alpha:
            yield from self._container.decode(self._stream)
            return
        decoder = av.CodecContext.create(_ALPHA_DECODERS[self._stream.codec_context.name], "r")
        for packet in self._container.demux(self._stream):
            yield from decoder.decode(packet if packet.size else None)

    def _pixels(self, frame: Any) -> np.ndarray:
        pixels = frame.to_ndarray(format="rgba" if self.alpha else "rgb24")
        return np.rot90(pixels, frame.rotation // 90)

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        import av.error

        at, current = -1, None  # The frame that was decoded last.
        try:
            for i in indices:
                stamp = self._stamps[i]
                if current is None or i < at or i > at + _SEEK_AHEAD:
                    self._restart(int(stamp))
                    current = None
                while (
                    current is None or (current.dts if current.pts is None else current.pts) < stamp
                ):
                    current = next(self._decoded)
                at = i
                yield self._pixels(current)
        except (av.error.FFmpegError, ValueError, StopIteration) as error:
            raise _damaged(self._name) from error


def _open_decord(path: Path, name: str) -> Decoder | None:
    """None where decord is absent or cannot read the file."""
    try:
        import decord
    except ImportError:  # There are wheels for x86-64 only.
        return None
    try:
        return _DecordDecoder(decord.VideoReader(str(path)), name)
    except (decord.DECORDError, RuntimeError, IndexError):
        return None


class _DecordDecoder:
    """Frames of the first track."""

    alpha = False

    def __init__(self, reader: Any, name: str):
        self._reader, self._name = reader, name
        spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)
        # Fails where rows are padded, as in narrow frames: another decoder's work.
        self.height, self.width = reader.get_batch([0]).shape[1:3]
        self.times = spans[:, 0] - spans[0, 0]
        last = spans[-1, 1] - spans[-1, 0]
        if last <= 0 and len(spans) > 1:  # Files need not say how long the last frame is shown.
            last = np.median(np.diff(self.times))
        self.duration = float(self.times[-1] + (last if last > 0 else 1.0))

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        import decord

        try:
            for first in range(0, len(indices), _DECORD_FRAMES):
                yield from self._reader.get_batch(indices[first : first + _DECORD_FRAMES]).asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise _damaged(self._name) from error


def _encode(
    pictures: Iterator[Image.Image],
    temporary: Path,
    path: str | Path,
    frame_rate: float,
    record: dict[str, Any] | None,
) -> None:
    """Write frames into an MP4 or WebM as they come."""
    import av
    import av.error

    first = next(pictures, None)
    if first is None:
        raise InputError(f'Could not write "{path}": there are no frames.')
    webm = temporary.suffix.lower() == ".webm"
    alpha = webm and first.mode == "RGBA"
    odd = not webm and (first.width % 2 or first.height % 2)
    if odd:
        size = (first.width + first.width % 2, first.height + first.height % 2)
        warnings.warn(
            f'"{path}" is {size[0]} x {size[1]}, since H.264 has even sizes only: the last row or '
            f"column of {first.width} x {first.height} was repeated.",
            stacklevel=3,
        )
    try:
        # "file:", or a colon in a name would look like a protocol.
        options = {} if webm else {"movflags": "faststart"}
        with av.open(f"file:{temporary}", "w", options=options) as container:
            if record is not None:
                container.metadata["comment"] = dump_record(record)
            rate = Fraction(frame_rate).limit_denominator(1001)
            stream = container.add_stream("libvpx-vp9" if webm else "libx264", rate=rate)
            stream.width, stream.height = size if odd else first.size
            stream.pix_fmt = "yuva420p" if alpha else "yuv420p"
            if webm:
                stream.options = {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}
            else:
                # x264's macroblock tree reads memory that was never written where a row has an odd
                # number of macroblocks: of equal frames a file in a hundred would differ.
                stream.options = {"crf": "17", "x264-params": "mbtree=0"}
            if alpha:
                stream.metadata["alpha_mode"] = "1"
            matrix = (
                1 if first.height >= _BT709_HEIGHT else 6
            )  # BT.709 or BT.601 (H.273's numbers).
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = matrix
            context.color_range = 1
            for picture in chain([first], pictures):
                if picture.size != first.size:
                    raise InputError(
                        f"A clip needs frames of one size, got {first.size} and {picture.size}."
                    )
                frame = av.VideoFrame.from_ndarray(
                    _planes(picture, alpha, bool(odd)), format="rgba" if alpha else "rgb24"
                )
                frame = frame.reformat(
                    format=stream.pix_fmt,
                    dst_colorspace="ITU709" if matrix == 1 else "ITU601",
                    dst_color_range="MPEG",
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(
            errno.EIO, f"the video could not be written whole ({error}); is the disk full?"
        ) from error


def _planes(picture: Image.Image, alpha: bool, odd: bool) -> np.ndarray:
    """uint8 ``[H, W, 3 or 4]``; with ``odd`` filled up to even sizes."""
    if not alpha and picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white.convert("RGB")
    pixels = np.asarray(picture)
    if odd:
        pad = [(0, n % 2) for n in pixels.shape[:2]]
        pixels = np.pad(pixels, [*pad, (0, 0)], mode="edge")
    return pixels
