"""The command line, over a tiny model in place of the shipped one."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tessera.app import commands_tokens
from tessera.app.commands import cli
from tessera.app.commands_shared import slug
from tessera.modalities.errors import InputError
from tessera.modalities.image import load_image, read_record, save_image
from tessera.modalities.metadata import decode_tokens, make_record
from tessera.modalities.token_file import read_tokens, write_tokens
from tessera.pipelines.reconstruction import ReconstructionPipeline
from tessera.pipelines.text_to_image import TextToImagePipeline
from tessera.tests.tiny import tiny_pack, tiny_pipeline, tiny_tokenizer
from tessera.tokenizers.base import Tokenizer
from tessera.weights import loading, registry
from tessera.weights.registry import ModelInfo

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder of shipped models that holds the tiny one as "sticker"."""
    folder = tmp_path_factory.mktemp("shipped")
    tiny_pipeline().save_pretrained(folder / "sticker")
    row = {
        "title": "Tiny stickers",
        "task": "text-to-image",
        "model": "pipelines.text_to_image:TextToImagePipeline",
        "license_weights": "Apache-2.0",
        "tokens": "1-16",
    }
    (folder / "sticker" / "tessera.json").write_text(json.dumps(row))
    return folder


@pytest.fixture(autouse=True)
def workplace(shipped, tmp_path, monkeypatch):
    """An empty current folder, and "sticker" as a shipped model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "SHIPPED", shipped)
    registry._models.cache_clear()
    yield tmp_path
    registry._models.cache_clear()


def tessera(*arguments, code=0, **options):
    """Run the command line; what fails says so in one line and leaves no traceback."""
    result = CliRunner().invoke(cli, [str(each) for each in arguments], **options)
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None)
    if code == 2:
        assert result.stderr.splitlines()[-1].startswith("Error: ")
        assert result.stdout == ""
    return result


def lines(result):
    return result.stdout.splitlines()


def files(folder="."):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def picture(path="red.png", size=(60, 40), colour="red"):
    Image.new("RGB", size, colour).save(path)
    return Path(path)


# Help, and what loads


def test_alone_it_shows_one_screen_of_help():
    shown = tessera().stdout
    assert 'tessera image "a sleepy red fox" -n 4 --seed 7 -o foxes/' in shown
    assert len(shown.splitlines()) <= 40
    assert all(len(line) <= 80 and "..." not in line for line in shown.splitlines()[1:])
    assert tessera("--help").stdout == shown
    assert tessera("--version").stdout == "tessera 0.1.0\n"


def test_nothing_heavy_is_imported_before_it_is_needed():
    script = """
