from __future__ import annotations

import gzip
import io
import json
import random
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from tessera.modalities.datasets import (
    ImageTextFolder,
    StickerPack,
    WebDataset,
    open_dataset,
)
from tessera.modalities.errors import InputError


def picture(seed=0, mode="RGBA"):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, len(mode)), np.uint8)
    return Image.fromarray(pixels)


def encoded(image, file_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def same(a, b):
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


def captions(dataset, index, seed=0, draws=200):
    rng = random.Random(seed)
    return [dataset.caption(index, rng) for _ in range(draws)]


@pytest.fixture
def pack(tmp_path):
    """A miniature sticker pack: a table, and one concatenation of pictures a style."""
    root = tmp_path / "pack"
    root.mkdir()
    rows = [
        ("noto", "1f98a", "fox", ["animal", "face", "red"], "animals-nature", "train", {}),
        ("noto", "2764", "red heart", ["heart"], "smileys-emotion", "test", {}),
        ("noto", "1f44b-1f3fb", "waving hand", [], "people-body", "train", {"tone": True}),
        ("noto", "1f1e9-1f1ea", "flag: Germany", [], "flags", "train", {}),
        ("openmoji", "1f98a", "fox", ["animal"], "animals-nature", "train", {}),
        ("glyph", "g:heart plus", "heart plus", [], "Glyph", "train", {"author": "someone"}),
    ]
    bins: dict[str, bytes] = {}
    with open(root / "captions.jsonl", "w", encoding="utf8") as table:
        for i, (style, code, name, keywords, group, split, more) in enumerate(rows):
            data = encoded(picture(i))
            row = {"id": f"{style}/{code}", "style": style, "unicode": code, "base": code}
            row |= {"name": name, "keywords": keywords, "group": group, "split": split}
            row |= {"offset": len(bins.get(style, b"")), "length": len(data)} | more
            bins[style] = bins.get(style, b"") + data
            table.write(json.dumps(row) + "\n")
    for style, data in bins.items():
        (root / f"{style}.bin").write_bytes(data)
    with gzip.open(root / "names_i18n.json.gz", "wt", encoding="utf8") as file:
        json.dump({"1f98a": {"en": "fox", "de": "Fuchs"}}, file)
    return root


def test_sticker_pack_keeps_what_it_should(pack):
    names = [sticker.id for sticker in StickerPack(pack).stickers]
    assert names == ["noto/1f98a", "glyph/g:heart plus"]
    assert [s.name for s in StickerPack(pack, splits=["test"]).stickers] == ["red heart"]
    assert len(StickerPack(pack, styles=["openmoji"])) == 1
    everything = StickerPack(
        pack, ["noto", "glyph"], ("train", "val", "test"), exclude_groups=(), tones=True
    )
    assert len(everything) == 5


def test_sticker_pack_pictures_names_translations(pack):
    dataset = StickerPack(pack)
    assert same(dataset.image(0), picture(0)) and same(dataset.image(1), picture(5))
    assert dataset.name(1) == "heart plus"
    assert dataset.translations(0)["de"] == "Fuchs" and dataset.translations(1) == {}


def test_sticker_captions(pack):
    dataset = StickerPack(pack)
    fox = set(captions(dataset, 0))
    assert {"fox", "fox, noto", "a noto fox", "🦊"} <= fox
    assert any(word in caption for caption in fox for word in ("animal", "face", "red"))
    glyph = {"heart plus", "heart plus, black glyph", "a black glyph heart plus"}
    assert set(captions(dataset, 1)) == glyph  # No keywords and no character of its own.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"styles": ["oil"]}, 'Unknown style "oil": choose from fluent-3d'),
        ({"splits": ["dev"]}, 'Unknown split "dev": choose from train, val, test'),
    ],
)
def test_sticker_pack_refuses_unknown_choices(pack, options, message):
    with pytest.raises(InputError, match=message):
        StickerPack(pack, **options)


