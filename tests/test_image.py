from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from tessera.modalities.errors import InputError
from tessera.modalities.files import atomic_path
from tessera.modalities.image import (
    fit_image,
    image_grid,
    load_image,
    read_record,
    save_animation,
    save_image,
    to_pil,
    to_tensor,
)
from tessera.modalities.metadata import make_record

STILLS = [".png", ".webp", ".jpg", ".jpeg"]
ANIMATIONS = [".webp", ".png", ".apng", ".gif"]


def noise(width=24, height=16, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.fromarray(pixels)


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.fixture
def record():
    settings = {"num_tokens": 4, "guidance_scale": 3.0, "style": "3d"}
    return make_record(
        "TextToImagePipeline",
        "sticker",
        "ein rötes Herz 😀 <&> ]]> 'x'",
        7,
        0,
        settings,
        torch.tensor([1, 2, 60000]),
        "sticker",
    )


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header_only(width, height):
    """A PNG whose header claims a size, with next to no data behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


# --- loading ---


def test_load_from_path_str_bytes_and_pil(tmp_path):
    image = noise()
    path = tmp_path / "a.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image):
        loaded = load_image(source)
        assert loaded.mode == "RGB" and np.array_equal(pixels(loaded), pixels(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (16, 8), "black")
    upright.paste("red", (0, 0, 8, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(load_image(tmp_path / "a.png")), pixels(upright))


def test_damaged_exif_does_not_cost_the_picture(tmp_path, recwarn):
    noise().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(pixels(load_image(tmp_path / "a.png")), pixels(noise()))
    assert read_record(tmp_path / "a.png") is None
    assert not recwarn.list


def test_alpha_over_backgrounds():
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 51))
    assert load_image(image).getpixel((0, 0)) == (255, 204, 204)
    assert load_image(image, background="#0000ff").getpixel((0, 0)) == (51, 0, 204)
    assert load_image(image, background=(0, 0, 0)).getpixel((0, 0)) == (51, 0, 0)
    assert load_image(image, background=None).getpixel((0, 0)) == (255, 0, 0, 51)
    with pytest.raises(InputError, match='"reddish" is not a colour'):
        load_image(image, background="reddish")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (2, 2), "white").convert(mode)
    assert load_image(image).getpixel((1, 1)) == (255, 255, 255)


def test_transparent_palette_shows_the_background(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    loaded = load_image(tmp_path / "a.png", background="blue")
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 255), (0, 255, 0)]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert [loaded.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_one_pixel_works_everywhere(tmp_path, record):
    image = Image.new("RGB", (1, 1), (10, 20, 30))
    save_image(image, tmp_path / "a.png", record)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.getpixel((0, 0)) == (10, 20, 30)
    for mode in ("cover", "contain"):
        fitted = fit_image(loaded, 8, mode)
        assert fitted.size == (8, 8) and fitted.getpixel((4, 4)) == (10, 20, 30)
    assert to_tensor(loaded).shape == (1, 3, 1, 1)


# --- refusing ---


def test_bad_paths_are_refused(tmp_path):
    for source, message in [
        (tmp_path / "none.png", 'none.png": there is no such file'),
        (tmp_path, "it is a folder"),
        ("x" * 10_000, "File name too long"),
        ("https://example.org/cat.png", "addresses are not opened"),
        (Path("https://example.org/cat.png"), "addresses are not opened"),
        ("file:///etc/passwd", "addresses are not opened"),
        ("data:image/png;base64,AAAA", "addresses are not opened"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            load_image(source)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
        with pytest.raises(InputError, match=message):
            read_record(source)


def test_text_named_png_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("hello, not a picture")
    with pytest.raises(InputError, match=r'a\.png": not a PNG, JPEG'):
        load_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="the picture data: not a PNG"):
        load_image(b"")


def test_formats_that_start_other_programs_are_refused():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(InputError, match="not a PNG"):
        load_image(postscript)


@pytest.mark.parametrize("suffix", STILLS)
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path, suffix, fraction):
    path = tmp_path / f"a{suffix}"
    save_image(noise(64, 64), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(InputError, match=r"damaged"):
        load_image(path)


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (8_001, 8_000)])
def test_huge_pictures_are_refused_by_their_header(tmp_path, size, monkeypatch, recwarn):
    path = tmp_path / "big.png"
    path.write_bytes(png_header_only(*size))

    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    with pytest.raises(InputError, match=f"{size[0] * size[1]:,} pixels.*limit is 64,000,000"):
        load_image(path)
    assert not recwarn.list


def test_max_pixels_also_holds_for_open_pictures():
    with pytest.raises(InputError, match=r"384 pixels \(24 x 16\)"):
        load_image(noise(), max_pixels=383)
    assert load_image(noise(), max_pixels=384).size == (24, 16)


# --- resizing, tensors ---


def test_fit_shapes_and_content():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    cover = fit_image(image, 50, "cover")
    assert cover.size == (50, 50) and cover.mode == "RGB"
    assert {cover.getpixel((x, 25)) for x in (0, 25, 49)} == {(0, 0, 255)}
    contain = fit_image(image, 60, "contain", background="lime")
    assert contain.getpixel((30, 5)) == (0, 255, 0)
    assert contain.getpixel((5, 30)) == (255, 0, 0) and contain.getpixel((30, 30)) == (0, 0, 255)
    assert fit_image(image, 60, "contain", background=None).getpixel((30, 5))[3] == 0
    assert fit_image(Image.new("RGB", (1, 5000)), 16, "contain").size == (16, 16)


def test_resize_is_premultiplied():
    """Green under full transparency must not tint a red edge."""
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 31, 64))
    small = pixels(fit_image(image, 16, background=None))
    visible = small[small[..., 3] > 0]
    assert (visible[:, 3] < 255).any()  # There is a soft edge to look at.
    assert visible[:, 1].max() <= 2 and visible[:, 0].min() >= 250


def test_fit_refuses_bad_arguments():
    with pytest.raises(InputError, match="at least 1 pixel, got 0"):
        fit_image(noise(), 0)
    with pytest.raises(InputError, match='got "stretch"'):
        fit_image(noise(), 8, "stretch")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_tensors_round_trip_exactly(mode):
    images = [noise(mode=mode, seed=seed) for seed in range(3)]
    tensor = to_tensor(images)
    assert tensor.shape == (3, len(mode), 16, 24) and tensor.dtype == torch.float32
    assert tensor.abs().max() <= 1
    for image, back in zip(images, to_pil(tensor), strict=True):
        assert back.mode == mode and np.array_equal(pixels(back), pixels(image))


def test_tensor_range_and_clamping():
    image = Image.new("RGB", (1, 1), (0, 255, 128))
    assert to_tensor(image).flatten().tolist() == pytest.approx([-1, 1, 1 / 255], abs=1e-6)
    over = torch.tensor([-3.0, 0.0, 1.7]).view(1, 3, 1, 1)
    assert to_pil(over)[0].getpixel((0, 0)) == (0, 128, 255)


def test_mixed_modes_become_rgba_and_mixed_sizes_are_refused():
    assert to_tensor([noise(), noise(mode="RGBA")]).shape[1] == 4
    for images in ([noise(), noise(width=8)], []):
        with pytest.raises(InputError, match="one size"):
            to_tensor(images)
    for shape in ((3, 8, 8), (1, 2, 8, 8)):
        with pytest.raises(InputError, match=r"got \["):
            to_pil(torch.zeros(shape))


def test_grid_places_pictures_in_reading_order():
    images = [Image.new("RGB", (10, 6), color) for color in ("red", "lime", "blue")]
    grid = image_grid(images, 2, padding=3)
    assert grid.size == (2 * 13 + 3, 2 * 9 + 3)
    assert grid.getpixel((3, 3)) == (255, 0, 0) and grid.getpixel((16, 3)) == (0, 255, 0)
    assert grid.getpixel((3, 12)) == (0, 0, 255) and grid.getpixel((16, 12)) == (255, 255, 255)
    assert grid.getpixel((0, 0)) == (255, 255, 255)
    assert image_grid(images, 9, background=None).mode == "RGBA"
    with pytest.raises(InputError, match="at least one picture and one column"):
        image_grid([], 2)


# --- saving and records ---


@pytest.mark.parametrize("suffix", STILLS)
def test_stills_carry_their_record(tmp_path, record, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    save_image(noise(mode="RGBA"), path, record)
    assert read_record(path) == record
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_lossless_formats_keep_the_pixels(tmp_path, suffix):
    image = noise(mode="RGBA")
    image.putalpha(Image.new("L", image.size, 100))
    save_image(image, tmp_path / f"a{suffix}")
    loaded = load_image(tmp_path / f"a{suffix}", background=None)
    assert np.array_equal(pixels(loaded), pixels(image))


def test_jpeg_lays_white_behind(tmp_path):
    save_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", STILLS)
def test_a_clean_copy_holds_nothing(tmp_path, record, suffix):
    first, second = tmp_path / "a.png", tmp_path / f"b{suffix}"
    save_image(noise(), first, record)
    with Image.open(first) as image:
        image.load()
        image.info["icc_profile"] = b"colour profile of a camera"
        save_image(image, second)
    data = second.read_bytes()
    assert read_record(second) is None
    for word in (b"Herz", b"seed", b"camera", "Herz".encode("utf-16-be")):
        assert word not in data


def test_png_also_has_parameters_for_other_tools(tmp_path, record):
    save_image(noise(), tmp_path / "a.png", record)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"].startswith(record["prompt"] + "\nCFG scale: 3.0, Seed: 7")
        assert json.loads(image.info["tessera"])["seed"] == 7


def test_exif_comment_and_xmp_of_webp_and_jpeg(tmp_path, record):
    for suffix in (".webp", ".jpg"):
        save_image(noise(), tmp_path / f"a{suffix}", record)
        with Image.open(tmp_path / f"a{suffix}") as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            xmp = image.info["xmp"]
        assert comment[:8] == b"UNICODE\0"
        assert json.loads(comment[8:].decode("utf-16-be")) == record
        # With the EXIF stripped, as some tools do, the XMP still tells.
        noise().save(tmp_path / f"b{suffix}", xmp=xmp)
        assert read_record(tmp_path / f"b{suffix}") == record


def test_little_endian_comments_are_read_too(tmp_path, record):
    exif = Image.Exif()
    text = json.dumps(record)
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + b"\xff\xfe" + text.encode("utf-16-le")
    noise().save(tmp_path / "a.jpg", exif=exif)
    assert read_record(tmp_path / "a.jpg") == record


@pytest.mark.parametrize("suffix", ANIMATIONS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_animations_carry_frames_times_and_record(tmp_path, record, suffix, mode):
    frames = [Image.new("RGBA", (16, 16)) for _ in range(6)]
    for k, frame in enumerate(frames):
        frame.paste((250, 40 * k, 0, 255), (2 * k, 0, 2 * k + 4, 16))
    frames = [frame.convert(mode) for frame in frames]
    path = tmp_path / f"a{suffix}"
    save_animation(frames, path, 12, record)
    assert read_record(path) == record
    with Image.open(path) as image:
        assert image.n_frames == 6 and image.info["loop"] == 0
        duration = 0
        for k, frame in enumerate(frames):
            image.seek(k)
            image.load()
            duration += image.info["duration"]
            shown = pixels(image.convert("RGBA"))
            expected = pixels(frame.convert("RGBA"))
            assert np.array_equal(shown[..., 3], expected[..., 3])
            opaque = expected[..., 3] > 0
            assert np.abs(shown - expected)[opaque].max() <= (8 if suffix == ".gif" else 0)
    assert duration == 500


def test_animation_refuses_bad_arguments(tmp_path):
    frames = [noise(), noise(seed=1)]
    for arguments, message in [
        (([], tmp_path / "a.webp", 12), "frames of one size"),
        (([noise(), noise(width=8)], tmp_path / "a.webp", 12), "frames of one size"),
        ((frames, tmp_path / "a.webp", 0), "at most 100, got 0"),
        ((frames, tmp_path / "a.webp", float("nan")), "got nan"),
        ((frames, tmp_path / "a.mp4", 12), "must end in .webp"),
    ]:
        with pytest.raises(InputError, match=message):
            save_animation(*arguments)
    assert not os.listdir(tmp_path)


def test_a_record_too_long_for_jpeg_says_what_to_do(tmp_path, record):
    record = record | {"settings": {f"note_{i}": "y" * 1900 for i in range(25)}}
    with pytest.raises(InputError, match=r"too many for a JPEG, save it as \.png"):
        save_image(noise(), tmp_path / "a.jpg", record)
    assert not os.listdir(tmp_path)
    save_image(noise(), tmp_path / "a.webp", record)
    assert read_record(tmp_path / "a.webp") == record


def test_foreign_metadata_is_no_record(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a fox\nSteps: 20, Seed: 7")
    chunks.add_itxt("tessera", "{" + "x" * 10_000_000)
    noise().save(tmp_path / "a.png", pnginfo=chunks)
    assert read_record(tmp_path / "a.png") is None
    assert load_image(tmp_path / "a.png").size == (24, 16)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("tessera", "x" * 10_000_000, zip=True)
    noise().save(tmp_path / "bomb.png", pnginfo=chunks)
    with pytest.raises(InputError, match="damaged"):
        read_record(tmp_path / "bomb.png")


# --- whole or not at all ---


def fill_the_disk(monkeypatch):
    """Every save writes its first bytes, then finds the disk full."""

    def save(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Image.Image, "save", save)


def test_full_disk_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch, record):
    old = tmp_path / "old.png"
    save_image(noise(), old, record)
    before = old.read_bytes()
    fill_the_disk(monkeypatch)
    for write in (
        lambda: save_image(noise(), tmp_path / "new.png", record),
        lambda: save_image(noise(), old, record),
        lambda: save_animation([noise(), noise()], tmp_path / "new.webp", 12),
    ):
        with pytest.raises(OSError) as error:
            write()
        assert error.value.errno == errno.ENOSPC and not isinstance(error.value, InputError)
    assert os.listdir(tmp_path) == ["old.png"] and old.read_bytes() == before


def test_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path and temporary.suffix == ".bin"
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_bad_targets_are_refused(tmp_path):
    save_image(noise(), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "folder.png").mkdir()
    for name, message in [
        ("none/a.png", 'none" does not exist, create it'),
        ("a.png/b.png", "does not exist"),
        ("folder.png", "it is a folder"),
        ("x" * 300 + ".png", "File name too long"),
        ("a.bmp", r"must end in \.png, \.webp, \.jpg, \.jpeg"),
        ("a", "must end in"),
    ]:
        with pytest.raises(InputError, match=message):
            save_image(noise(seed=1), tmp_path / name)
    with pytest.raises(InputError, match="exists already"):
        save_image(noise(seed=1), tmp_path / "a.png", overwrite=False)
    assert (tmp_path / "a.png").read_bytes() == before
    save_image(noise(seed=1), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() != before
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder.png"]