import sys
import tessera
heavy = {"torch", "numpy", "diffusers", "gradio", "PIL", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "typer" not in sys.modules
from typer.testing import CliRunner
from tessera.app.commands import cli
for arguments in [], ["image", "--help"], ["models", "list"], ["image", ""], ["train", "nothing"]:
    CliRunner().invoke(cli, arguments)
    assert not heavy & set(sys.modules), (arguments, heavy & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# image


def test_pictures_are_named_by_prompt_and_seed():
    result = tessera("image", "A sleepy {red,blue} fox!", "-n", 2, "--seed", 7, "-o", "foxes/")
    names = [f"foxes/a-sleepy-{c}-fox_{seed}.png" for c in ("red", "blue") for seed in (7, 8)]
    assert lines(result) == names
    assert files() == sorted(names)
    record = read_record(names[3])
    assert (record["prompt"], record["seed"], record["index"]) == ("A sleepy blue fox!", 8, 1)
    assert (record["model"], record["pipeline"]) == ("sticker", "TextToImagePipeline")
    assert record["settings"]["num_tokens"] == 8
    assert len(decode_tokens(record["tokens"])) == 8
    assert load_image(names[0]).size == (32, 32)


def test_without_out_pictures_go_to_the_folder_of_the_day():
    (path,) = lines(tessera("image", "red ring", "--seed", 1))
    assert Path(path).match("outputs/????-??-??/??????_red-ring_1.png")
    assert Path(path).is_file()


def test_a_missing_seed_is_random_and_printed():
    found = set()
    for _ in range(2):
        result = tessera("image", "red ring", "-o", "here")
        seed = Path(lines(result)[0]).stem.rpartition("_")[2]
        assert f"seed {seed}" in result.stderr
        found.add(seed)
    assert len(found) == 2


def test_a_picture_has_the_same_tokens_alone_and_among_others():
    options = ("--seed", 4_294_967_290, "--json")
    many = json.loads(tessera("image", "red ring", "-n", 10, *options, "-o", "a").stdout)[
        "pictures"
    ]
    assert [p["seed"] for p in many] == [*range(4_294_967_290, 4_294_967_296), 0, 1, 2, 3]
    assert len({p["tokens"] for p in many}) > 5
    alone = json.loads(tessera("image", "red ring", "--seed", 3, "--json", "-o", "b").stdout)
    assert alone["pictures"][0]["tokens"] == many[9]["tokens"]
    difference = torch.tensor(
        [list(load_image(p["path"]).tobytes()) for p in (alone["pictures"][0], many[9])]
    )
    assert (difference[0] - difference[1]).abs().max() <= 2


def test_settings_reach_the_model_and_the_record():
    plain = ("image", "red ring", "--seed", 3)
    settings = ("--tokens", 12, "--guidance", 1, "--temperature", 0.5, "--steps", 1)
    tessera(*plain, *settings, "--style", "3d", "-o", "new.webp")
    kept = read_record("new.webp")["settings"]
    assert (kept["num_tokens"], kept["num_inference_steps"], kept["style"]) == (12, 1, "3d")
    assert (kept["guidance_scale"], kept["temperature"]) == (1, 0.5)
    expected = TextToImagePipeline.from_pretrained("sticker")(
        "red ring",
        num_tokens=12,
        guidance_scale=1,
        temperature=0.5,
        num_inference_steps=1,
        style="3d",
        generator=[torch.Generator().manual_seed(3)],
    )
    assert decode_tokens(read_record("new.webp")["tokens"]).tolist() == expected.tokens[0].tolist()
    assert load_image("new.webp").tobytes() == expected.images[0].tobytes()


@pytest.mark.parametrize(
    ("options", "path", "kind"),
    [
        (["-o", "fox.jpg"], "fox.jpg", "JPEG"),
        (["-o", "fox.webp", "--format", "webp"], "fox.webp", "WEBP"),
        (["-o", "new", "--format", "webp"], "new/red-ring_5.webp", "WEBP"),
        (["-o", ".", "--format", "jpeg"], "red-ring_5.jpeg", "JPEG"),
    ],
)
def test_files_folders_and_formats(options, path, kind):
    assert lines(tessera("image", "red ring", "--seed", 5, *options)) == [path]
    with Image.open(path) as image:
        assert image.format == kind
    assert read_record(path)["seed"] == 5


def test_nothing_is_overwritten_without_force():
    command = ("image", "red ring", "--seed", 5, "-o", "fox.png")
    tessera(*command)
    before = Path("fox.png").read_bytes()
    again = ("image", "blue ring", "--seed", 6, "-o", "fox.png")
    assert '"fox.png" exists already' in tessera(*again, code=2).stderr
    assert Path("fox.png").read_bytes() == before
    tessera(*again, "-f")
    assert read_record("fox.png")["prompt"] == "blue ring"
    Path("red-ring_9.png").write_text("mine")
    tessera("image", "red ring", "-n", 3, "--seed", 7, "-o", ".", code=2)
    assert files() == ["fox.png", "red-ring_9.png"]


def test_json_names_every_picture():
    result = tessera("image", "{red,blue} ring", "--seed", 2, "-o", "a", "--json")
    report = json.loads(result.stdout)
    assert report["model"] == "sticker"
    assert [p["path"] for p in report["pictures"]] == ["a/red-ring_2.png", "a/blue-ring_2.png"]
    assert [p["prompt"] for p in report["pictures"]] == ["red ring", "blue ring"]


def test_a_clean_picture_says_nothing_of_its_making():
    tessera("image", "red ring", "--seed", 2, "-o", "clean.png", "--no-metadata")
    assert read_record("clean.png") is None
    assert b"ring" not in Path("clean.png").read_bytes()


def test_prompts_from_a_file_and_from_stdin():
    Path("prompts.txt").write_text("red ring\n\n{blue,green} ring\nred ring\n", encoding="utf8")
    wanted = ["a/red-ring_1.png", "a/blue-ring_1.png", "a/green-ring_1.png"]
    assert lines(tessera("image", "--from", "prompts.txt", "--seed", 1, "-o", "a")) == wanted
    result = tessera("image", "--from", "-", "--seed", 1, "-o", "b", input="red? ring\nred ring\n")
    assert lines(result) == ["b/red-ring_1.png", "b/red-ring-2_1.png"]


def test_what_the_model_does_not_read_is_said():
    result = tessera("image", "red ring " * 60, "--seed", 1, "-o", "long.png")
    assert "Prompt has 120 words; this model reads the first" in result.stderr
    assert "Warning" not in tessera("image", "red ring", "--seed", 1, "-o", "short.png").stderr


def test_slug():
    assert slug("A sleepy, red fox!") == "a-sleepy-red-fox"
    assert slug("Größe 7") == "größe-7"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("🦊") == "picture"
    assert len(slug("word " * 400)) <= 48


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "The prompt is empty"),
        ([" \t\u200b"], "The prompt is empty"),
        (["x" * 10_000], "10,000 characters"),
        ([], "Give one prompt"),
        (["ring", "--from", "prompts.txt"], "Give one prompt"),
        (["--from", "none.txt"], '"none.txt": No such file'),
        (["--from", "picture.png"], "not a text file in UTF-8"),
        (["{a,b}" * 8], "more than 100 prompts"),
        (["ring", "-n", "0"], "-n"),
        (["ring", "--seed", "-5"], "whole number from 0 to 4294967295, got -5"),
        (["ring", "--seed", "x"], "--seed"),
        (["ring", "--tokens", "300"], "1 to 16 tokens, got 300. Use 16."),
        (["ring", "--tokens", "0"], "1 to 16 tokens, got 0"),
        (["ring", "--guidance", "nan"], "--guidance"),
        (["ring", "--temperature", "-1"], "--temperature"),
        (["ring", "--style", "oil"], 'Unknown style "oil": choose from 3d, flat'),
        (["ring", "--model", "stickr"], 'Unknown model "stickr"'),
        (["ring", "--model", "flextok-d12-d12"], "makes no pictures from text"),
        (["ring", "--model", "empty"], '"empty" could not be loaded'),
        (["ring", "-o", "no/where/fox.png"], 'folder "no/where" does not exist'),
        (["ring", "-o", "no/where/"], 'folder "no" does not exist'),
        (["ring", "-o", "fox.bmp"], "must end in .png"),
        (["ring", "-o", "fox.png", "-n", "2"], "names one file, but 2 pictures"),
        (["ring", "-o", "fox.png", "--format", "webp"], "--format webp does not fit"),
        (["ring", "-o", "plain/"], '"plain" is a file'),
        (["ring", "--format", "gif"], "--format"),
        (["ring", "--colour", "red"], "--colour"),
    ],
)
def test_bad_arguments_of_image(arguments, words):
    picture("picture.png")
    Path("plain").write_text("")
    Path("empty").mkdir()
    before = files()
    assert words in tessera("image", *arguments, code=2).stderr
    assert files() == before
    assert not Path("outputs").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def drop_weights(path):
    state = load_file(path)
    state.popitem()
    save_file(state, path)


