"""The app over several models: choosing one, variations, edits, grids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gradio import EventData
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from tessera.app.main import build, serve
from tessera.app.picture_job import PictureJob, PictureRequest, prefixes
from tessera.app.studio import Studio
from tessera.app.tabs import compare, edit, picture
from tessera.app.xy_grid import Axis
from tessera.modalities.errors import InputError
from tessera.modalities.image import load_image, read_record
from tessera.modalities.metadata import decode_tokens
from tessera.tests.app_server import wait_for
from tessera.tests.tiny import tiny_class_pipeline, tiny_pipeline
from tessera.weights import registry

OWNER = "0" * 32


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The app over a text model and, beside it, three of classes."""
    folder = tmp_path_factory.mktemp("app")
    for name in ("sticker", "maskgit", "var", "flowar"):
        pipe = tiny_pipeline() if name == "sticker" else tiny_class_pipeline(name)
        pipe.save_pretrained(folder / "shipped" / name)
        row = {
            "title": name,
            "task": "text-to-image" if name == "sticker" else "class-to-image",
            "model": f"pipelines:{type(pipe).__name__}",
            "license_weights": "none",
            "non_commercial": name == "var",
        }
        (folder / "shipped" / name / "tessera.json").write_text(json.dumps(row))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "SHIPPED", folder / "shipped")
        registry._models.cache_clear()
        studio = Studio("sticker", folder / "outputs")
        studio.start()
        studio.wait()
        demo = build(studio)
        try:
            _, url, _ = serve(demo, studio, server_name="127.0.0.1", quiet=True)
            yield studio, url
        finally:
            demo.close()
            studio.close()
    registry._models.cache_clear()


@pytest.fixture
def studio(site):
    return site[0]


def finish(studio, job):
    studio.jobs.submit(job)
    return wait(studio, job)


def wait(studio, job):
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert job.state == "done", job.error
    return job


def test_models_that_are_there_are_offered(studio):
    assert studio.image_models() == ["sticker", "flowar", "maskgit", "var"]
    assert picture.model_label("var") == "var (not for commercial use)"
    card = studio.card_of("maskgit")
    assert (card.num_steps, card.takes_tokens, card.num_classes) == (4, False, 5)
    assert card.example == "blue ring" and studio.card_of("flowar").temperature is None
    with pytest.raises(InputError, match='"rar-b" is not on this computer'):
        studio.load("rar-b")


@pytest.mark.parametrize("model", ["maskgit", "var", "flowar"])
def test_a_chosen_model_draws_and_the_file_tells_which(studio, model):
    request = PictureRequest("blue ring", 7, 2, num_tokens=4, num_steps=3, model=model)
    job = finish(studio, PictureJob(studio, OWNER, request))
    view = job.view()
    assert view["unit"] == {"var": "scale"}.get(model, "step") and view["model"] == model
    record = read_record(job.items[1].source)
    assert (record["model"], record["settings"]["class_label"]) == (model, 1)
    assert ("num_steps" in record["settings"]) == (model != "var")
    assert job.items[0].lengths == (
        [1, 5, 14, 30] if model == "var" else [len(job.items[0].tokens)]
    )
    json.dumps(view)


def test_prefixes_are_those_that_show_something():
    assert prefixes(tiny_class_pipeline("var"), 30) == [1, 5, 14]
    assert prefixes(tiny_class_pipeline("maskgit"), 16) == []


def test_vary_and_finish_go_on_from_a_picture(studio):
    draft = finish(studio, PictureJob(studio, OWNER, PictureRequest("red ring", 7, num_tokens=6)))
    assert draft.view()["variable"] and draft.view()["finishable"]
    tokens = tuple(draft.items[0].tokens)
    whole = PictureRequest("red ring", 7, num_tokens=16, given=tokens, keep=6)
    done = finish(studio, PictureJob(studio, OWNER, whole))
    plain = finish(studio, PictureJob(studio, OWNER, PictureRequest("red ring", 7, num_tokens=16)))
    assert done.items[0].tokens == plain.items[0].tokens and not done.view()["finishable"]
    others = PictureRequest("red ring", 9, 2, num_tokens=16, given=tokens, keep=3)
    job = finish(studio, PictureJob(studio, OWNER, others))
    assert all(item.tokens[:3] == list(tokens[:3]) for item in job.items)
    assert read_record(job.items[0].source)["settings"]["keep"] == 3


