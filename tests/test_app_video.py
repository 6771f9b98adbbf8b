"""The Video tab through its jobs and through gradio_client, over tiny models."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from tessera.app.commands_video import rerun
from tessera.app.tabs import library
from tessera.app.tabs import video as tab
from tessera.app.video_models import VideoModels
from tessera.modalities.errors import InputError
from tessera.modalities.image import load_image
from tessera.modalities.records import read_record
from tessera.modalities.video import VideoReader, load_video, save_video
from tessera.tests.app_server import tiny_studio, wait_for
from tessera.tests.test_video_pipelines import variable

OWNER = "0" * 32


@pytest.fixture
def studio(server):
    return server.studio


def run(studio, job, state="done"):
    studio.jobs.submit(job)
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert job.state == state, job.error
    return job.view()


def random_clip(frames, width=32, height=32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, frames, height, width, generator=generator) * 2 - 1


def sheet_frames(item):
    """The frames ``[3, n, S, S]`` that the page shows."""
    columns = [np.asarray(load_image(path)) for path, _ in item["sheets"]]
    pixels = np.concatenate(columns).reshape(item["frames"], 16, 16, 3)
    return torch.from_numpy(pixels).permute(3, 0, 1, 2) / 127.5 - 1


def test_frames_are_seen_before_the_clip_is_there(studio):
    job = tab.clip_job(studio, OWNER, "red ring", "tiny-blocks", seconds=2, count=2, seed=7)
    steps, show = [], job._show

    def look(clip, frames):
        show(clip, frames)
        steps.append((clip.seed, clip.frames, len(clip.sheets)))

    job._show = look
    view = run(studio, job)
    # The first frame alone, then blocks of four, each in a file of its own; at last in one.
    counts = [(n, sheets) for seed, n, sheets in steps if seed == 7]
    assert counts[3:6] == [(1, 1), (5, 2), (9, 3)] and counts == sorted(counts[:-1]) + counts[-1:]
    assert [len(item["sheets"]) for item in view["items"]] == [1, 1]
    assert [item["seed"] for item in view["items"]] == [7, 8]
    assert view["step"] == view["total"] and view["rate"] == 8
    for item in view["items"]:
        made = load_video(item["files"]["webp"])
        assert made.frames.shape[1] == item["frames"] == 16 and made.frame_rate == 8
        assert torch.equal(sheet_frames(item), made.frames)
        assert set(item["files"]) == {"webp", "gif", "png", "mp4", "webm"}
        record = read_record(item["files"]["webp"])
        assert record["prompt"] == "red ring" and record["seed"] == item["seed"]
        for file in item["files"].values():
            assert load_video(file).frames.shape[1] == 16 and read_record(file) == record
    folder = studio.scratch / job.id
    job.dispose()
    assert not folder.exists()


def test_unfinished_frames_are_shown_anew(studio):
    job = tab.clip_job(studio, OWNER, "red ring", "tiny-masked", seed=3)
    frames = [torch.full((1, 3, n, 4, 4), value) for n, value in ((2, 0.0), (3, 0.5), (4, 0.5))]
    clip = job.items[0]
    files = []
    for each in frames:
        job._show(clip, each)
        files.append([path for path, _ in clip.sheets])
    # All of them changed; then one came behind those that are known.
    assert [len(each) for each in files] == [1, 1, 2]
    assert files[1][0] != files[0][0] and files[2][0] == files[1][0]
    clip.sheets, clip.frames, job._shown = [], 0, None
    view = run(studio, job)
    assert view["items"][0]["frames"] == 5 and view["items"][0]["name"]


def test_a_stopped_clip_keeps_what_is_finished(studio, server):
    job = tab.clip_job(studio, OWNER, "red ring", "tiny-blocks", seconds=2, count=2, seed=7)
    show = job._show

    def stop(clip, frames):
        show(clip, frames)
        if clip.frames == 5:
            job.cancel.set()

    job._show = stop
    view = run(studio, job, "stopped")
    first, second = view["items"]
    assert first["frames"] >= 5 and first["name"] and not second["name"]
    record = read_record(first["files"]["webp"])
    assert record["settings"]["stopped_at"] == view["step"]
    assert record["settings"]["num_frames"] == 16
    path = studio.folder / first["name"]
    assert rerun(path, record, studio.videos._clips["tiny-blocks"])["identical"]

    noisy = tab.clip_job(studio, OWNER, "red ring", "tiny-masked", seed=3)
    noisy.cancel.set()
    assert not run(studio, noisy, "stopped")["items"][0]["name"]


def test_stories_know_their_scene(studio):
    text = "1: a red ring\n\n0.5 s: a blue square"
    job = tab.story_job(studio, OWNER, text, "tiny-blocks", seed=5)
    scenes, make = [], job._show

    def look(clip, frames):
        make(clip, frames)
        scenes.append(job.scene)

    job._show = look
    view = run(studio, job)
    assert view["scenes"] == [("a red ring", 1.0), ("a blue square", 0.5)]
    assert scenes == sorted(scenes) and {*scenes} == {0, 1}
    record = read_record(view["items"][0]["files"]["mp4"])
    assert record["prompt"] == "1 s: a red ring | 0.5 s: a blue square"
    path = studio.folder / view["items"][0]["name"]
    assert rerun(path, record, studio.videos._clips["tiny-blocks"])["identical"]
    assert tab.timeline(text).count("<li") == 2
    assert "ts-warning" in tab.timeline("a seed falls") and "&lt;b" in tab.timeline("1: <b>")


def test_pictures_move_and_clips_go_on(studio, tmp_path):
    Image.new("RGB", (20, 20), "teal").save(tmp_path / "fox.png")
    begin = str(tmp_path / "fox.png")
    job = tab.clip_job(studio, OWNER, "red ring", "tiny-blocks", begin, seconds=0.6, seed=1)
    (item,) = run(studio, job)["items"]
    path = studio.folder / item["name"]
    assert read_record(path)["settings"]["begins_with"] == "fox.png"
    more = tab.clip_job(studio, OWNER, "red ring", "tiny-blocks", str(path), seconds=0.6, seed=1)
    assert (more.request.image, more.request.go_on) == (None, path)
    (item,) = run(studio, more)["items"]
    assert item["frames"] == 5
    assert read_record(item["files"]["webp"])["settings"]["begins_with"] == path.name


@pytest.mark.parametrize("suffix", [".webp", ".mp4"])
def test_a_clip_becomes_smoother(studio, tmp_path, suffix):
    path = tmp_path / f"walk{suffix}"
    save_video(random_clip(3), path, 5)
    job = tab.smooth_job(studio, OWNER, str(path), 4)
    view = run(studio, job)
    assert (view["before"]["frames"], view["after"]["frames"]) == (3, 9)
    assert (view["before"]["rate"], view["after"]["rate"]) == (5, 20)
    assert view["done"] == view["total"] == 9 and set(view["files"]) == {"mp4", "webp"}
    before, after = load_video(view["before"]["source"]), load_video(view["after"]["source"])
    assert before.frames.shape[1] == 3 and after.frames.shape[1] == 9
    given = load_video(path).frames
    if suffix == ".webp":  # The given frames are as they were.
        assert torch.equal(after.frames[:, ::4], given)
    for file in view["files"].values():
        assert read_record(file)["settings"]["factor"] == 4
        assert load_video(file).frames.shape[1] == 9


def test_stopping_leaves_no_half_file(studio, tmp_path):
    save_video(random_clip(4), tmp_path / "a.mp4", 8)
    job = tab.smooth_job(studio, OWNER, str(tmp_path / "a.mp4"), 8)
    touch = studio.jobs.touch
    before = set(studio.folder.rglob("*"))
    studio.jobs.submit(job)

    def stop():
        if job.done >= 2:
            job.cancel.set()
        touch()

    job.touch = stop
    wait_for(lambda: not studio.jobs.active(OWNER))
    assert job.state == "stopped" and 2 <= job.done < job.total and not job.view()["files"]
    assert set(studio.folder.rglob("*")) - before <= {next(studio.folder.glob("????-??-??"))}


def bad_clip(folder, kind):
    path = folder / f"{kind}.mp4"
    if kind == "text":
        path.write_text("no video at all")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif kind == "cut":
        save_video(random_clip(9), path, 8)
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "one":
        save_video(random_clip(1), path, 8)
    elif kind == "picture":
        Image.new("RGB", (8, 8)).save(path, "PNG")
    elif kind == "long":
        save_video(random_clip(200, 16, 16), path, 20)
    else:
        variable(path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", 'Could not open "text.mp4": not an MP4'),
        ("empty", 'Could not open "empty.mp4"'),
        ("sound", 'Could not use "sound.mp4": it has no video track'),
        ("cut", '"cut.mp4": '),
        ("one", 'Could not use "one.mp4": it has one frame'),
        ("picture", 'Could not open "picture.mp4": it is a picture'),
        ("long", '"long.mp4" would have 1,593 frames of 16 x 16'),
        ("variable", '"variable.mp4" has a variable frame rate'),
    ],
)
def test_bad_clips_get_one_sentence(studio, tmp_path, kind, message):
    with pytest.raises(InputError, match=message) as caught:
        tab.smooth_job(studio, OWNER, bad_clip(tmp_path, kind), 8)
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)
    if kind == "variable":  # Read at a rate that is named it can be used.
        job = tab.smooth_job(studio, OWNER, str(tmp_path / "variable.mp4"), 2, input_rate=10)
        assert job.before.rate == 10
    if kind in ("text", "sound"):
        with pytest.raises(InputError, match=message):
            tab.clip_job(studio, OWNER, "red ring", begin=str(tmp_path / f"{kind}.mp4"))


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        ("clip_job", {"prompt": " "}, "prompt is empty"),
        ("clip_job", {"prompt": "x" * 100_000}, "at most 2,000"),
        ("clip_job", {"prompt": "a ring", "model": "../../etc"}, "not on this computer"),
        ("clip_job", {"prompt": "a ring", "seconds": float("nan")}, "up to 60 seconds"),
        ("clip_job", {"prompt": "a ring", "seconds": 61.0}, "up to 60 seconds"),
        ("clip_job", {"prompt": "a ring", "frame_rate": 0.0}, "at most 60, got 0"),
        ("clip_job", {"prompt": "a ring", "guidance_scale": -1.0}, "Guidance must lie"),
        ("clip_job", {"prompt": "a ring", "count": 5}, "1 to 4 clips"),
        ("clip_job", {"prompt": "a ring", "seed": -1}, "Seed must be"),
        ("story_job", {"text": " \n "}, "a line for each scene"),
        ("story_job", {"text": "a seed falls"}, "is no scene"),
        ("story_job", {"text": "0: a seed falls"}, "more than 0 seconds"),
        ("story_job", {"text": "nan: a seed falls"}, "more than 0 seconds"),
        ("story_job", {"text": "99: a seed falls"}, "together up to 60"),
        ("story_job", {"text": "1: x\n" * 13}, "up to 12 scenes, got 13"),
        ("smooth_job", {"path": None}, "Drop a clip first"),
        ("smooth_job", {"path": "x.mp4", "factor": 3}, "one of 2, 4, 8, got 3"),
        ("smooth_job", {"path": "x.mp4", "frame_rate": 500.0}, "at most 240"),
        ("smooth_job", {"path": "http://localhost/x.mp4"}, "addresses are not opened"),
    ],
)
def test_refusals(studio, make, values, message):
    with pytest.raises(InputError, match=message):
        getattr(tab, make)(studio, OWNER, **values)


def test_what_the_model_refuses_is_one_sentence(studio):
    job = tab.clip_job(studio, OWNER, "red ring", "tiny-blocks", seconds=60, frame_rate=60, seed=1)
    assert "frames of 16 x 16" in run(studio, job, "failed")["error"]


def test_models(studio, tmp_path):
    assert studio.videos.clip_names()[:2] == ["tiny-blocks", "tiny-masked"]
    assert studio.videos.condition("tiny-masked") == "text"
    first = studio.videos.clips("tiny-blocks")
    assert studio.videos.clips("tiny-blocks", moving_picture=True).generator is first.generator
    with pytest.raises(InputError, match="not on this computer"):
        studio.videos.between("tiny-blocks")


def test_a_page_without_models_of_video(tmp_path, monkeypatch):
    from tessera.app.main import build

    with tiny_studio(tmp_path) as server:
        server.studio.videos = VideoModels()
        monkeypatch.setattr(VideoModels, "clip_names", lambda self: [])
        monkeypatch.setattr(VideoModels, "between_names", lambda self: [])
        demo = build(server.studio)
        shown = [str(block.value) for block in demo.blocks.values() if hasattr(block, "value")]
        for what in ("moving pictures", "stories", "frames in between"):
            assert any(f"No model of {what} is on this computer" in each for each in shown)
        with pytest.raises(InputError, match="No model of clips"):
            tab.clip_job(server.studio, OWNER, "red ring")


def test_the_library_has_all_media(studio):
    sound = studio.outputs(OWNER).new_path("a bell", 1, ".wav")
    sound.write_bytes(b"RIFF")
    clip = sound.with_suffix(".webm")
    save_video(random_clip(2), clip, 8)
    files = {file["name"].split("/")[1]: file["kind"] for file in library.shelf(studio, OWNER, "", 1)["files"]}  # fmt: skip
    assert (files[sound.name], files[clip.name]) == ("sound", "video")
    outputs = studio.outputs(OWNER)
    name = f"{sound.parent.name}/{sound.name}"
    moved = outputs.delete(name)
    assert moved.is_file() and outputs.restore(moved) == name
    sound.unlink(), clip.unlink()


def test_client(server, tmp_path):
    client = Client(server.url, verbose=False, download_files=str(tmp_path))
    job = client.submit("red ring", "tiny-blocks", 1.0, None, None, 1, 7, api_name="/video")
    last = job.result(timeout=120)
    states = job.outputs()
    assert last["state"] == "done" and last["seeds"] == [7] and last["frames"] == [8]
    assert states[0]["clips"] == [] and {0, 1, 5} & {each["frames"][0] for each in states}
    with VideoReader(last["clips"][0]) as reader:
        assert reader.num_frames == 8
    told = client.submit("0.5: a ring\n0.5: a dot", "tiny-blocks", api_name="/story")
    assert told.result(timeout=120)["scene"] == 1
    save_video(random_clip(3), tmp_path / "a.mp4", 8)
    smooth = client.submit(handle_file(tmp_path / "a.mp4"), 2, api_name="/interpolate")
    assert smooth.result(timeout=120)["step"] == 5
    for path in (str(tmp_path / "a.mp4"), {"path": str(tmp_path / "a.mp4")}):
        with pytest.raises(AppError, match="Pass a file of your own"):
            client.submit(path, 2, api_name="/interpolate").result(timeout=120)
    with pytest.raises(AppError, match="is no scene"):
        client.submit("a seed", api_name="/story").result(timeout=120)