def other_weights(path):
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize("part", ["generator", "tokenizer"])
@pytest.mark.parametrize("damage", [truncate, drop_weights, other_weights])
def test_damaged_checkpoints_and_those_of_something_else(part, damage, workplace):
    tiny_pipeline().save_pretrained("model")
    damage(Path("model", part, WEIGHTS))
    before = files()
    assert "model" in tessera("image", "ring", "--model", "model", code=2).stderr
    if part == "tokenizer":
        picture()
        tessera("encode", "red.png", "--tokenizer", "model", code=2)
        Path("red.png").unlink()
    assert files() == before


def test_a_full_disk_keeps_what_is_saved_and_leaves_no_halves(monkeypatch):
    save, saved = Image.Image.save, []

    def full(self, path, *arguments, **options):
        if saved:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        saved.append(path)
        save(self, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    result = tessera("image", "red ring", "-n", 3, "--seed", 1, "-o", "a", code=1)
    assert lines(result) == files() == ["a/red-ring_1.png"]
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "No space left on device" in error


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Stopped."),
        (MemoryError(), 1, "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "Permission denied"),
    ],
)
def test_failures_in_the_middle_keep_what_is_finished(monkeypatch, failure, code, words):
    stream = TextToImagePipeline.stream

    def failing(self, prompt, **settings):
        if prompt == "blue ring":
            raise failure
        return stream(self, prompt, **settings)

    monkeypatch.setattr(TextToImagePipeline, "stream", failing)
    command = ["image", "{red,blue} ring", "--seed", "1", "-o", "a"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == code
    assert lines(result) == files() == ["a/red-ring_1.png"]
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_is_not_dressed_up(monkeypatch):
    def broken(self, prompt, **settings):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TextToImagePipeline, "stream", broken)
    result = CliRunner().invoke(cli, ["image", "ring", "-o", "a"])
    assert isinstance(result.exception, RuntimeError)
    assert result.exit_code == 1


