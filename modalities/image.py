"""Picture files <-> PIL pictures <-> tensors.

Tensors are float32 ``[B, C, H, W]`` in [-1, 1] with 3 (RGB) or 4 (RGBA, straight alpha) channels.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps, PngImagePlugin
from torch import Tensor

from .errors import InputError
from .files import atomic_path, media_path, open_media
from .metadata import as_parameters, dump_record, parse_record

MAX_PIXELS = 64_000_000
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Only these decoders see files from strangers (Pillow's EPS, for one, would start Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_SAVE_FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
_ANIMATION_FORMATS = {".webp": "WEBP", ".png": "PNG", ".apng": "PNG", ".gif": "GIF"}
_USER_COMMENT = 0x9286
_JPEG_SEGMENT_BYTES = 65_000

Color = str | tuple[int, ...]


def load_image(
    source: str | Path | bytes | Image.Image,
    *,
    background: Color | None = "white",
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Open a picture upright (EXIF orientation applied), the first frame of an animation.

    Args:
        source: a file, the bytes of one, or a picture that is open already. No addresses.
        background: colour put behind a transparent picture; None keeps transparency.
        max_pixels: larger pictures are refused by their header, before they are decoded.
        name: what error messages call the picture; default: its file name.

    Returns:
        RGB, or RGBA where ``background`` is None; without metadata.

    Raises:
        InputError: no such file, not a picture of a known format, damaged, or too large.
    """
    if isinstance(source, Image.Image):
        return _prepare(source, name or "the picture", background, max_pixels)
    if isinstance(source, bytes):
        name = name or "the picture data"
        return _prepare(_open(io.BytesIO(source), name), name, background, max_pixels)
    path = media_path(source, "picture")
    name = name or f'"{path}"'
    with open_media(path, name, "picture") as file:
        return _prepare(_open(file, name), name, background, max_pixels)


def fit_image(
    image: Image.Image,
    size: int,
    mode: Literal["cover", "contain"] = "cover",
    background: Color | None = "white",
) -> Image.Image:
    """Make a picture ``size`` x ``size`` without stretching it.

    "cover" crops the longer side around the middle, "contain" keeps everything and fills up with
    the background (transparency where ``background`` is None). Colours are weighted by their
    alpha while resizing, so that what lies under transparent pixels does not bleed into edges.

    Returns:
        RGB, or RGBA where ``background`` is None.

    Raises:
        InputError: size below 1, an unknown mode or colour.
    """
    if size < 1:
        raise InputError(f"A picture's size must be at least 1 pixel, got {size}.")
    # Pillow's resize of an RGBA picture premultiplies and divides again.
    image = image.convert("RGBA")
    width, height = image.size
    if mode == "cover":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    elif mode == "contain":
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        square = Image.new("RGBA", (size, size))
        square.paste(
            image.resize(inner, Image.Resampling.LANCZOS),
            ((size - inner[0]) // 2, (size - inner[1]) // 2),
        )
    else:
        raise InputError(f'A picture is fitted by "cover" or "contain", got "{mode}".')
    return square if background is None else _flatten(square, background)


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> float32 ``[B, 3, H, W]`` in [-1, 1]; 4 channels if any is RGBA.

    Raises:
        InputError: no pictures, or pictures of different sizes.
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise InputError(
            f"Pictures of one batch must have one size, got {sorted(sizes)}: resize them first."
        )
    mode = "RGBA" if any(image.mode == "RGBA" for image in images) else "RGB"
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert(mode)) for image in images]))
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1).contiguous()


