"""tessera video, interpolate, reconstruct and evaluate of clips, over tiny models as shipped ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tessera.app.commands import cli
from tessera.app.commands_image import weights_sha256
from tessera.app.commands_video import scenes_told, told
from tessera.evaluation.metrics import psnr
from tessera.evaluation.video import clip_extractor, evaluate_interpolation, evaluate_video, motion
from tessera.modalities.errors import InputError
from tessera.modalities.records import read_record
from tessera.modalities.video import VideoReader, load_video, save_video
from tessera.pipelines.text_to_video import TextToVideoPipeline
from tessera.tests.tiny import tiny_clip, tiny_pipeline
from tessera.tests.tiny_video import tiny_class_video, tiny_interpolation, tiny_masked_pipeline
from tessera.weights import registry


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder of shipped models: "animated-sticker" and "smooth"."""
    folder = tmp_path_factory.mktemp("shipped")
    for name, pipeline, task, model in (
        (
            "animated-sticker",
            tiny_masked_pipeline(),
            "text-to-video",
            "text_to_video:TextToVideoPipeline",
        ),
        (
            "smooth",
            tiny_interpolation(),
            "frame-interpolation",
            "frame_interpolation:FrameInterpolationPipeline",
        ),
    ):
        pipeline.save_pretrained(folder / name)
        row = {"title": f"Tiny {name}", "task": task, "model": f"pipelines.{model}"}
        row |= {"license_weights": "CC0-1.0"}
        (folder / name / "tessera.json").write_text(json.dumps(row))
    return folder