# info


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_info_shows_the_record_and_a_rerun_is_identical(suffix):
    path = f"fox.{suffix}"
    tessera("image", "red ring", "--seed", 5, "--style", "3d", "-o", path)
    shown = tessera("info", path).stdout
    assert "red ring" in shown and "sticker" in shown
    assert json.loads(tessera("info", path, "--json").stdout) == read_record(path)
    assert lines(tessera("info", path, "--rerun"))[-1] == "identical"
    report = json.loads(tessera("info", path, "--rerun", "--json").stdout)
    assert report["rerun"]["identical"] is True


def test_each_picture_of_a_batch_reruns_identically():
    paths = lines(tessera("image", "red ring", "-n", 3, "--seed", 2**32 - 2, "-o", "a"))
    for path in paths:
        assert lines(tessera("info", path, "--rerun"))[-1] == "identical"


def test_a_rerun_sees_other_pixels_other_tokens_and_other_weights(shipped):
    tessera("image", "red ring", "--seed", 5, "-o", "fox.png")
    record, image = read_record("fox.png"), load_image("fox.png")
    image.putpixel((3, 3), tuple(255 - c for c in image.getpixel((3, 3))))
    save_image(image, "pixel.png", record)
    assert "the tokens are the same" in tessera("info", "pixel.png", "--rerun", code=1).stdout
    save_image(load_image("fox.png"), "seed.png", {**record, "seed": 6})
    assert "the tokens are others" in tessera("info", "seed.png", "--rerun", code=1).stdout
    save_image(image.resize((16, 16)), "small.png", record)
    assert "16x16 pixels became 32x32" in tessera("info", "small.png", "--rerun", code=1).stdout

    tiny_pipeline().save_pretrained("other")
    weights = Path("other", "generator", WEIGHTS)
    save_file({key: value * 1.5 for key, value in load_file(weights).items()}, weights)
    result = tessera("info", "fox.png", "--rerun", "--model", "other", code=1)
    assert "the model's weights are not those that made it" in result.stdout


def test_a_rerun_loads_only_what_ships_or_was_asked_for():
    image = Image.new("RGB", (32, 32))
    tiny_pipeline().save_pretrained("mine")
    tessera("image", "red ring", "--seed", 5, "--model", "mine", "-o", "fox.png")
    assert "pass its folder" in tessera("info", "fox.png", "--rerun", code=2).stderr
    assert lines(tessera("info", "fox.png", "--rerun", "--model", "mine"))[-1] == "identical"
    for model in ("stranger/model", "flextok-d12-d12"):
        save_image(image, "hub.png", make_record("TextToImagePipeline", model, "ring", 1))
        assert "pass its folder" in tessera("info", "hub.png", "--rerun", code=2).stderr
    save_image(image, "bare.png", make_record("TextToImagePipeline", "sticker", "ring", 1))
    assert "cannot be made again" in tessera("info", "bare.png", "--rerun", code=2).stderr


def test_info_of_other_files():
    picture("plain.png")
    Path("text.png").write_text("no picture")
    assert "has no Tessera settings" in tessera("info", "plain.png", code=2).stderr
    assert "not a PNG" in tessera("info", "text.png", code=2).stderr
    assert "no such file" in tessera("info", "none.png", code=2).stderr
    assert "no such file" in tessera("info", "none.tok", code=2).stderr


# encode, decode, reconstruct


def test_encode_and_decode_agree_with_the_pipeline():
    picture()
    result = tessera("encode", "red.png", "-o", "cat.tok")
    expected = ReconstructionPipeline(tiny_tokenizer())("red.png", [4, 16])
    assert lines(result) == ["cat.tok"]
    psnr = expected.psnr[16][0]
    assert f"16 tokens x 9 bit = 18 bytes   PSNR {psnr:.1f} dB" in result.stderr
    content = read_tokens("cat.tok")
    assert content.tokenizer == "sticker"
    assert content.tokens.tolist() == expected.tokens[0].tolist()
    assert lines(tessera("decode", "cat.tok")) == ["cat.png"]
    tessera("decode", "cat.tok", "--tokens", 4, "-o", "cat4.png")
    for path, count in (("cat.png", 16), ("cat4.png", 4)):
        assert load_image(path).tobytes() == expected.reconstructions[count][0].tobytes()
        assert len(decode_tokens(read_record(path)["tokens"])) == count
        assert lines(tessera("info", path, "--rerun"))[-1] == "identical"
    assert "sticker" in tessera("info", "cat.tok").stdout
    shown = json.loads(tessera("info", "cat.tok", "--json").stdout)
    assert shown == {"tokenizer": "sticker", "tokens": 16, "bits": 9, "bytes": 18}


