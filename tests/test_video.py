"""Video files: reading by index and time, writing, records, bad input."""

from __future__ import annotations

import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tessera.modalities.errors import InputError
from tessera.modalities.metadata import make_record
from tessera.modalities.records import read_record
from tessera.modalities.video import (
    SAVE_SUFFIXES,
    VideoReader,
    check_memory,
    composite,
    fit_frames,
    load_video,
    save_video,
)

T, H, W = 17, 48, 64


def moving_edge(frames=T, height=H, width=W) -> torch.Tensor:
    """RGB; in frame k the first 3 k columns are white, so that a frame tells its index."""
    columns = torch.arange(width)
    rows = [(columns < 3 * k).float() * 2 - 1 for k in range(frames)]
    return torch.stack(rows)[None, :, None].expand(3, -1, height, -1)


def index_of(frame: np.ndarray) -> int:
    return round(float((frame[..., 0] > 127).sum(1).mean()) / 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    save_video(moving_edge(), folder / "a.mp4", 12)
    return folder


@pytest.fixture
def record():
    settings = {"num_frames": T, "guidance_scale": 3.0}
    tokens = torch.tensor([1, 2, 60000])
    return make_record("TextToVideoPipeline", "sticker", "ein Stern 😀", 7, 0, settings, tokens)


def write(path, stamps, rotation=0):
    """An H.264 file whose frames have these time stamps in ms."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        frames = moving_edge(len(stamps)).unbind(1)
        for stamp, frame in zip(stamps, frames, strict=True):
            pixels = ((frame + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_frames_by_index_in_any_order(folder, backend):
    order = [5, 2, 2, 16, 0, 9]
    with VideoReader(folder / "a.mp4", backend=backend) as reader:
        assert (reader.num_frames, reader.width, reader.height) == (T, W, H)
        assert reader.frame_rate == 12 and reader.duration == pytest.approx(T / 12, abs=1e-3)
        assert [index_of(frame) for frame in reader.frames(order)] == order
        with pytest.raises(InputError, match="has the frames 0 to 16, not 17"):
            list(reader.frames([17]))


def test_pyav_seeks_in_long_files(tmp_path):
    save_video(moving_edge(120, width=360), tmp_path / "long.mp4", 30)
    order = [100, 3, 119, 60, 61, 0]
    with VideoReader(tmp_path / "long.mp4", backend="pyav") as reader:
        assert [index_of(frame) for frame in reader.frames(order)] == order


def test_pyav_reads_where_decord_is_absent(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    assert load_video(folder / "a.mp4").frames.shape == (3, T, H, W)
    with pytest.raises(InputError, match="by decord"):
        VideoReader(folder / "a.mp4", backend="decord")


def test_plan_by_time_and_rate(folder):
    with VideoReader(folder / "a.mp4") as reader:
        assert reader.at([-1, 0, 0.1, 1 / 12, 99]).tolist() == [0, 0, 1, 1, T - 1]
        assert reader.plan()[0].tolist() == list(range(T))
        assert reader.plan(frame_rate=6)[0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
        assert reader.plan(start=0.5, end=0.75)[0].tolist() == [6, 7, 8]
        # A clip that is longer than the file repeats the last frame.
        assert reader.plan(start=1.25, num_frames=4)[0].tolist() == [15, 16, 16, 16]
        assert reader.plan(frame_rate=24, num_frames=4)[0].tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_variable_rates_are_read_by_time(tmp_path, backend):
    write(tmp_path / "a.mp4", [0, 33, 67, 100, 300, 333, 500])
    with VideoReader(tmp_path / "a.mp4", backend=backend) as reader:
        assert reader.frame_rate == pytest.approx(30, rel=0.01)
        indices = reader.plan()[0].tolist()
        assert indices == [0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 5, 5, 5, 5, 6]
        assert [index_of(f) for f in reader.frames(indices[::3])] == indices[::3]


def test_rotation_is_applied(tmp_path):
    write(tmp_path / "a.mp4", [0, 40, 80, 120, 160], rotation=90)
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert (reader.width, reader.height) == (H, W)
        (frame,) = reader.frames([4])
        # White columns on the left become rows at the bottom, a quarter turn anticlockwise.
        assert frame[-6:].mean() > 230 and frame[: W - 20].mean() < 30


@pytest.mark.parametrize("suffix", SAVE_SUFFIXES)
@pytest.mark.parametrize("channels", [3, 4])
def test_every_format_keeps_frames_rate_alpha_and_record(tmp_path, record, suffix, channels):
    clip = moving_edge()
    alpha = torch.where(torch.arange(H)[:, None] < 24, 1.0, -1.0).expand(1, T, H, W)
    if channels == 4:
        clip = torch.cat([clip, alpha])
    path = tmp_path / f"a{suffix}"
    save_video(clip, path, 12, record)
    assert read_record(path) == record
    loaded = load_video(path, background=None)
    assert loaded.frame_rate == 12 and loaded.frames.shape[1:] == (T, H, W)
    if channels == 4 and suffix != ".mp4":
        assert (loaded.frames[3] - alpha[0]).abs().max() < 0.1
    assert (composite(loaded.frames) - composite(clip)).abs().mean() < 0.03
    save_video(clip, path, 12)
    assert read_record(path) is None
    assert load_video(path).frames.shape[0] == 3
    assert load_video(path.read_bytes()).frames.shape[0] == 3


def test_animations_loop_or_play_once(tmp_path):
    for suffix in (".webp", ".gif", ".png"):
        save_video(moving_edge(3), tmp_path / f"a{suffix}", 10)
        save_video(moving_edge(3), tmp_path / f"b{suffix}", 10, loop=False)
        assert Image.open(tmp_path / f"a{suffix}").info["loop"] == 0
        assert Image.open(tmp_path / f"b{suffix}").info.get("loop", 1) == 1


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_merged_frames_are_expanded(tmp_path, suffix):
    clip = moving_edge(4).repeat_interleave(torch.tensor([1, 4, 2, 3]), dim=1)
    save_video(clip, tmp_path / f"a{suffix}", 12)
    with VideoReader(tmp_path / f"a{suffix}") as reader:
        assert reader.num_frames == 4 and reader.frame_rate == 12
        assert reader.plan()[0].tolist() == [0, 1, 1, 1, 1, 2, 2, 3, 3, 3]


def test_odd_sizes_are_padded_and_said(tmp_path):
    clip = moving_edge()[:, :, :47, :63]
    with pytest.warns(UserWarning, match="64 x 48, since H.264 has even sizes only"):
        save_video(clip, tmp_path / "a.mp4", 12)
    loaded = load_video(tmp_path / "a.mp4").frames
    assert loaded.shape == (3, T, 48, 64) and (loaded[:, :, :47, :63] - clip).abs().mean() < 0.02


def test_equal_frames_make_equal_files(tmp_path):
    """Seven macroblocks a row: what x264 does with an odd number must not depend on old memory."""
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 255, (4, 112, 112, 3), dtype=np.uint8))
    frames = pixels.permute(3, 0, 1, 2) / 127.5 - 1
    made = set()
    for _ in range(60):
        sizes, values = random.integers(100, 9000, 30), random.integers(0, 256, 30)
        left = [np.full(int(n), v, np.uint8) for n, v in zip(sizes, values, strict=True)]
        del left  # Freed memory is not empty.
        save_video(frames, tmp_path / "a.mp4", 8, overwrite=True)
        made.add((tmp_path / "a.mp4").read_bytes())
    assert len(made) == 1


def test_a_generator_of_frames_is_written_as_it_comes(tmp_path):
    alive = []

    def frames():
        for k in range(T):
            alive.append(k)
            yield moving_edge()[:, k]

    save_video(frames(), tmp_path / "a.mp4", 12)
    assert len(alive) == T and load_video(tmp_path / "a.mp4").frames.shape[1] == T


def test_chunks_hold_a_few_frames(folder):
    with VideoReader(folder / "a.mp4") as reader:
        parts = list(reader.chunks(5))
        assert [part.shape[1] for part in parts] == [5, 5, 5, 2]
        assert torch.equal(torch.cat(parts, 1), reader.read(range(T)))


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_fit(fit):
    x = torch.full((1, 4, 8, 16), -1.0)
    x[:, :, :, 4:12] = 1.0  # A white opaque square on transparent black.
    y = fit_frames(x, 4, fit)
    assert y.shape == (1, 4, 4, 4)
    opaque = y[:, 3] > -0.9
    assert (y[:, :3].amin(1)[opaque] > 0.99).all()  # Black does not bleed into the edges.
    assert (
        opaque.float().mean() == {"cover": 1.0, "contain": 0.25, "stretch": 0.5}[fit]
        or fit != "cover"
    )
    same = torch.rand(2, 3, 4, 4) * 2 - 1
    assert torch.allclose(fit_frames(same, 4, fit), same, atol=1e-6)


def test_memory_is_estimated_before_anything_is_read(folder):
    with pytest.raises(InputError, match=r"10,000 frames of 1024 x 1024 would take 125\.8 GB"):
        load_video(folder / "a.mp4", num_frames=10_000, size=1024)
    with pytest.raises(InputError, match=r"limit is 0\.0 GB"):
        check_memory((3, 2, 100, 100), 1000)


def test_animations_of_huge_frames_are_refused_by_their_header(tmp_path, monkeypatch):
    save_video(moving_edge(3), tmp_path / "a.webp", 10)
    monkeypatch.setattr("tessera.modalities.image.MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="its frames have 3,072 pixels, the limit is 1,000"):
        load_video(tmp_path / "a.webp")


def test_bad_files(tmp_path, folder):
    data = (folder / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:10,\n/etc/hostname\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    write(tmp_path / "one.mp4", [0])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=24000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 24000), np.float32), "fltp", "mono")
        frame.sample_rate = 24000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name, words in {
        "cut.mp4": "damaged|not an MP4",
        "text.mp4": "not an MP4",
        "list.mp4": "not an MP4",
        "picture.mp4": "is a picture .PNG., not a video",
        "one.mp4": "it has one frame",
        "sound.mp4": "has no video track",
        "absent.mp4": "no such file",
        ".": "is a folder",
    }.items():
        with pytest.raises(InputError, match=words):
            load_video(tmp_path / name)
    with pytest.raises(InputError, match="addresses are not opened"):
        load_video("https://example.org/a.mp4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 9.0}, r"lasts 1\.42 s"),
        ({"frame_rate": 0}, "above 0 and at most 240"),
        ({"num_frames": 0}, "at least one frame"),
        ({"size": 0}, "at least 1 pixel"),
        ({"background": "reddish"}, '"reddish" is not a colour'),
    ],
)
def test_bad_requests(folder, options, words):
    with pytest.raises(InputError, match=words):
        load_video(folder / "a.mp4", **options)


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    (tmp_path / "a.mp4").write_text("earlier")

    def fails():
        yield moving_edge()[:, 0]
        raise RuntimeError("stop")

    for frames, error in (
        (fails(), RuntimeError),
        (iter([torch.zeros(3, 8, 8), torch.zeros(3, 6, 6)]), InputError),
        (iter([]), InputError),
        (torch.zeros(3, 8, 8), InputError),
    ):
        with pytest.raises(error):
            save_video(frames, tmp_path / "a.mp4", 8)
    with pytest.raises(InputError, match=r"must end in \.mp4"):
        save_video(moving_edge(), tmp_path / "a.mov", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "earlier"
