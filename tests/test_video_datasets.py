"""Clips with captions: folders, lists, tar shards, the animated pack, procedural animations."""

from __future__ import annotations

import json
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.modalities.errors import InputError
from tessera.modalities.video import save_video
from tessera.modalities.video_datasets import (
    MOTIONS,
    AnimatedPack,
    ClipFolder,
    ClipList,
    ClipShards,
    ProceduralAnimations,
    animate,
    pose,
)


def clip(frames=6, side=16, channels=4) -> torch.Tensor:
    """A ramp over time: frame k is grey level k."""
    levels = torch.arange(frames) / 8 - 0.5
    frames = levels[None, :, None, None].expand(3, -1, side, side)
    return torch.cat([frames, torch.ones_like(frames[:1])])[:channels]


@pytest.fixture
def folder(tmp_path):
    save_video(clip(), tmp_path / "red_fox-2.webp", 8)
    (tmp_path / "b").mkdir()
    save_video(clip(channels=3), tmp_path / "b" / "cat.mp4", 8)
    (tmp_path / "b" / "cat.txt").write_text("a cat\nkitten\n")
    rows = [
        {"file": "b/cat.mp4", "text": "pet"},
        {"file_name": "red_fox-2.webp", "caption": ["fox"]},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_folder_and_list(folder):
    data = ClipFolder(folder)
    assert [data.captions(i) for i in range(len(data))] == [["pet", "a cat", "kitten"], ["fox"]]
    assert data.clip(0).frames.shape == (3, 6, 16, 16) and data.clip(1).frames.shape[0] == 4
    assert data.clip(1).frame_rate == 8
    (folder / "captions.jsonl").rename(folder / "other.jsonl")
    assert ClipFolder(folder).name(1) == "red fox 2"
    data = ClipList(folder / "other.jsonl", num_frames=9, size=8)
    assert data.clip(0).frames.shape == (3, 9, 8, 8)
    assert data.caption(1, random.Random(0)) == "fox"
    outside = {"file": "../x.mp4", "text": "x"}
    (folder / "other.jsonl").write_text(json.dumps(outside))
    with pytest.raises(InputError, match="is no file in this folder"):
        ClipList(folder / "other.jsonl")


def test_windows_lie_in_the_middle_or_where_chance_has_it(folder):
    data = ClipFolder(folder, num_frames=2)
    fox = data.clip(1).frames
    assert torch.allclose(fox, clip()[:, 2:4], atol=0.01)
    starts = {round(float(data.clip(1, random.Random(i)).frames[0, 0, 0, 0]), 1) for i in range(30)}
    assert len(starts) == 5


def test_shards(tmp_path, folder):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / "b" / "cat.mp4", "0.mp4")
        tar.add(folder / "b" / "cat.txt", "0.txt")
        tar.add(folder / "red_fox-2.webp", "1.webp")
        tar.add(folder / "b" / "cat.txt", "1.txt")
        tar.add(folder / "b" / "cat.txt", "2.txt")
    data = ClipShards(tmp_path / "a.tar", size=8)
    assert len(data) == 2 and data.name(1) == "a cat"
    assert [data.clip(i).frames.shape for i in range(2)] == [(3, 6, 8, 8), (4, 6, 8, 8)]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(folder / "b" / "cat.txt", "0.txt")
    with pytest.raises(InputError, match="No videos in"):
        ClipShards(tmp_path / "b.tar")