def test_json_of_the_token_verbs():
    picture()
    report = json.loads(tessera("encode", "red.png", "--json").stdout)
    assert (report["path"], report["tokens"], report["bytes"]) == ("red.tok", 16, 18)
    report = json.loads(tessera("decode", "red.tok", "-o", "a.png", "--json").stdout)
    assert report == {"path": "a.png", "tokenizer": "sticker", "tokens": 16, "seed": 0}
    report = json.loads(tessera("reconstruct", "red.png", "--tokens", "1,16", "--json").stdout)
    assert list(report["psnr"]) == ["1", "16"]
    assert report["path"] == "red_tokens.png"


def test_reconstruct_shows_the_original_and_each_prefix():
    picture(size=(32, 32))
    result = tessera("reconstruct", "red.png", "-o", "grid.png", "--tokens", "1,4,16")
    expected = ReconstructionPipeline(tiny_tokenizer())("red.png", [1, 4, 16])
    table = [line.split() for line in result.stderr.splitlines()]
    for count in (1, 4, 16):
        assert [str(count), f"{expected.psnr[count][0]:.1f}", "dB"] in table
    grid = load_image("grid.png")
    assert grid.size == (4 * (60 + 4) + 4, 32 + 16 + 2 * 4)
    cells = [grid.crop((18 + 64 * i, 4, 50 + 64 * i, 36)) for i in range(4)]
    assert cells[0].tobytes() == load_image("red.png").tobytes()
    for cell, count in zip(cells[1:], (1, 4, 16), strict=True):
        assert cell.tobytes() == expected.reconstructions[count][0].tobytes()
    assert read_record("grid.png")["settings"]["tokens"] == "1,4,16"
    default = json.loads(tessera("reconstruct", "red.png", "--json").stdout)
    assert list(default["psnr"]) == ["1", "2", "4", "8", "16"]


class Mosaic(ModelMixin, ConfigMixin, Tokenizer):
    """4x4 means of a picture as 16 grey levels: neither ordered nor drawing noise."""

    num_tokens, vocab_size, ordered, image_size = 16, 256, False, 32

    @register_to_config
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(127.5))

    def encode(self, images):
        cells = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8)
        return (cells + 1).mul(self.scale).round().long().flatten(1)

    def decode(self, tokens):
        cells = tokens.view(-1, 1, 4, 4) / self.scale - 1
        return cells.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)


class Captioned(Mosaic):
    def decode(self, tokens, text_embeddings):
        return super().decode(tokens)


def test_a_tokenizer_that_is_not_ordered_and_draws_nothing(monkeypatch):
    monkeypatch.setattr(commands_tokens, "load_tokenizer", lambda name: Mosaic())
    picture(size=(32, 32), colour="#777777")
    report = json.loads(tessera("encode", "red.png", "--json").stdout)
    assert report["psnr"] > 100
    tessera("decode", "red.tok", "-o", "again.png")
    assert load_image("again.png").tobytes() == load_image("red.png").tobytes()
    report = json.loads(tessera("reconstruct", "red.png", "--json").stdout)
    assert list(report["psnr"]) == ["16"]
    result = tessera("reconstruct", "red.png", "--tokens", "8", "-f", code=2)
    assert "decodes only all of its 16 tokens, got 8" in result.stderr
    result = tessera("decode", "red.tok", "--tokens", 8, "-o", "x.png", code=2)
    assert "decodes only all of its 16 tokens, got 8" in result.stderr
    monkeypatch.setattr(commands_tokens, "load_tokenizer", lambda name: Captioned())
    result = tessera("decode", "red.tok", "-o", "x.png", code=2)
    assert "decodes tokens together with text_embeddings" in result.stderr


def test_a_picture_of_one_pixel_and_one_of_400_million():
    picture("one.png", (1, 1))
    tessera("encode", "one.png")
    tessera("reconstruct", "one.png", "--tokens", "16")
    # A header alone is enough to see the size.
    large = Image.new("1", (20_000, 20_000))
    large.save("large.png")
    for verb in ("encode", "reconstruct"):
        assert "400,000,000 pixels" in tessera(verb, "large.png", code=2).stderr
    assert files() == ["large.png", "one.png", "one.tok", "one_tokens.png"]