def test_settings_of_a_picture_bring_their_model_along(studio):
    request = PictureRequest("blue ring", 7, 4, guidance_scale=2.0, num_steps=3, model="maskgit")
    job = finish(studio, PictureJob(studio, OWNER, request))
    named = {fn.name: fn.fn for fn in build(studio).fns.values()}
    event = EventData(None, {"id": job.id, "index": 1, "what": "all"})
    prompt, _, count, seed, tokens, guidance, _, steps, _, model = named["use_settings"](
        OWNER, event
    )
    assert (prompt.value, count, seed, model) == ("blue ring", 4, "8", "maskgit")
    assert (guidance.value, steps.value) == (2.0, 3)
    assert steps.visible and not tokens.visible
    steps = named["choose_model"]("flowar")[7]
    assert steps.value == studio.card_of("flowar").num_steps


def test_painted_parts_are_drawn_anew(studio):
    photo = Image.effect_noise((16, 16), 60).convert("RGB")
    layer = Image.new("RGBA", (16, 16))
    layer.paste((225, 29, 72, 255), (0, 0, 8, 8))
    value = {"background": photo, "layers": [layer]}
    values = ("blue ring", edit.INSIDE, "maskgit", "5")
    job = wait(studio, edit.enqueue(studio, studio.card(), OWNER, value, *values)[1])
    made = load_image(job.items[0].source)
    lower = (0, 8, 16, 16)
    assert made.crop(lower).tobytes() == photo.crop(lower).tobytes()
    assert made.tobytes() != photo.tobytes() and len(job.items) == edit.COUNT
    values = ("blue ring", "right", "maskgit", "5")
    job = wait(studio, edit.enqueue(studio, studio.card(), OWNER, value, *values)[1])
    assert load_image(job.items[0].source).size == (24, 16)
    for wrong, words in (
        (None, "Drop a picture first"),
        ({"background": photo, "layers": []}, "Paint over what shall be drawn anew"),
    ):
        with pytest.raises(InputError, match=words):
            edit.enqueue(studio, studio.card(), OWNER, wrong, "1", edit.INSIDE, "maskgit", "5")


def test_a_grid_fills_cell_by_cell_and_can_be_stopped(studio):
    axes = ("guidance", "1, 3", "steps", "1, 2, 4")
    _, job = compare.enqueue(studio, studio.card(), OWNER, "blue ring", "maskgit", "3", *axes)
    wait(studio, job)
    view = job.view()
    assert (view["done"], view["cells"], view["seed"]) == (6, 6, 3)
    record = read_record(job.source)
    assert record["settings"]["x"] == "guidance=1,3" and record["settings"]["y"] == "steps=1,2,4"
    assert load_image(job.source).width > 128

    stopped = compare.GridJob(studio, OWNER, "red ring", 3, Axis.parse("seed=1,2,3,4"), None)
    touch_count = []

    def stop_soon():
        touch_count.append(1)
        if stopped.done == 2:
            stopped.cancel.set()

    stopped.touch = stop_soon
    stopped.run()
    assert stopped.done == 2 and read_record(stopped.source)["settings"]["x"] == "seed=1,2,3,4"
    with pytest.raises(InputError, match="has no values"):
        compare.enqueue(studio, studio.card(), OWNER, "a", "sticker", "", "tokens", "", "none", "")


def test_a_program_chooses_a_model_by_name(site):
    _, url = site
    client = Client(url, verbose=False, download_files=False)
    options = {"count": 1, "seed": 5, "num_steps": 2, "model": "maskgit", "api_name": "/image"}
    result = client.predict("blue ring", **options)
    assert result["state"] == "done" and result["step"] == result["total"] == 2
    path = Path(result["images"][0]["path"])
    assert decode_tokens(read_record(path)["tokens"]).tolist() == result["tokens"][0]
    for wrong, words in (({"model": "rar-b"}, "not on this computer"), ({}, 'no class "purple"')):
        with pytest.raises(AppError, match=words):
            client.predict("purple", **{**options, **wrong})
