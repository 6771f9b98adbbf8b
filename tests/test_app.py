from __future__ import annotations

import asyncio
import errno
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import gradio as gr
import httpx
import pytest
import torch
import yaml
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from tessera.app import space
from tessera.app.faults import LOG_NAME, explain, guarded, log_to
from tessera.app.jobs import Job, JobQueue
from tessera.app.main import further_models, launch
from tessera.app.outputs import Outputs
from tessera.app.picture_job import PREVIEW_BUDGET, PictureJob, PictureRequest, prefix_lengths
from tessera.app.reconstruct_job import ReconstructJob
from tessera.app.studio import EXAMPLES, Speed, Studio
from tessera.app.tabs import library, models, picture, reconstruct, widgets
from tessera.modalities.errors import InputError
from tessera.modalities.image import load_image, read_record, save_image
from tessera.modalities.metadata import decode_tokens, make_record
from tessera.pipelines.seeds import seed_generators
from tessera.tests.app_server import Server, held, running_app, tiny_model, tiny_studio, wait_for

OWNER = "0" * 32


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with tiny_studio(tmp_path_factory.mktemp("app")) as server:
        yield server


@pytest.fixture
def studio(server):
    yield server.studio
    server.hold_at = None
    wait_for(lambda: not server.studio.jobs.active(OWNER))


def run_job(studio, **request):
    job = PictureJob(studio, OWNER, PictureRequest(**{"prompt": "red ring", "seed": 7, **request}))
    studio.jobs.submit(job)
    wait_for(lambda: not studio.jobs.active(OWNER))
    return job


# --- jobs ---


class Sleeper(Job):
    """Runs until it is told to end."""

    kind = "sleep"

    def __init__(self, owner=OWNER, error=None):
        super().__init__(owner)
        self.error_to_raise, self.release, self.disposed = error, threading.Event(), False

    def run(self):
        while not (self.release.is_set() or self.cancel.is_set()):
            time.sleep(0.005)
        if self.error_to_raise:
            raise self.error_to_raise

    def view(self):
        return {"id": self.id}

    def dispose(self):
        self.disposed = True


@pytest.fixture
def queue():
    queue = JobQueue(max_waiting=4, max_per_owner=3)
    yield queue
    queue.close()


def test_jobs_run_one_after_the_other_and_are_told_apart_by_owner(queue):
    first, second, other = Sleeper(), Sleeper(), Sleeper("1" * 32)
    queue.submit(first)
    wait_for(lambda: first.state == "running")
    queue.submit(second)
    queue.submit(other)
    assert (second.state, queue.ahead(other)) == ("queued", [first, second])
    assert queue.of(OWNER) == [first, second] and queue.find("1" * 32, first.id) is None
    first.release.set()
    wait_for(lambda: second.state == "running")
    assert first.state == "done" and other.state == "queued"
    second.release.set(), other.release.set()
    wait_for(lambda: other.state == "done")


def test_stop_ends_a_running_job_and_one_that_waits(queue):
    running, waiting = Sleeper(), Sleeper()
    queue.submit(running, waiting)
    wait_for(lambda: running.state == "running")
    queue.stop(waiting)
    assert waiting.state == "stopped" and running.state == "running"
    queue.stop(running)
    wait_for(lambda: running.state == "stopped")
    assert not queue.active(OWNER)


def test_a_failing_job_leaves_the_worker_alive(queue):
    bad, good = Sleeper(error=InputError("That was wrong.")), Sleeper()
    queue.submit(bad, good)
    bad.release.set(), good.release.set()
    wait_for(lambda: good.state == "done")
    assert (bad.state, bad.error) == ("failed", "That was wrong.")


def test_queue_limits_refuse_all_or_nothing(queue):
    running = Sleeper("2" * 32)
    queue.submit(running)
    wait_for(lambda: running.state == "running")
    queue.submit(Sleeper(), Sleeper())
    with pytest.raises(InputError, match="the limit is 3"):
        queue.submit(Sleeper(), Sleeper())
    assert len(queue.of(OWNER)) == 2
    queue.submit(Sleeper("1" * 32), Sleeper("1" * 32))
    with pytest.raises(InputError, match="4 jobs are waiting already"):
        queue.submit(Sleeper())