def test_bad_input_of_the_token_verbs():
    Path("text.png").write_text("no picture")
    picture()
    tessera("encode", "red.png")
    before = files()
    for arguments, words in [
        (["encode", "text.png"], 'Could not open "text.png": not a PNG'),
        (["reconstruct", "text.png"], 'Could not open "text.png": not a PNG'),
        (["encode", "none.png"], "no such file"),
        (["encode", "red.png"], '"red.tok" exists already'),
        (["encode", "red.png", "-o", "red.txt"], "must end in .tok"),
        (["encode", "red.png", "-o", "no/red.tok"], 'folder "no" does not exist'),
        (["encode", "red.png", "-o", "x.tok", "--tokenizer", "titk"], 'Unknown tokenizer "titk"'),
        (["decode", "red.png", "-o", "x.png"], "is not a token file"),
        (["decode", "red.tok", "-o", "red.png"], '"red.png" exists already'),
        (["decode", "red.tok", "-o", "x.png", "--tokens", "17"], "1 to 16 tokens, got --tokens 17"),
        (["decode", "red.tok", "-o", "x.png", "--seed", "-1"], "got -1"),
        (["reconstruct", "red.png", "--tokens", "1,x"], '"1,x" is not a list'),
        (["reconstruct", "red.png", "--tokens", "0"], "1 to 16 tokens, got 0"),
        (["reconstruct", "red.png", "-o", "x.gif"], "must end in .png"),
        (["info", "red.tok", "--rerun"], "use tessera decode"),
    ]:
        assert words in tessera(*arguments, code=2).stderr, arguments
    assert files() == before


