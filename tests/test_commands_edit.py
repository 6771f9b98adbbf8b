"""Any model on the command line: classes, edits, grids, and that each picture can be made again."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tessera.app import commands_image
from tessera.app.records import encode_cells, recorded_edit
from tessera.modalities.image import load_image, read_record
from tessera.modalities.metadata import decode_tokens
from tessera.tests.test_commands import files, lines, tessera
from tessera.tests.tiny import tiny_class_pipeline, tiny_maskgen_pipeline, tiny_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("maskgit", "flowar", "var", "rar"):
        tiny_class_pipeline(family).save_pretrained(folder / family)
    tiny_maskgen_pipeline("kl").save_pretrained(folder / "maskgen")
    tiny_pipeline().save_pretrained(folder / "sticker")
    return folder


@pytest.fixture(autouse=True)
def workplace(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((16, 16), 60).convert("RGB").save("photo.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 8))
    mask.save("mask.png")


def rerun(path, model):
    shown = tessera("info", path, "--rerun", "--model", model)
    assert lines(shown)[-1] == "identical", shown.output


def test_classes_by_name_and_number(models):
    model = models / "maskgit"
    options = ("--model", model, "--seed", 7, "-n", 2, "-o", "out/", "--steps", 3)
    made = lines(tessera("image", "{blue ring,3}", *options))
    assert made == [f"out/{name}_{s}.png" for name in ("blue-ring", "3") for s in (7, 8)]
    record = read_record(made[2])
    assert (record["pipeline"], record["prompt"]) == ("ClassToImagePipeline", "green triangle")
    assert record["settings"]["class_label"] == 3 and record["settings"]["num_steps"] == 3
    rerun(made[1], model)


@pytest.mark.parametrize("family", ["flowar", "var", "maskgen"])
def test_pictures_of_each_kind_come_out_the_same_again(models, family):
    model = models / family
    prompt = "blue ring" if family == "maskgen" else 1
    made = lines(tessera("image", prompt, "--model", model, "--seed", 3, "-n", 2, "-o", "out/"))
    rerun(made[1], model)


@pytest.mark.parametrize("family", ["maskgit", "var", "flowar"])
def test_in_painting_and_its_rerun(models, family):
    model = models / family
    made = lines(
        tessera("edit", "inpaint", "photo.png", "2", "--mask", "mask.png", "--model", model,
                "--seed", 5, "-o", "out/")
    )  # fmt: skip
    settings = read_record(made[0])["settings"]
    assert settings["edit"] == "inpaint" and len(settings["kept"]) == 3
    rerun(made[0], model)


def test_out_painting_and_its_rerun(models):
    model = models / "maskgit"
    options = ("--side", "left", "--pixels", 8, "--model", model, "--seed", 5)
    tessera("edit", "outpaint", "photo.png", "2", *options, "-o", "wide.png")
    wide = load_image("wide.png")
    assert wide.size == (24, 16)
    assert np.array_equal(np.asarray(wide)[:, 8:], np.asarray(load_image("photo.png")))
    rerun("wide.png", model)


def test_variations_and_their_rerun(models):
    model = models / "sticker"
    tessera("image", "red ring", "--model", model, "--style", "3d", "--seed", 1, "-o", "a.png")
    options = ("--model", model, "--keep", 3, "--seed", 9)
    made = lines(tessera("edit", "vary", "a.png", *options, "-n", 2, "-o", "out/"))
    first, second = (read_record(path) for path in ("a.png", made[1]))
    tokens, others = (decode_tokens(record["tokens"]).tolist() for record in (first, second))
    assert tokens[:3] == others[:3] and tokens != others
    assert second["settings"]["style"] == "3d" and second["settings"]["keep"] == 3
    rerun(made[1], model)


@pytest.mark.parametrize(
    ("family", "ends"), [("maskgit", ("0", "blue ring")), ("sticker", ("red ring", "blue circle"))]
)
def test_blends_and_their_rerun(models, family, ends):
    model = models / family
    made = lines(
        tessera("edit", "blend", *ends, "-n", 3, "--model", model, "--seed", 5, "-o", "o/")
    )
    assert len(made) == 3 and all(read_record(path)["seed"] == 5 for path in made)
    rerun(made[1], model)


def test_grids_are_labelled_and_tell_how_they_were_made(models):
    options = (
        "--x",
        "guidance=1,3",
        "--y",
        "steps=1,2,4",
        "--model",
        models / "maskgit",
        "--seed",
        1,
    )
    tessera("grid", "blue ring", *options, "-o", "g.png")
    record = read_record("g.png")
    assert (record["pipeline"], record["prompt"], record["seed"]) == ("Grid", "blue ring", 1)
    assert record["settings"]["x"] == "guidance=1,3" and record["settings"]["y"] == "steps=1,2,4"
    picture = load_image("g.png")
    assert picture.width > 2 * 64 and picture.height > 3 * 64
    assert np.asarray(picture)[:20].min() < 100  # There is text above the columns.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("image", "purple", "--model", "maskgit"), 'no class "purple"'),
        (("image", "1", "--model", "maskgit", "--tokens", 3), "takes no num_tokens"),
        (("image", "1", "--model", "var", "--steps", 3), "takes no num_inference_steps"),
        (("image", "1", "--model", "maskgit", "--style", "3d"), "knows no styles"),
        (("image", "1", "--model", "rar", "--top-p", 1.5), "top_p must lie"),
        (("edit", "inpaint", "photo.png", "1", "--mask", "mask.png", "--model", "sticker"), "have no place"),
        (("edit", "inpaint", "photo.png", "1", "--mask", "none.png", "--model", "var"), "none.png"),
        (("edit", "outpaint", "photo.png", "1", "--side", "up", "--model", "var"), 'got "up"'),
        (("edit", "vary", "photo.png", "--model", "sticker"), "does not hold the tokens"),
        (("edit", "blend", "0", "9", "--model", "maskgit"), "0 to 4, got 9"),
        (("grid", "1", "--x", "size=1", "--model", "maskgit"), 'got "size"'),
        (("grid", "1", "--x", "steps=a", "--model", "maskgit"), "are not values of steps"),
        (("grid", "1", "--x", "tokens=1", "--model", "maskgit"), "takes no num_tokens"),
        (("grid", "1", "--x", "steps=1", "--y", "steps=2", "--model", "maskgit"), "Both axes"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_sentence(models, arguments, words):
    at = arguments.index("--model") + 1
    arguments = (*arguments[:at], models / arguments[at], *arguments[at + 1 :])
    assert words in tessera(*arguments, code=2).stderr
    assert files() == ["mask.png", "photo.png"]


def test_cells_of_a_grid_survive_the_record(models):
    pipe = tiny_class_pipeline("var")
    edit = pipe.inpainting(*(load_image(f) for f in ("photo.png", "mask.png")))
    settings = {"edit": "inpaint", "kept": encode_cells(edit.cells)}
    Image.new("RGB", (8, 8)).save("small.png")
    again = recorded_edit(pipe, settings, edit.tokens[0], "small.png")
    assert again.token_mask.equal(edit.token_mask)
    with pytest.raises(commands_image.InputError, match="does not say what was kept"):
        recorded_edit(pipe, {"edit": "inpaint"}, edit.tokens[0], "small.png")