def test_finished_jobs_expire(queue):
    job = Sleeper()
    job.release.set()
    queue.submit(job)
    wait_for(lambda: job.state == "done")
    assert queue.of(OWNER) == [job]
    queue.keep_seconds = 0
    assert queue.of(OWNER) == [] and job.disposed


# --- pictures ---


def test_prefix_lengths_stop_below_the_count():
    assert prefix_lengths(16) == [1, 2, 3, 4, 6, 8, 12]
    assert prefix_lengths(5) == [1, 2, 3, 4]
    assert prefix_lengths(1) == []


def test_pictures_are_those_of_the_pipeline_and_files_tell_how(studio):
    job = run_job(studio, count=2, style="3d", num_tokens=6, guidance_scale=2.0)
    assert job.state == "done", job.error
    expected = studio.pipeline(
        "red ring",
        style="3d",
        num_tokens=6,
        guidance_scale=2.0,
        num_images_per_prompt=2,
        generator=seed_generators(7, 2),
    )
    for k, item in enumerate(job.items):
        path = Path(item.source)
        assert path.name.endswith(f"_red-ring_{7 + k}.png")
        assert path.parent.parent == studio.folder
        record = read_record(path)
        assert (record["seed"], record["prompt"], record["index"]) == (7 + k, "red ring", 0)
        assert record["settings"]["style"] == "3d" and record["settings"]["num_tokens"] == 6
        assert record["settings"]["guidance_scale"] == 2.0
        assert decode_tokens(record["tokens"]).tolist() == expected.tokens[k].tolist()
        assert item.tokens == expected.tokens[k].tolist()
        difference = torch.tensor(list(load_image(path).tobytes()), dtype=torch.int32)
        difference -= torch.tensor(list(expected.images[k].tobytes()), dtype=torch.int32)
        assert difference.abs().max() <= 2


def test_every_prefix_of_the_sheet_is_the_decoded_prefix(studio):
    (item,) = run_job(studio, num_tokens=8).items
    assert item.lengths == [1, 2, 3, 4, 6, 8]
    size = studio.pipeline.image_size
    with Image.open(item.sheet) as sheet:
        assert sheet.size == (size, size * 6)
        third = sheet.convert("RGB").crop((0, 2 * size, size, 3 * size))
        last = sheet.convert("RGB").crop((0, 5 * size, size, 6 * size))
    steps = studio.pipeline.config.preview_steps
    tokens = torch.tensor([item.tokens[:3]])
    assert third.tobytes() == studio.pipeline.decode_tokens(tokens, [7], steps)[0].tobytes()
    assert last.tobytes() == load_image(item.source).tobytes()


def test_stop_keeps_the_partial_picture(studio, server):
    server.hold_at = 3
    job = PictureJob(studio, OWNER, PictureRequest("red ring", 7, count=2))
    studio.jobs.submit(job)
    wait_for(lambda: job.step == 3)
    studio.jobs.stop(job)
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert (job.state, job.step, job.total) == ("stopped", 4, 8)  # The one that was being drawn.
    record = read_record(job.items[1].source)
    assert record["settings"]["num_tokens"] == 4 and len(job.items[1].tokens) == 4
    server.hold_at = None
    assert run_job(studio).state == "done"


def test_a_full_disk_fails_the_job_and_keeps_the_picture_on_the_page(studio, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(studio.folder / "x.png"))

    monkeypatch.setattr(Outputs, "save", full)
    job = run_job(studio, count=2)
    assert job.state == "failed"
    assert job.error == f'The disk is full in "{studio.folder}": free some space and try again.'
    assert all(Path(item.source).is_file() and not item.name for item in job.items)


def test_previews_stay_within_their_share_of_the_run(studio):
    job = PictureJob(studio, OWNER, PictureRequest("red ring", 7, num_tokens=64))
    before = studio.speed
    try:
        studio.speed = Speed(token=0.05, decode=0.8, preview=0.15)
        spent, steps = 0.0, []
        for job.step in range(1, 65):
            elapsed = 0.05 * job.step + spent
            if job._preview_fits(spent, elapsed):
                spent += studio.speed.preview
                steps.append(job.step)
        assert steps and 64 not in steps
        assert spent <= PREVIEW_BUDGET * (64 * 0.05 + 0.8)
        studio.speed = Speed(token=0.001, decode=0.1, preview=0.5)
        job.step = 63
        assert not job._preview_fits(0.0, 0.06)
    finally:
        studio.speed = before