@pytest.fixture(autouse=True)
def workplace(shipped, tmp_path, monkeypatch):
    """An empty current folder; the tiny models are the shipped ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "SHIPPED", shipped)
    registry._models.cache_clear()
    yield
    registry._models.cache_clear()


def tessera(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(each) for each in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    if code == 2:
        assert result.stderr.splitlines()[-1].startswith("Error: ")
    return result


def clip(frames, size=32, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(3, frames, size, size, generator=random) * 2 - 1


@pytest.mark.parametrize("suffix", ["webp", "gif", "png", "mp4", "webm"])
def test_a_file_of_each_format_is_made_again(suffix):
    name = f"star.{suffix}"
    result = tessera("video", "red ring", "--frames", 4, "--seed", 7, "-o", name)
    assert result.stdout == f"{name}\n" and "seed 7" in result.stderr
    with VideoReader(name) as reader:
        assert (reader.num_frames, reader.width, reader.frame_rate) == (4, 16, 8)
    record = read_record(name)
    assert record["prompt"] == "red ring" and record["seed"] == 7 and len(record["sha256"]) == 64
    assert record["settings"]["num_frames"] == 4 and record["settings"]["num_steps"] == 3
    assert "identical" in tessera("info", name, "--rerun").stdout


def test_a_changed_clip_differs():
    tessera("video", "red ring", "--frames", 3, "-o", "a.webp")
    frames = load_video("a.webp").frames
    save_video(-frames, "b.webp", 8, read_record("a.webp"))
    assert "differs: by up to" in tessera("info", "b.webp", "--rerun", code=1).stdout
    save_video(frames[:, :2], "c.webp", 8, read_record("a.webp"))
    assert "3 frames of 16x16" in tessera("info", "c.webp", "--rerun", code=1).stdout


def test_stories_are_made_again():
    scenes = [("a red ring", 0.5), ("a blue | 3 square", 0.5)]
    assert scenes_told(told(scenes)) == scenes
    story = [x for text, seconds in scenes for x in ("--story", f"{seconds}: {text}")]
    tessera("video", *story, "--fps", 10, "-o", "story.png")
    assert read_record("story.png")["prompt"] == told(scenes)
    assert load_video("story.png").frame_rate == 10
    assert "identical" in tessera("info", "story.png", "--rerun").stdout


def test_a_clip_whose_first_frame_another_model_drew():
    tiny_pipeline().save_pretrained("painter")
    parts = tiny_masked_pipeline().components
    TextToVideoPipeline(**parts, first_frame="painter").save_pretrained("mover")
    tessera("video", "red ring spinning", "--seed", 5, "--model", "mover", "-o", "a.png")
    record = read_record("a.png")
    assert record["settings"]["first_frame"] == "painter"
    assert record["sha256"] == weights_sha256("mover") != weights_sha256("animated-sticker")
    assert "identical" in tessera("info", "a.png", "--rerun", "--model", "mover").stdout
    # Of a clip that begins with a file, the file is told.
    tessera("video", "red ring", "--image", "a.png", "--model", "mover", "-o", "b.png")
    settings = read_record("b.png")["settings"]
    assert settings["begins_with"] == "a.png" and "first_frame" not in settings
    tessera("video", "red ring", "--frames", 1, "--model", "mover", "-o", "c.png")
    assert "first_frame" not in read_record("c.png")["settings"]
    # Other weights of the painter are other weights of the clip; without it files still move.
    path = Path("painter/generator/diffusion_pytorch_model.safetensors")
    weights = {name: value + 0.5 for name, value in load_file(path).items()}
    save_file(weights, path)
    assert weights_sha256("mover") != record["sha256"]
    shutil.rmtree("painter")
    tessera("video", "red ring", "--image", "a.png", "--model", "mover", "-o", "d.png")
    error = tessera("video", "red ring", "--model", "mover", "-o", "e.png", code=2).stderr
    assert "painter" in error and not Path("e.png").exists()


def test_variants_are_the_same_whatever_their_number():
    shown = tessera(
        "video", "red ring", "-n", 2, "--seed", 4, "--seconds", 0.4, "-o", "a/", "--json"
    )
    videos = json.loads(shown.stdout)["videos"]
    assert [v["path"] for v in videos] == ["a/red-ring_4.webp", "a/red-ring_5.webp"]
    assert [v["frames"] for v in videos] == [3, 3]
    tessera("video", "red ring", "--seed", 5, "--seconds", 0.4, "-o", "b.webp", "--no-metadata")
    assert torch.equal(load_video("b.webp").frames, load_video("a/red-ring_5.webp").frames)
    assert read_record("b.webp") is None


def test_pictures_move_and_clips_go_on():
    Image.new("RGB", (20, 20), "teal").save("fox.png")
    tessera("video", "red ring", "--image", "fox.png", "--frames", 5, "-o", "fox.mp4")
    assert load_video("fox.mp4").frames.shape[1] == 5
    error = tessera("info", "fox.mp4", "--rerun", code=2).stderr
    assert "cannot be rerun" in error
    tessera("video", "red ring", "--continue", "fox.mp4", "--frames", 4, "-o", "more.webp")
    assert read_record("more.webp")["settings"]["begins_with"] == "fox.mp4"
    assert 'made from "fox.mp4"' in tessera("info", "more.webp", "--rerun", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Say what moves"),
        (("a", "--frames", 10_000), "10,000 frames"),
        (("a", "--seconds", 0), "longer than 0 seconds"),
        (("a", "--seconds", 1, "--frames", 2), "leave one of them out"),
        (("a", "--story", "1: b"), "not both"),
        (("--story", "red"), "is no scene"),
        (("--story", "1: a", "--frames", 2), "its own length"),
        (("a", "--image", "no.png"), 'no file "no.png"'),
        (("a", "-o", "a.txt"), "must end in"),
        (("a", "-o", "no/a.webp"), "does not exist"),
        (("a", "-o", "a.webp", "-n", 2), "names one file"),
        (("a", "--model", "unicorn"), 'no video model "unicorn" here'),
        (("a", "--model", "titok-l-32"), "makes no video"),
        (("a", "--top-k", 3), "takes no top_k"),
        (("a", "--fps", 300), "at most 240"),
        ((" ",), "empty"),
    ],
)
def test_bad_arguments(arguments, message):
    assert message in tessera("video", *arguments, code=2).stderr
    assert not list(Path().rglob("*.webp"))


def test_the_default_model_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "nothing")
    registry._models.cache_clear()
    error = tessera("video", "a fox", "-o", "a.webp", code=2).stderr
    assert 'no video model "animated-sticker" here' in error and "larp-l-long-ar" in error
    save_video(clip(2), "a.gif", 8)
    error = tessera("reconstruct", "a.gif", code=2).stderr
    assert 'no video tokenizer "animated-sticker"' in error and "larp-l-long" in error


def test_interpolate():
    save_video(clip(3), "walk.mp4", 10)
    result = tessera("interpolate", "walk.mp4", "--factor", 3)
    assert result.stdout == "walk_smooth.mp4\n" and "7 frames, 30 a second" in result.stderr
    with VideoReader("walk_smooth.mp4") as reader:
        assert (reader.num_frames, reader.frame_rate) == (7, 30)
    assert read_record("walk_smooth.mp4")["settings"]["factor"] == 3
    for name in ("a", "b"):
        Image.new("RGB", (21, 15), "red").save(f"{name}.png")
    tessera("interpolate", "a.png", "b.png", "--fps", 12, "-o", "ab.webp", "--model", "smooth")
    assert load_video("ab.webp").frames.shape == (3, 3, 15, 21)
    assert "Give one clip" in tessera("interpolate", "a.png", "walk.mp4", code=2).stderr
    assert "it is a picture" in tessera("interpolate", "a.png", code=2).stderr
    assert "exists already" in tessera("interpolate", "walk.mp4", code=2).stderr
    Path("text.mp4").write_bytes(b"RIFF")
    assert "not an MP4" in tessera("interpolate", "text.mp4", "-o", "s.mp4", code=2).stderr
    with av.open("sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for command in ("interpolate", "reconstruct"):
        error = tessera(command, "sound.mp4", "-o", "s.mp4", code=2).stderr
        assert "has no video track" in error
    error = tessera("interpolate", "walk.mp4", "-o", "c.mp4", "--model", "unicorn", code=2).stderr
    assert 'no model "unicorn" here' in error and "vfimamba-s" in error


def test_reconstruct():
    save_video(clip(4, 24), "a.webp", 10)
    result = tessera("reconstruct", "a.webp")
    assert result.stdout == "a_tokens.webp\n" and "4 frames: 12 tokens" in result.stderr
    video = load_video("a_tokens.webp")
    assert video.frames.shape == (3, 4, 16, 16) and video.frame_rate == 10
    assert "identical" in tessera("info", "a_tokens.webp", "--rerun").stdout
    shown = json.loads(tessera("reconstruct", "a.webp", "-o", "b.mp4", "--json").stdout)
    assert shown["frames"] == 4 and shown["bits"] == 72 and shown["psnr"] > 0
    assert "are of pictures" in tessera("reconstruct", "a.webp", "--tokens", 3, code=2).stderr
    error = tessera("reconstruct", "a.webp", "--tokenizer", "titok-l-32", "-f", code=2).stderr
    assert 'no video tokenizer "titok-l-32"' in error


# --- Evaluation ---


@pytest.fixture
def clips(tmp_path):
    """Four clips whose frames fade evenly, so that the mean of neighbours is right."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, name in enumerate(("red ring", "blue square", "green circle", "black ring")):
        frames = clip(1, 32, number)
        weights = torch.linspace(0, 0.9, 6)[None, :, None, None]
        save_video(frames * (1 - weights), folder / f"{name}.png", 8)
    return folder