def test_sticker_pack_with_missing_parts(pack):
    (pack / "noto.bin").write_bytes((pack / "noto.bin").read_bytes()[:30])
    (pack / "glyph.bin").unlink()
    dataset = StickerPack(pack)
    with pytest.raises(InputError, match="sticker noto/1f98a"):
        dataset.image(0)
    with pytest.raises(InputError, match=r"glyph\.bin.*No such file"):
        dataset.image(1)
    with pytest.raises(InputError, match=r"No captions\.jsonl"):
        StickerPack(pack / "nothing")
    (pack / "captions.jsonl").write_text('{"file": "a.png", "text": "fox", "keywords": []}\n')
    with pytest.raises(InputError, match=r"Line 1 .* has no 'id'"):
        StickerPack(pack)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    picture(0).save(root / "a.png")
    (root / "a.txt").write_text("\ufeffa red fox\n\n  a fox  \n", encoding="utf8")
    picture(1, "RGB").save(root / "more" / "b.PNG")
    picture(2).save(root / "more" / "blue_owl-2.webp", lossless=True)
    (root / "notes.md").write_text("not a picture")
    row = {"file_name": "more/b.PNG", "text": "a tree"}
    (root / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    row = {"file": "./more/b.PNG", "caption": ["an oak", " "]}
    (root / "captions.jsonl").write_text(json.dumps(row) + "\n")
    return root


def test_folder_reads_pictures_and_captions(folder):
    dataset = ImageTextFolder(folder)
    assert len(dataset) == 3
    assert [dataset.name(i) for i in range(3)] == ["a red fox", "an oak", "blue owl 2"]
    assert same(dataset.image(0), picture(0))
    assert same(dataset.image(1), picture(1, "RGB").convert("RGBA"))
    assert set(captions(dataset, 0)) == {"a red fox", "a fox"}
    assert set(captions(dataset, 1)) == {"an oak", "a tree"}
    assert set(captions(dataset, 2)) == {"blue owl 2"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", 'Line 1 of ".*captions.jsonl" is not a JSON object'),
        ("[1]", "is not a JSON object"),
        ("[" * 50_000, "is not a JSON object"),
        ('{"file_name": "a.png"}', 'needs "file_name" and "text"'),
        ('{"file_name": 5, "text": "x"}', 'needs "file_name" and "text"'),
        ('{"file_name": "c.png", "text": "x"}', '"c.png", which is not a picture in this folder'),
        ('{"file_name": "../secret.png", "text": "x"}', "not a picture in this folder"),
    ],
)
def test_folder_refuses_rows_that_do_not_fit(folder, line, message):
    picture().save(folder.parent / "secret.png")
    (folder / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        ImageTextFolder(folder)


def test_folder_refuses_nothing_and_damage(folder, tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        ImageTextFolder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="No pictures in"):
        ImageTextFolder(tmp_path / "empty")
    (folder / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r'a\.txt" are not UTF-8'):
        ImageTextFolder(folder).name(0)
    (folder / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r'a\.png": not a PNG'):
        ImageTextFolder(folder).image(0)


@pytest.fixture
def shards(tmp_path):
    """Two shards as the webdataset package writes them."""
    root = tmp_path / "shards"
    root.mkdir()
    samples = [
        {"__key__": "s/0", "png": encoded(picture(0)), "txt": "a fox\na red fox"},
        {"__key__": "s/1", "jpg": encoded(picture(1, "RGB"), "JPEG"), "json": {"text": "an owl"}},
        {"__key__": "s/2", "txt": "a caption without a picture"},
        {"__key__": "s/3", "webp": encoded(picture(3), "WEBP"), "json": {"caption": ["x", "y"]}},
        {"__key__": "s/4", "png": encoded(picture(4)), "cls": 3},
    ]
    for shard in range(2):
        with webdataset.TarWriter(str(root / f"train-{shard:03}.tar")) as writer:
            for sample in samples[3 * shard : 3 * shard + 3]:
                writer.write(sample)
    return root


@pytest.mark.parametrize("pattern", ["", "train-{000..001}.tar"])
def test_webdataset_reads_shards_at_random(shards, pattern):
    dataset = WebDataset(shards / pattern)
    assert len(dataset) == 4
    assert [dataset.name(i) for i in range(3)] == ["a fox", "an owl", "x"]
    assert same(dataset.image(0), picture(0)) and same(dataset.image(3), picture(4))
    assert dataset.image(1).mode == "RGBA"
    assert set(captions(dataset, 0)) == {"a fox", "a red fox"}
    assert set(captions(dataset, 2)) == {"x", "y"}
    with pytest.raises(InputError, match=r'no caption in sample 3 of ".*train-001\.tar"'):
        dataset.name(3)


def test_webdataset_refuses_what_is_no_shard(shards, tmp_path):
    with pytest.raises(InputError, match=r'no file ".*none\.tar"'):
        WebDataset(tmp_path / "none.tar")
    (tmp_path / "text.tar").write_text("not a tar " * 200)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(shards / "train-000.tar", "x.png")
    for name in ("text.tar", "packed.tar"):
        with pytest.raises(InputError, match=r"is not a plain \(uncompressed\) tar"):
            WebDataset(tmp_path / name)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(InputError, match="No pictures in"):
        WebDataset(tmp_path / "empty.tar")


def test_open_dataset_picks_by_what_lies_there(pack, folder, shards):
    assert isinstance(open_dataset(pack), StickerPack)
    assert len(open_dataset(str(pack), styles=["openmoji"])) == 1
    assert isinstance(open_dataset("stickers", root=pack), StickerPack)
    assert isinstance(open_dataset(folder), ImageTextFolder)
    assert isinstance(open_dataset("folder", root=folder), ImageTextFolder)
    assert isinstance(open_dataset(shards), WebDataset)
    assert isinstance(open_dataset(shards / "train-{000..001}.tar"), WebDataset)
    with pytest.raises(InputError, match=r'no data at "nowhere"'):
        open_dataset("nowhere")
    with pytest.raises(InputError, match=r"ImageTextFolder cannot take these options.*styles"):
        open_dataset(folder, styles=["noto"])


def test_captions_come_from_the_given_rng_alone(pack, folder, shards):
    for path in (pack, folder, shards):
        dataset = open_dataset(path)
        random.seed(1)
        first = captions(dataset, 0, seed=5)
        random.seed(2)
        state = random.getstate()
        assert captions(open_dataset(path), 0, seed=5) == first
        assert captions(dataset, 0, seed=6) != first
        assert random.getstate() == state