def test_without_metadata_files_are_clean(studio):
    outputs = Outputs(studio.folder, metadata=False)
    record = make_record("P", "tiny", "red ring", 7)
    path = outputs.save(Image.new("RGB", (8, 8)), record)
    assert read_record(path) is None


# --- handlers ---


@pytest.mark.parametrize("text", ["-5", "4294967296", "1.5", "abc", "9" * 5000])
def test_bad_seeds_are_refused(text):
    with pytest.raises(InputError, match="Seed must be a whole number from 0 to 4294967295, got"):
        picture.seed_number(text)


def test_seeds():
    assert picture.seed_number(" 42 ") == 42
    assert 0 <= picture.seed_number("") <= 2**32 - 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"style": "oil"}, 'Unknown style "oil": choose from 3d, flat'),
        ({"count": 0}, "1 to 8 pictures at once, got 0"),
        ({"count": 9}, "got 9"),
        ({"num_tokens": 17}, "1 to 16 tokens, got 17. Use 16"),
        ({"guidance_scale": -1.0}, "Guidance must lie in 0 to 100, got -1.0"),
        ({"temperature": float("nan")}, "Temperature must lie in 0 to 100, got nan"),
        ({"prompt": "x" * 2001}, "2,001 characters"),
        ({"prompt": "\u200b"}, "The prompt is empty"),
    ],
)
def test_requests_out_of_range_are_refused(studio, values, message):
    with pytest.raises(InputError, match=message):
        picture.requests(studio.card(), **{"prompt": "red ring", **values})


def enqueue(studio, prompt, seed="7", owner=OWNER):
    return picture.enqueue(studio, studio.card(), owner, prompt, "any", 1, seed, 4, 2.0, 1.0)


def test_an_empty_prompt_runs_the_example(studio):
    owner, text, (job,) = enqueue(studio, "  ")
    assert text == EXAMPLES[0] == job.request.prompt and owner == OWNER


def test_braces_make_a_job_each_and_an_owner_is_made(studio):
    owner, _, jobs = enqueue(studio, "{red,blue} ring", owner="../../etc")
    assert [job.request.prompt for job in jobs] == ["red ring", "blue ring"]
    assert len(owner) == 32 and owner != OWNER
    wait_for(lambda: not studio.jobs.active(owner))


def test_a_long_prompt_is_cut_with_a_warning(studio):
    _, _, (job,) = enqueue(studio, "red ring " * 40)
    assert job.warning.startswith("Prompt has 80 words; this model reads the first ")
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert job.state == "done"
    assert studio.prompt_warning("red ring") == ""


def test_a_watcher_shows_all_and_a_newer_one_replaces_it(studio, server):
    watch = widgets.watcher(studio, "picture")
    request = gr.Request(session_hash="one")
    server.hold_at = 2
    _, _, (job,) = enqueue(studio, "red ring")
    wait_for(lambda: job.step == 2)

    async def scenario():
        old, new = watch(OWNER, request), watch(OWNER, request)
        page = await anext(old)
        assert page["jobs"][0]["id"] == job.id and page["jobs"][0]["step"] == 2
        await anext(new)
        with pytest.raises(StopAsyncIteration):
            await anext(old)
        server.hold_at = None
        return [page async for page in new]

    pages = asyncio.run(scenario())
    last = pages[-1]["jobs"][0]
    assert last["state"] == "done" and last["items"][0]["sheet"]
    assert [page["version"] for page in pages] == sorted(page["version"] for page in pages)
    json.dumps(pages)


def test_settings_come_back_from_a_file_and_are_clamped(studio, tmp_path):
    settings = {"style": "oil", "num_tokens": 999, "guidance_scale": 2.5, "temperature": 0.5}
    record = make_record("P", "tiny", "<b>ring</b>", 5, settings=settings)
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", record)
    found = widgets.read_settings(str(tmp_path / "a.png"))
    values = widgets.record_values(studio.card(), found, "all")
    assert values == ["<b>ring</b>", "any", 1, "5", 16, 2.5, 0.5]
    assert widgets.record_values(studio.card(), found, "prompt")[0] == "<b>ring</b>"
    assert widgets.record_values(studio.card(), found, "seed")[3] == "5"
    assert "<b>" not in widgets.record_table(found)