def test_models_are_measured(clips):
    report = evaluate_video("animated-sticker", clips, 3, 4, scorer=tiny_clip(), out="r.json")
    assert json.loads(Path("r.json").read_text()) == report
    kept, made = report["reconstruction"], report["generation"]
    assert kept["clips"] == 3 and kept["frames"] == 15 and 0 < kept["psnr"] < 30
    assert kept["bits_per_frame"] == 6 * 12 / 5 and "lpips" not in kept
    assert "CLIP" in made["frechet"]["extractor"] and made["frechet"]["distance"] > 0
    assert made["motion_ratio"] == made["generated"]["motion"] / made["real"]["motion"]
    for way in ("generated", "real"):
        assert 1 <= made[way]["middle"]["mean_rank"] <= 4
    assert made["generated"]["middle"]["top_5"] == 1


def test_i3d_is_a_file_of_the_users(clips):
    class I3D(torch.nn.Module):
        def forward(
            self, x, rescale: bool = False, resize: bool = False, return_features: bool = True
        ):
            return x.mean(dim=[2, 3, 4])

    torch.jit.script(I3D()).save("i3d.pt")
    report = evaluate_video("animated-sticker", clips, 1, 4, i3d="i3d.pt", scorer=tiny_clip())
    assert report["generation"]["frechet"]["extractor"].startswith("I3D")
    Path("bad.pt").write_bytes(b"no")
    with pytest.raises(InputError, match="not I3D"):
        evaluate_video("animated-sticker", clips, 1, 4, i3d="bad.pt", scorer=tiny_clip())


def test_motion_and_features():
    still = clip(1).expand(-1, 4, -1, -1)
    assert motion(still) == 0
    steps = torch.arange(4.0)[None, :, None, None] * 0.25
    assert motion(steps.expand(3, -1, 4, 4)) == pytest.approx(0.25)
    with torch.no_grad():
        features = clip_extractor(tiny_clip())(torch.stack([still, clip(4)]))
    assert features.shape == (2, 32)
    assert float(features[0, 16:].abs().max()) < 1e-6 < float(features[1, 16:].abs().max())


def test_interpolation_is_measured_against_simple_ways(clips):
    report = evaluate_interpolation("smooth", clips, triplets=1, out="r.json")["interpolation"]
    assert report["clips"] == 4 and report["triplets"] == 4
    # Frames fade evenly: their mean is the frame between them, but for 8 bits.
    assert report["average"]["psnr"] > 40 > report["nearest"]["psnr"]
    frames = load_video(clips / "red ring.png").frames
    pairs = [frames[:, 2:3].transpose(0, 1), frames[:, 3:4].transpose(0, 1)]
    assert float(psnr(*pairs)) == pytest.approx(report["nearest"]["psnr"], abs=3)
    assert report["model"]["psnr"] != report["average"]["psnr"]


def test_evaluate_chooses_by_the_model(clips, tmp_path):
    shown = tessera("evaluate", "smooth", "--data", clips, "--json").stdout
    assert "interpolation" in json.loads(shown)
    tiny_masked_pipeline().tokenizer.save_pretrained("tokenizer")
    shown = tessera("evaluate", "tokenizer", "--data", clips, "--pictures", 2, "--json").stdout
    assert json.loads(shown)["reconstruction"]["clips"] == 2
    shown = tessera("evaluate", "animated-sticker", "--data", clips, "--names", 2, "--json").stdout
    assert json.loads(shown)["generation"]["names"] == 2
    tiny_class_video().save_pretrained("classes")
    error = tessera("evaluate", "classes", "--data", clips, code=2).stderr
    assert "holds a ClassToVideoPipeline" in error
    assert (
        "No videos"
        in tessera("evaluate", "smooth", "--data", tmp_path / "tokenizer", code=2).stderr
    )