def test_animated_pack_expands_merged_frames(tmp_path):
    moving = clip(4).repeat_interleave(torch.tensor([1, 3, 2, 2]), dim=1)
    save_video(moving, tmp_path / "x.webp", 8)
    data = (tmp_path / "x.webp").read_bytes()
    (tmp_path / "real.bin").write_bytes(b"??" + data)
    row = {"id": "a", "kind": "real", "name": "fox", "caption": "fox, animated", "frames": 8}
    row |= {"split": "train", "file": "real.bin", "offset": 2, "length": len(data)}
    rows = [row, row | {"split": "test"}, row | {"kind": "procedural", "keywords": ["red", "fur"]}]
    (tmp_path / "animated.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pack = AnimatedPack(tmp_path, kinds=["real"])
    assert len(pack) == 1 and len(AnimatedPack(tmp_path)) == 2
    assert torch.allclose(pack.clip(0).frames, moving, atol=0.01)
    assert pack.clip(0).frame_rate == pytest.approx(8)
    half = AnimatedPack(tmp_path, num_frames=4, size=8).clip(1)
    assert half.frames.shape == (4, 4, 8, 8) and half.frame_rate == pytest.approx(4)
    assert AnimatedPack(tmp_path).captions(1) == ["fox, animated", "fox", "red fur"]
    with pytest.raises(InputError, match='Unknown split "training"'):
        AnimatedPack(tmp_path, splits=["training"])


class Stickers:
    """Two stickers: an opaque square, its left half red and its right half blue, and a small one."""

    def __len__(self):
        return 2

    def image(self, index):
        picture = Image.new("RGBA", (128, 128), "red")
        picture.paste("blue", (64, 0, 128, 128))
        return picture

    def name(self, index):
        return ("fox", "owl")[index]

    def captions(self, index):
        return [self.name(index), "animal"]

    def caption(self, index, rng):
        return rng.choice(self.captions(index))


def centre(frame: Image.Image) -> tuple[float, float]:
    """Centre of the opaque part in half-canvas units."""
    alpha = np.asarray(frame)[..., 3] / 255.0
    places = (np.arange(len(alpha)) + 0.5) / len(alpha) * 2 - 1
    return (alpha.sum(0) @ places / alpha.sum(), alpha.sum(1) @ places / alpha.sum())


@pytest.mark.parametrize("motion", [m for m in MOTIONS if m != "raining"])
def test_stickers_stand_where_the_pose_says(motion):
    frames = animate(Stickers().image(0), motion, random.Random(0))
    assert len(frames) == 16 and frames[0].size == (64, 64)
    for k, frame in enumerate(frames):
        at = pose(motion, k / 16)
        reach = 0.5 * np.hypot(at.width, at.height) * 2
        if max(abs(at.x), abs(at.y)) + reach > 1 or abs(at.width) < 0.1:
            continue  # Cut off by the edge, or as good as nothing.
        assert centre(frame) == pytest.approx((at.x, at.y), abs=0.03)
        if at.angle % 90 == 0:
            covered = np.asarray(frame)[..., 3].mean() / 255
            expected = abs(at.width) * at.height * at.opacity
            assert covered == pytest.approx(expected, abs=0.03)


def test_flipping_mirrors_and_spinning_turns():
    picture = Stickers().image(0)
    flipping = animate(picture, "flipping", random.Random(0))
    red = [np.asarray(frame)[32, 24, 0] > 127 for frame in (flipping[0], flipping[8])]
    assert red == [True, False]
    turned = animate(picture, "spinning", random.Random(0))[4]  # A quarter clockwise: red on top.
    assert np.asarray(turned)[20, 32, 0] > 127 and np.asarray(turned)[44, 32, 2] > 127


def test_rain_falls_where_chance_has_it():
    picture = Stickers().image(0)
    one, same, other = (animate(picture, "raining", random.Random(s)) for s in (1, 1, 2))
    assert np.array_equal(one[3], same[3]) and not np.array_equal(one[3], other[3])


def test_procedural_animations():
    data = ProceduralAnimations(Stickers(), exclude=[("fox", "spinning")])
    assert len(data) == 2 * len(MOTIONS) - 1
    assert data.name(0) == "fox bouncing" and "raining owl" in [
        data.name(i) for i in range(len(data))
    ]
    made = data.clip(0)
    assert made.frames.shape == (4, 16, 64, 64) and made.frame_rate == 8
    assert data.caption(0, random.Random(0)) in ("fox bouncing", "animal bouncing")
    small = ProceduralAnimations(Stickers(), ["circling"], num_frames=5, size=32).clip(1)
    assert small.frames.shape == (4, 5, 32, 32)
    with pytest.raises(InputError, match='Unknown motion "jumping"'):
        ProceduralAnimations(Stickers(), ["jumping"])
    with pytest.raises(InputError, match="No sticker is left"):
        ProceduralAnimations(
            Stickers(), ["circling"], exclude=[("fox", "circling"), ("owl", "circling")]
        )