def test_files_without_settings_are_named_in_one_sentence(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match="no Tessera settings"):
        widgets.read_settings(str(tmp_path / "plain.png"))
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match=r'Could not open "text\.png"'):
        widgets.read_settings(str(tmp_path / "text.png"))
    assert widgets.read_settings(None) is None


def test_reconstruction_of_a_dropped_picture(studio, tmp_path):
    Image.new("RGB", (50, 20), "red").save(tmp_path / "wide.png")
    _, job = reconstruct.enqueue(studio, OWNER, str(tmp_path / "wide.png"), ["tiny"])
    wait_for(lambda: not studio.jobs.active(OWNER))
    (row,) = job.view()["rows"]
    assert row["state"] == "done", row["error"]
    assert row["lengths"] == [1, 2, 4, 8, 16] and len(row["tokens"]) == 16
    assert row["bits"][-1] == round(16 * 9 / 32**2, 4)
    with Image.open(row["sheet"]) as sheet:
        assert sheet.size == (32, 5 * 32)


def test_bad_pictures_and_tokenizers_are_refused(studio, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    with pytest.raises(InputError, match=r'Could not open "text\.png"'):
        reconstruct.enqueue(studio, OWNER, str(tmp_path / "text.png"), ["tiny"])
    with pytest.raises(InputError, match="Choose 1 to 8 tokenizers, got 0"):
        reconstruct.enqueue(studio, OWNER, str(tmp_path / "ok.png"), [])
    with pytest.raises(InputError, match="Drop a picture first"):
        reconstruct.enqueue(studio, OWNER, None, ["tiny"])
    job = ReconstructJob(studio, OWNER, Image.new("RGB", (8, 8)), "x", ["flextok-d12-d12", "tiny"])
    studio.jobs.submit(job)
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert [row.state for row in job.rows] == ["failed", "done"]
    assert "is not on this computer" in job.rows[0].error


def test_models_table_names_sizes_and_licences():
    table = models.models_table(["flextok-d12-d12"])
    for text in ("flextok-d12-d12", "1.4 GB", "not for commercial use", "needs download"):
        assert text in table


# --- the outputs folder ---


@pytest.fixture
def outputs(tmp_path):
    outputs = Outputs(tmp_path / "outputs")
    for k, prompt in enumerate(("red ring", "blue square", "red square")):
        record = make_record("P", "tiny", prompt, k, settings={"style": "flat"})
        outputs.save(Image.new("RGB", (8, 8)), record)
    return outputs


def test_equal_names_do_not_overwrite(outputs):
    record = make_record("P", "tiny", "red ring", 0)
    paths = [outputs.save(Image.new("RGB", (8, 8)), record) for _ in range(3)]
    assert len({*paths, *map(outputs.path, outputs.names())}) == 6


def test_library_lists_newest_first_and_filters(outputs):
    old = outputs.folder / "2020-01-31"
    old.mkdir()
    Image.new("RGB", (8, 8)).save(old / "120000_old_1.png")
    (old / "notes.txt").write_text("x")
    (old / "broken.png").write_text("x")
    names = outputs.names()
    assert len(names) == 5 and names[-1].startswith("2020-01-31/1")
    assert names[:3] == sorted(names[:3], reverse=True)
    assert len(outputs.names("RED")) == 2 and len(outputs.names("red flat square")) == 1
    assert outputs.names("purple") == []


def test_delete_moves_to_the_trash_and_undo_brings_back(outputs):
    name = outputs.names()[0]
    moved = outputs.delete(name)
    assert moved == outputs.folder / "trash" / name and name not in outputs.names()
    assert outputs.restore(moved) == name and name in outputs.names()
    with pytest.raises(InputError, match="no longer in the trash"):
        outputs.restore(moved)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "2020-01-31/../../secret.png",
        "trash/x.png",
        "/etc/passwd",
        "",
        "2020-01-31",
    ],
)
def test_names_from_a_page_stay_in_the_folder(outputs, name):
    Image.new("RGB", (8, 8)).save(outputs.folder.parent / "secret.png")
    (outputs.folder / "2020-01-31").mkdir(exist_ok=True)
    with pytest.raises(InputError, match="There is no file"):
        outputs.path(name)