def to_pil(tensor: Tensor) -> list[Image.Image]:
    """Tensor ``[B, C, H, W]`` in [-1, 1] (clamped), C 3 or 4 -> RGB or RGBA pictures.

    Raises:
        InputError: another shape.
    """
    if tensor.ndim != 4 or tensor.shape[1] not in (3, 4):
        raise InputError(
            f"Pictures are tensors of shape [batch, 3 or 4, height, width], got "
            f"{list(tensor.shape)}."
        )
    pixels = tensor.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def image_grid(
    images: Sequence[Image.Image],
    columns: int,
    padding: int = 2,
    background: Color | None = "white",
) -> Image.Image:
    """Pictures in reading order, ``columns`` a row, each in the middle of an equal cell.

    Args:
        padding: pixels between the cells and around them.
        background: colour behind everything; None gives a transparent RGBA grid.

    Raises:
        InputError: no pictures, or fewer than one column.
    """
    if not images or columns < 1:
        raise InputError(
            f"A grid needs at least one picture and one column, got {len(images)} and {columns}."
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    size = (columns * (width + padding) + padding, rows * (height + padding) + padding)
    grid = Image.new("RGBA", size)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        left = padding + column * (width + padding) + (width - image.width) // 2
        top = padding + row * (height + padding) + (height - image.height) // 2
        grid.paste(image.convert("RGBA"), (left, top))
    return grid if background is None else _flatten(grid, background)


def save_image(
    image: Image.Image,
    path: str | Path,
    record: dict[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a PNG, WebP (lossless) or JPEG by the suffix, whole or not at all.

    Without ``record`` the file is a clean copy: no metadata at all. JPEG lays white behind
    transparent pictures.

    Raises:
        InputError: an unknown suffix, see also `atomic_path`.
        OSError: the disk is full or broken; nothing is left behind.
    """
    file_format = _format(path, _SAVE_FORMATS)
    image = _without_metadata(image)
    if file_format == "JPEG":
        image = _flatten(image.convert("RGBA"), "white")
        options: dict[str, Any] = {"quality": 95, "subsampling": 0}
    else:
        options = {"lossless": True} if file_format == "WEBP" else {}
    options |= _metadata_options(record, file_format, path)
    with atomic_path(path, overwrite) as temporary:
        image.save(temporary, file_format, **options)


def save_animation(
    frames: Sequence[Image.Image],
    path: str | Path,
    fps: float,
    record: dict[str, Any] | None = None,
    overwrite: bool = True,
    loop: bool = True,
) -> None:
    """Write frames of one size as a WebP, APNG (.png, .apng) or GIF, whole or not at all.

    It starts again endlessly, or with ``loop`` off is played once.

    WebP is lossless; GIF has 256 colours and no half transparency. Equal neighbours may be stored
    as one longer frame; times never drift by more than the format's unit (1 ms, GIF 10 ms).

    Raises:
        InputError: no frames, different sizes, fps not in (0, 100], an unknown suffix.
        OSError: the disk is full or broken; nothing is left behind.
    """
    file_format = _format(path, _ANIMATION_FORMATS)
    if len({frame.size for frame in frames}) != 1:
        raise InputError(
            f"An animation needs frames of one size, got {sorted({f.size for f in frames})}."
        )
    if not 0 < fps <= 100:
        raise InputError(f"Frames per second must be above 0 and at most 100, got {fps}.")
    unit = 10 if file_format == "GIF" else 1
    ends = [unit * round(1000 * k / fps / unit) for k in range(len(frames) + 1)]
    durations = [end - start for start, end in pairwise(ends)]
    pictures = [_without_metadata(frame) for frame in frames]
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    # A GIF plays once when it says nothing of loops.
    if loop or file_format != "GIF":
        options["loop"] = 0 if loop else 1
    if file_format == "GIF":
        options["disposal"] = 2  # Else what was opaque once stays under later transparent frames.
    options |= _metadata_options(record, file_format, path)
    with atomic_path(path, overwrite) as temporary:
        pictures[0].save(
            temporary,
            file_format,
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            **options,
        )
        if file_format == "WEBP" and any(frame.mode == "RGBA" for frame in pictures):
            _set_webp_alpha(temporary)


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The generation record in a picture file, or None where there is no (sound) one.

    The picture itself is not decoded. What comes back was checked by `parse_record`, yet anybody
    may have written it.

    Raises:
        InputError: no such file, or not a picture.
    """
    path = media_path(path, "picture")
    name = f'"{path}"'
    with open_media(path, name, "picture") as file:
        image = _open(file, name)
        texts = [image.info.get("tessera"), image.info.get("comment")]
        texts += [_read_user_comment(image), _read_xmp(image.info.get("xmp"))]
    for text in texts:
        record = parse_record(text) if isinstance(text, str | bytes) else None
        if record is not None:
            return record
    return None


def _open(file: BinaryIO, name: str) -> Image.Image:
    """The picture's header."""
    try:
        # Our own limit is below the size that Pillow warns of.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            return Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        # Far above our limit Pillow itself refuses, with the count of pixels in its message.
        pixels = int(re.search(r"\d+", str(error))[0])
        raise InputError(
            f"Could not open {name}: it has {pixels:,} pixels, the limit is {MAX_PIXELS:,}, "
            "make it smaller first."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Damaged headers raise about every kind of exception.
        raise InputError(
            f"Could not open {name}: not a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF picture, "
            "or a damaged one."
        ) from error


def _prepare(
    image: Image.Image, name: str, background: Color | None, max_pixels: int
) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"Could not open {name}: it has {width * height:,} pixels ({width:,} x {height:,}), "
            f"the limit is {int(max_pixels):,}, make it smaller first."
        )
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # As in _open.
        raise InputError(
            f"Could not read {name}: the picture is damaged or cut off, fetch it again."
        ) from error
    image = _to_rgba(_upright(image))
    return image if background is None else _flatten(image, background)


def _upright(image: Image.Image) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            return ImageOps.exif_transpose(image)
    except Exception:  # A damaged EXIF block is no reason to refuse a sound picture.
        return image


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow would clip at 255.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return _without_metadata(image.convert("RGBA"))


def _flatten(image: Image.Image, background: Color) -> Image.Image:
    try:
        color = ImageColor.getrgb(background) if isinstance(background, str) else background
        canvas = Image.new("RGBA", image.size, tuple(color))
    except (ValueError, TypeError) as error:
        raise InputError(
            f'"{background}" is not a colour: give a name such as "white" or a code such as '
            '"#ff8800".'
        ) from error
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _without_metadata(image: Image.Image) -> Image.Image:
    # Pillow writes colour profiles and more from `info` without being asked.
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.info = {}
    return image


def _format(path: str | Path, formats: dict[str, str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise InputError(f'Could not write "{path}": its name must end in {", ".join(formats)}.')
    return formats[suffix]


def _set_webp_alpha(path: Path) -> None:
    """Set the alpha flag of an animated WebP.

    libwebp crops frames to what is visible and forgets the flag when all that is left is opaque;
    readers then show black around it.
    """
    with open(path, "r+b") as file:
        header = file.read(21)
        if header[12:16] == b"VP8X":
            file.seek(20)
            file.write(bytes([header[20] | 0x10]))


def _metadata_options(
    record: dict[str, Any] | None, file_format: str, path: str | Path
) -> dict[str, Any]:
    """Arguments of ``Image.save`` that put the record into the file."""
    if record is None:
        return {}
    text = dump_record(record)
    if file_format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("tessera", text)
        chunks.add_text("parameters", as_parameters(record))
        return {"pnginfo": chunks}
    if file_format == "GIF":
        return {"comment": text.encode()}
    exif = Image.Exif()
    exif.endian = ">"  # Readers disagree on the order of UTF-16 here; big-endian suits most.
    exif.get_ifd(ExifTags.IFD.Exif)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    exif_bytes, xmp = exif.tobytes(), _xmp_packet(text)
    if file_format == "JPEG" and max(len(exif_bytes), len(xmp)) > _JPEG_SEGMENT_BYTES:
        raise InputError(
            f'Could not write "{path}": its settings take {len(exif_bytes):,} bytes, too many for '
            "a JPEG, save it as .png or .webp."
        )
    if file_format == "WEBP":  # Only JPEG names the block inside itself.
        exif_bytes = exif_bytes.removeprefix(b"Exif\0\0")
    return {"exif": exif_bytes, "xmp": xmp}


def _read_user_comment(image: Image.Image) -> str | None:
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(_USER_COMMENT)
    except Exception:  # Damaged EXIF raises about every kind of exception.
        return None
    if not isinstance(comment, bytes) or not comment.startswith(b"UNICODE\0"):
        return None
    for encoding in ("utf-16-be", "utf-16-le"):
        text = comment[8:].decode(encoding, errors="replace").lstrip("\ufeff")
        if text.startswith("{"):
            return text
    return None


def _xmp_packet(text: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:tessera="urn:tessera:record">'
        f"<tessera:record>{html.escape(text, quote=False)}</tessera:record>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _read_xmp(packet: Any) -> str | None:
    # Found as text: an XML parser would follow a stranger's entities.
    if not isinstance(packet, bytes):
        return None
    start, end = packet.find(b"<tessera:record>"), packet.find(b"</tessera:record>")
    if not 0 <= start < end:
        return None
    content = packet[start + len(b"<tessera:record>") : end]
    return html.unescape(content.decode("utf-8", errors="replace"))