@pytest.mark.parametrize(("vocab_size", "bits"), [(2, 1), (4096, 12), (64_000, 16), (2**32, 32)])
def test_token_files_pack_ids(vocab_size, bits):
    tokens = torch.randint(0, vocab_size, (77,), generator=torch.Generator().manual_seed(0))
    tokens[:2] = torch.tensor([0, vocab_size - 1])
    written = write_tokens("a.tok", tokens, "owner/name", vocab_size)
    content = read_tokens("a.tok")
    assert (content.tokenizer, content.bits) == ("owner/name", bits)
    assert content.tokens.tolist() == tokens.tolist()
    assert content.payload_bytes == written.payload_bytes == -(-77 * bits // 8)
    assert Path("a.tok").stat().st_size == 9 + 10 + 7 + written.payload_bytes + 4


def test_token_files_keep_continuous_tokens_and_no_paths():
    tokens = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    write_tokens("a.tok", tokens, "/home/me/my model", None)
    content = read_tokens("a.tok")
    assert torch.equal(content.tokens, tokens)
    assert (content.tokenizer, content.bits) == ("my-model", 0)
    with pytest.raises(InputError, match=r"got int64 \[1, 5\]"):
        write_tokens("b.tok", torch.zeros(1, 5, dtype=torch.int64), "a", 10)
    with pytest.raises(InputError, match=r"0 to 9, got 0 to 10"):
        write_tokens("b.tok", torch.tensor([0, 10]), "a", 10)
    assert files() == ["a.tok"]


def test_damaged_token_files_are_refused():
    write_tokens("a.tok", torch.arange(20), "sticker", 512)
    data = Path("a.tok").read_bytes()
    for length in (*range(8, len(data)), len(data) + 1):
        Path("b.tok").write_bytes((data + b"x")[:length])
        with pytest.raises(InputError, match="damaged or cut off"):
            read_tokens("b.tok")
    Path("b.tok").write_bytes(data[:-6] + b"\x01" + data[-5:])
    assert "damaged" in tessera("decode", "b.tok", code=2).stderr
    # Sound, yet not of this tokenizer: an unknown name, and ids that it does not have.
    write_tokens("c.tok", torch.arange(16), "stranger/model", 512)
    assert "pass the folder of that tokenizer" in tessera("decode", "c.tok", code=2).stderr
    write_tokens("d.tok", torch.arange(600, 616), "sticker", 1024)
    assert "must lie in 0 to 511" in tessera("decode", "d.tok", code=2).stderr


# models


def test_models_are_listed_by_pattern_and_shown():
    rows = lines(tessera("models"))
    assert rows[0].split()[:4] == ["name", "task", "tokens", "size"]
    assert rows[1].split()[:4] == ["sticker", "text-to-image", "1-16", "shipped,"]
    (row,) = [row for row in rows if row.startswith("flextok-d12-d12 ")]
    assert "1.4 GB" in row and "NON-COMMERCIAL" in row
    names = [row["name"] for row in json.loads(tessera("models", "list", "--json").stdout)]
    assert names[0] == "sticker"
    for pattern in ("flextok-d18*", "D18"):
        found = [line.split()[0] for line in lines(tessera("models", "list", pattern))[1:]]
        assert "flextok-d18-d18" in found and "sticker" not in found
    tasks = json.loads(tessera("models", "list", "--task", "text-to-image", "--json").stdout)
    assert {row["task"] for row in tasks} == {"text-to-image"}

    shown = tessera("models", "show", "flextok-d12-d12").stdout
    for words in (
        "Apple Machine Learning Research Model License",
        "Apple/EPFL Sample Code License",
        "not allowed",
        "https://arxiv.org/abs/2502.13967",
        "https://huggingface.co/EPFL-VILAB/flextok_d12_d12_in1k",
    ):
        assert words in shown
    assert json.loads(tessera("models", "show", "sticker", "--json").stdout)["shipped"] is True
    assert 'Unknown model "stickr"' in tessera("models", "show", "stickr", code=2).stderr
    assert 'matches "nothing"' in tessera("models", "list", "nothing", code=2).stderr


@pytest.fixture
def published(monkeypatch):
    """A registered non-commercial checkpoint of the tiny tokenizer, whose names are ours."""
    config = {k: v for k, v in tiny_tokenizer().config.items() if not k.startswith("_")}
    shared = {
        "system": "tiny",
        "task": "image-tokenizer",
        "title": "Tiny",
        "model": "tokenizers.image.flextok:FlexTok",
        "license_code": "MIT",
        "license_weights": "research only",
        "config": config,
        "files": ("model.safetensors",),
        "non_commercial": True,
    }
    models = {
        name: ModelInfo(name=name, hub_id=f"owner/{name}", **shared)
        for name in ("tiny-a", "tiny-b")
    }
    identity = SimpleNamespace(convert_state_dict=lambda state, config: dict(state))
    known = {**registry._models(), **models}
    monkeypatch.setattr(registry, "_models", lambda: known)
    # The fixture around this one clears the cache of the real function.
    registry._models.cache_clear = lambda: None
    monkeypatch.setattr(loading, "converter", lambda system: identity)
    state = {key: value.contiguous() for key, value in tiny_tokenizer().state_dict().items()}
    save_file(state, "model.safetensors")


def test_convert_makes_a_folder_that_loads(published):
    result = tessera("models", "convert", "tiny-a", "model.safetensors", "ours")
    assert lines(result) == ["ours"]
    assert "tiny-a: not for commercial use" in result.stderr
    assert files("ours") == ["config.json", WEIGHTS]
    picture()
    tessera("encode", "red.png", "--tokenizer", "ours")
    expected = ReconstructionPipeline(tiny_tokenizer())("red.png", [16]).tokens[0]
    assert read_tokens("red.tok").tokens.tolist() == expected.tolist()
    assert "exists already" in tessera("models", "convert", "tiny-b", ".", "ours", code=2).stderr
    tessera("models", "convert", "tiny-b", ".", "ours", "-f")  # A folder with the files.


def test_convert_refuses_what_does_not_fit(published):
    Path("photos").mkdir()
    picture("photos/mine.png")
    save_file({"weight": torch.zeros(3)}, "other.safetensors")
    Path("cut.safetensors").write_bytes(Path("model.safetensors").read_bytes()[:2000])
    before = files()
    for arguments, words in [
        (["tiny", "model.safetensors", "x"], "several checkpoints: give one of tiny-a, tiny-b"),
        (["titk", "model.safetensors", "x"], 'Unknown model "titk"'),
        (["sticker", "model.safetensors", "x"], "needs no conversion"),
        (["tiny-a", "none.safetensors", "x"], '"none.safetensors/model.safetensors" is missing'),
        (["tiny-a", "other.safetensors", "x"], "belong to another model"),
        (["tiny-a", "cut.safetensors", "x"], "is damaged"),
        (["tiny-a", "model.safetensors", "no/x"], 'folder "no" does not exist'),
        (["tiny-a", "model.safetensors", "photos", "-f"], '"photos" holds something else'),
    ]:
        assert words in tessera("models", "convert", *arguments, code=2).stderr, arguments
    assert files() == before
    assert sorted(p.name for p in Path(".").iterdir() if p.is_dir()) == ["photos"]


def test_a_non_commercial_tokenizer_says_so_when_it_loads(published, monkeypatch):
    from tessera.tokenizers import auto

    monkeypatch.setattr(auto, "find_files", lambda info, files: ["model.safetensors"])
    picture()
    result = tessera("encode", "red.png", "--tokenizer", "tiny-a")
    assert "Note: tiny-a: not for commercial use." in result.stderr
    result = tessera("decode", "red.tok", "-o", "new.png")  # By the name in the file.
    assert "Note: tiny-a: not for commercial use." in result.stderr


# train, evaluate, app, doctor


def test_train_runs_a_recipe(shipped):
    parts = [f"{part}={shipped / 'sticker' / part}" for part in ("tokenizer", "generator", "clip")]
    settings = [*parts, "dtype=fp32", "output=assembled", "pipeline.default_num_tokens=4"]
    assert lines(tessera("train", "sticker", *settings)) == ["assembled"]
    (path,) = lines(tessera("image", "red ring", "--model", "assembled", "-o", "a.png"))
    assert read_record(path)["settings"]["num_tokens"] == 4
    for arguments, words in [
        (["stickr"], 'No recipe "stickr"'),
        (["sticker", "x.y=1"], 'no setting "x.y"'),
        (["sticker", "steps"], '"steps" is not key=value'),
        (["sticker-vae", "--resume"], 'Nothing to resume in "runs/sticker-vae"'),
        (["sticker", "tokenizer=no/such/model"], 'Unknown tokenizer "no/such/model"'),
    ]:
        assert words in tessera("train", *arguments, code=2).stderr


def test_evaluate_prints_a_table_and_writes_json():
    tiny_pack(Path("pack"))
    counts = ["--names", 3, "--pictures", 2, "--seeds", 2, "--repeated", 1]
    result = tessera("evaluate", "sticker", "--data", "pack", *counts, "-o", "report.json")
    assert lines(result) == ["report.json"]
    assert "Rank of the right name" in result.stderr
    written = json.loads(Path("report.json").read_text(encoding="utf8"))
    assert {"reconstruction", "generation"} <= set(written)
    command = ["evaluate", "sticker", "--data", "pack", *counts]
    report = json.loads(tessera(*command, "--json").stdout)
    assert report["reconstruction"] == written["reconstruction"]
    assert "exists already" in tessera(*command, "-o", "report.json", code=2).stderr
    for arguments in (
        ["evaluate", "sticker", "--data", "none"],
        ["evaluate", "stickr", "--data", "pack"],
        ["evaluate", "sticker", "--data", "pack", "--names", 1],
        ["evaluate", "sticker", "--data", "pack", "-o", "no/report.json"],
    ):
        tessera(*arguments, code=2)


def test_app_hands_its_options_on(monkeypatch):
    calls = []
    main = ModuleType("tessera.app.main")
    main.launch = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "tessera.app.main", main)
    tessera("app")
    flags = ("--listen", "--open", "--no-metadata", "--add", "a", "--add", "b")
    tessera("app", "--port", 8000, "--auth", "me:secret", *flags)
    default = {
        "port": None,
        "listen": False,
        "auth": None,
        "open_browser": False,
        "share": False,
        "metadata": True,
        "outputs": Path("outputs"),
        "max_upload": "50mb",
        "model": "sticker",
        "add": (),
    }
    changes = {"port": 8000, "listen": True, "auth": "me:secret", "add": [Path("a"), Path("b")]}
    assert calls == [default, {**default, **changes, "open_browser": True, "metadata": False}]
    for options in (["--listen"], ["--share"], ["--auth", "me"], ["--auth", ":x"], ["--port", 0]):
        tessera("app", *options, code=2)
    assert len(calls) == 2


def test_doctor_makes_a_picture(monkeypatch, shipped):
    shown = tessera("doctor").stdout
    assert torch.__version__.partition("+")[0] in shown
    assert "ok: a picture by sticker made and read back" in shown
    report = json.loads(tessera("doctor", "--json").stdout)
    assert report["shipped models"] == "sticker"
    monkeypatch.setattr(registry, "SHIPPED", shipped / "none")
    registry._models.cache_clear()
    assert "ok: a plain picture made" in tessera("doctor").stdout

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "FAILED: OSError" in tessera("doctor", code=1).stdout