def test_links_are_not_followed(outputs):
    day = outputs.folder / "2020-01-31"
    day.mkdir()
    Image.new("RGB", (8, 8)).save(outputs.folder.parent / "secret.png")
    (day / "link.png").symlink_to(outputs.folder.parent / "secret.png")
    assert not any("link" in name for name in outputs.names())
    with pytest.raises(InputError):
        outputs.path("2020-01-31/link.png")


def test_shelf_shows_a_page_and_says_how_many_are_left(studio, outputs, monkeypatch):
    monkeypatch.setattr(library, "PAGE", 2)
    monkeypatch.setattr(studio, "outputs", lambda owner: outputs)
    page = library.shelf(studio, OWNER, "", 1)
    assert (len(page["files"]), page["more"]) == (2, 1)
    assert library.shelf(studio, OWNER, "", 2)["more"] == 0
    assert "purple" in library.shelf(studio, OWNER, "purple", 1)["note"]


# --- errors ---


def test_the_unexpected_goes_to_the_log_under_an_id(tmp_path):
    log_to(tmp_path)
    try:
        raise RuntimeError("secret detail")
    except RuntimeError as error:
        text = explain(error)
    number = text.split("id ")[1][:4]
    assert "secret" not in text
    logged = (tmp_path / LOG_NAME).read_text()
    assert f"id {number}" in logged and "secret detail" in logged and "Traceback" in logged


def test_guarded_handlers_raise_toasts():
    def bad(seed: int) -> int:
        raise InputError(f"Wrong: {seed}.")

    async def bad_stream(seed: int):
        yield seed
        raise InputError("Wrong later.")

    with pytest.raises(gr.Error) as caught:
        guarded(bad)(5)
    assert caught.value.message == "Wrong: 5." and not caught.value.print_exception

    async def scenario():
        stream = guarded(bad_stream)(1)
        assert await anext(stream) == 1
        with pytest.raises(gr.Error, match=r"Wrong later\."):
            await anext(stream)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"listen": True}, "--listen lets others use this app and see its pictures: add --auth"),
        ({"share": True}, "--share lets others"),
        ({"auth": "me"}, "--auth must be user:password"),
        ({"max_upload": "lots"}, '"lots" is not a size'),
        ({"model": "no-such-model"}, 'Unknown model "no-such-model"'),
        ({"add": [Path("sticker")]}, '"sticker" holds no model of sound or video'),
        ({"add": [Path("no-such-folder")]}, '"no-such-folder" holds no model of sound or video'),
    ],
)
def test_launch_refuses_before_it_starts(options, message):
    with pytest.raises(InputError, match=message):
        launch(**options)


def test_further_models_go_where_they_belong(server):
    folder = server.studio.folder.parent
    names = ("tiny-sound", "tiny-blocks", "tiny-between")
    sounds, videos = further_models([folder / name for name in names])
    assert sounds.names == {"voice": "voice", "sound": str(folder / "tiny-sound")}
    assert videos.clip_names()[0] == "tiny-blocks" and videos.condition("tiny-blocks") == "text"
    assert videos.between_names()[0] == "tiny-between"


def test_a_folder_that_is_no_model_is_named(tmp_path):
    studio = Studio(str(tmp_path), tmp_path / "outputs")
    try:
        with pytest.raises(InputError, match="holds no model that makes pictures"):
            studio.card()
        studio.start()
        with pytest.raises(InputError, match="could not be loaded"):
            studio.wait()
        assert "could not be loaded" in studio.headline()
    finally:
        studio.close()


# --- over HTTP ---


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with running_app(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture(scope="module")
def client(site, tmp_path_factory):
    return Client(site.url, verbose=False, download_files=tmp_path_factory.mktemp("client"))


def test_client_makes_pictures_and_sees_progress(client):
    job = client.submit("red ring", style="flat", count=2, seed=11, num_tokens=5, api_name="/image")
    last = job.result(timeout=120)
    assert (last["state"], last["step"], last["seeds"]) == ("done", 5, [11, 12])
    states = [output["state"] for output in job.outputs()]
    assert states[-1] == "done" and set(states) <= {"queued", "running", "done"}
    record = read_record(last["images"][1])
    assert (record["seed"], record["settings"]["style"]) == (12, "flat")


def test_client_cancel_stops_the_work(client, site):
    site.hold_at = 2
    before = set(site.pictures)
    job = client.submit("red ring", api_name="/image")
    wait_for(lambda: any(each.step == 2 for each in site.running()))
    (running,) = site.running()
    assert job.cancel()
    wait_for(lambda: running.state == "stopped")
    site.hold_at = None
    assert len(set(site.pictures) - before) == 1


def test_client_gets_one_sentence(client):
    with pytest.raises(AppError, match='Unknown style "oil"') as caught:
        client.predict("red ring", style="oil", api_name="/image")
    assert "Traceback" not in str(caught.value)


def test_only_the_documented_endpoints_are_public(client):
    info = client.view_api(print_info=False, return_format="dict")
    videos = {"/video", "/story", "/interpolate"}
    assert set(info["named_endpoints"]) == {"/image", "/models", "/sound", "/speech", *videos}
    assert not info["unnamed_endpoints"]
    assert "flextok-d12-d12" in client.predict("flextok*", api_name="/models")


def test_nothing_outside_its_folders_is_readable(site):
    outputs = site.studio.outputs(OWNER)
    picture = outputs.save(Image.new("RGB", (8, 8)), make_record("P", "tiny", "red ring", 7))
    (site.studio.log_folder / LOG_NAME).write_text("private")
    get = f"{site.url}gradio_api/file="
    assert httpx.get(get + str(picture), timeout=60).status_code == 200
    for path in (
        site.studio.log_folder / LOG_NAME,
        Path(__file__),
        Path("/etc/passwd"),
        site.studio.folder / "../tiny/model_index.json",
        "pyproject.toml",
    ):
        assert httpx.get(get + str(path), timeout=60).status_code == 403, path


def test_a_large_upload_is_refused(site):
    answer = httpx.post(
        f"{site.url}gradio_api/upload", files={"files": ("a.png", bytes(1_100_000))}, timeout=60
    )
    assert answer.status_code == 413


# --- as a Space ---


def test_on_a_shared_server_everyone_has_their_own_folder(tmp_path):
    studio = Studio(str(tiny_model(tmp_path / "tiny")), shared=True)
    try:
        studio.start()
        held(Server(studio))
        job = run_job(studio)
        mine, other = studio.outputs(OWNER), studio.outputs("1" * 32)
        assert mine.names() == [job.items[0].name] and other.names() == []
        assert mine.folder.is_relative_to(studio.scratch)
        studio.jobs.keep_seconds = 0
        assert studio.jobs.of(OWNER) == [] and mine.names() == []
    finally:
        studio.close()
    assert not studio.scratch.exists()


def test_space_front_matter_and_requirements_follow_the_pins():
    root = Path(space.ROOT)
    readme = (root / "app" / "README_space.md").read_text(encoding="utf8")
    front = yaml.safe_load(readme.split("---")[1])
    requirements = (root / "requirements.txt").read_text(encoding="utf8")
    assert f"gradio=={front['sdk_version']}\n" in requirements
    assert (front["sdk"], front["app_file"]) == ("gradio", "app/main.py")
    lines = space.space_requirements(requirements).splitlines()
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert any(line.startswith("torch==") for line in lines)
    assert not any(line.startswith(("gradio", "triton")) for line in lines)


def test_space_folder_starts_from_a_plain_copy(tmp_path):
    folder = tmp_path / "space"
    space.assemble(folder)
    with pytest.raises(InputError, match="is there already"):
        space.assemble(folder)
    assert not list(folder.rglob("__pycache__"))
    program = (
        "import importlib.util as u, runpy, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'tessera' else find(name, *a)\n"
        f"sys.path.insert(0, {str(folder / 'app')!r})\n"
        f"runpy.run_path({str(folder / 'app' / 'main.py')!r}, run_name='space')\n"
        "print(sys.modules['tessera'].__file__)\n"
        "print(sys.modules['tessera.app.studio'].__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(folder / "__init__.py"),
        str(folder / "app" / "studio.py"),
    ]


def test_shipped_files_of_the_app_shadow_no_module():
    names = {path.stem for path in (Path(space.ROOT) / "app").iterdir() if path.suffix != ".md"}
    assert not names & set(sys.stdlib_module_names)
    code = "import sys, importlib.util as u; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(names - {"__pycache__"})],
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stdout
