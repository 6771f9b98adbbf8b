"""Pipelines that make, go on with, interpolate and reconstruct clips, over tiny random models."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
from PIL import Image

from tessera import load_video_pipeline
from tessera.app.commands_image import weights_sha256
from tessera.modalities.errors import InputError
from tessera.modalities.video import Video, VideoReader, fit_frames, load_video, save_video
from tessera.pipelines.frame_interpolation import FrameInterpolationPipeline
from tessera.pipelines.image_to_video import ImageToVideoPipeline
from tessera.pipelines.reconstruction import ReconstructionPipeline
from tessera.pipelines.text_to_video import (
    ClassToVideoPipeline,
    TextToVideoPipeline,
    still_prompt,
)
from tessera.tests.tiny import tiny_clip, tiny_pipeline
from tessera.tests.tiny_video import (
    tiny_block_pipeline,
    tiny_causal_tokenizer,
    tiny_class_video,
    tiny_flow_pipeline,
    tiny_frames_pipeline,
    tiny_interpolation,
    tiny_masked_pipeline,
)
from tessera.weights import registry

TEXT = {"block": tiny_block_pipeline, "masked": tiny_masked_pipeline, "flow": tiny_flow_pipeline}


@pytest.fixture(scope="module")
def pipelines():
    return {name: build() for name, build in TEXT.items()}


@pytest.fixture(scope="module")
def smooth():
    return tiny_interpolation()


def clip(frames, size=16, seed=0, channels=3):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(channels, frames, size, size, generator=random) * 2 - 1


def make(pipeline, *args, **options):
    return pipeline(*args, output_type="pt", **{"seed": 3, **options}).frames


@pytest.mark.parametrize("kind", TEXT)
def test_any_number_of_frames(pipelines, kind):
    """Also what is no whole step, and what is longer than the model's window."""
    pipeline = pipelines[kind]
    for count in (1, 6, 13):
        output = pipeline("red ring", count, frame_rate=12, seed=3)
        assert len(output.frames) == 1 and len(output.frames[0]) == count
        assert output.frames[0][0].size == (16, 16) and output.frame_rate == 12
    whole, part = make(pipeline, "red ring", 5), make(pipeline, "red ring", 4)
    assert torch.equal(whole[:, :, :4], part)
    assert float((whole[:, :, 1:] - whole[:, :, :-1]).abs().mean()) > 1e-3


@pytest.mark.parametrize("kind", TEXT)
def test_an_item_is_the_same_alone_and_in_a_batch(pipelines, kind):
    both = make(pipelines[kind], ["red ring", "a very blue square"], 5)
    first = make(pipelines[kind], "red ring", 5)
    assert torch.allclose(both[:1], first, atol=1e-4)
    second = make(pipelines[kind], "a very blue square", 5, seed=4)
    assert torch.allclose(both[1:], second, atol=1e-4)
    # The prompt counts, and so does the seed.
    assert not torch.allclose(second, make(pipelines[kind], "red ring", 5, seed=4), atol=1e-3)
    assert not torch.allclose(first, make(pipelines[kind], "red ring", 5, seed=5), atol=1e-3)


@pytest.mark.parametrize("kind", TEXT)
def test_a_scene_goes_on_from_the_last_frames(pipelines, kind, monkeypatch):
    pipeline, writer = pipelines[kind], pipelines[kind].writer
    seen, encode = [], type(writer).encode
    monkeypatch.setattr(
        type(writer), "encode", lambda self, frames: (seen.append(frames), encode(self, frames))[1]
    )
    story = [("red ring", 0.5), ("blue square", 1.0)]
    frames = make(pipeline, None, story=story, frame_rate=8)
    assert frames.shape[2] in (13, 12, 11)
    first = make(pipeline, "red ring", 5, frame_rate=8)
    assert torch.equal(frames[:, :, :5], first)
    known = seen[0].shape[2]
    assert torch.allclose(seen[0], first[:, :, -known:])
    other = make(pipeline, None, story=[story[0], ("green square", 1.0)], frame_rate=8)
    assert torch.equal(other[:, :, :5], first) and not torch.equal(other, frames)


@pytest.mark.parametrize("kind", TEXT)
def test_frames_are_continued(pipelines, kind, tmp_path):
    start = clip(6)
    frames = make(pipelines[kind], "red ring", 8, start=start)
    assert frames.shape == (1, 3, 8, 16, 16)
    assert not torch.equal(frames, make(pipelines[kind], "red ring", 8, start=-start))
    save_video(start, tmp_path / "start.png", 8)
    from_file = make(pipelines[kind], "red ring", 8, start=tmp_path / "start.png")
    stored = load_video(tmp_path / "start.png")
    assert torch.equal(from_file, make(pipelines[kind], "red ring", 8, start=stored))


def test_previews_grow_and_are_the_result(pipelines):
    """Blocks: 1 frame after the first step in time, then 4 more each, over two rounds."""
    partials = list(pipelines["block"].stream("red ring", 13, seed=3, output_type="pt"))
    counts = [partial.frames().shape[2] for partial in partials]
    assert counts == sorted(counts) and {0, 1, 5, 9, 13} == set(counts)
    assert [partial.step for partial in partials] == list(range(1, partials[0].total + 1))
    frames = partials[-1].output.frames
    assert all(partial.output is None for partial in partials[:-1])
    for partial, count in zip(partials, counts, strict=True):
        assert torch.equal(partial.frames(), frames[:, :, :count])
    assert torch.equal(frames, make(pipelines["block"], "red ring", 13))
    assert [len(frames) for frames in partials[-1].preview()] == [13]


@pytest.mark.parametrize("kind", ["masked", "flow"])
def test_unfinished_clips_are_shown_whole(pipelines, kind):
    partials = list(pipelines[kind].stream("red ring", 5, seed=3, output_type="pt"))
    assert len(partials) == partials[0].total == 3
    assert {partial.frames().shape[2] for partial in partials} == {5}
    assert not torch.equal(partials[0].frames(), partials[-1].output.frames)


def test_a_call_can_be_stopped(pipelines):
    seen = []
    output = pipelines["block"](
        "red ring", 13, seed=3, callback=lambda partial: seen.append(1) or len(seen) < 6
    )
    whole = pipelines["block"]("red ring", 13, seed=3)
    assert len(seen) == 6 and 0 < len(output.frames[0]) < 13
    assert output.frames[0][0].tobytes() == whole.frames[0][0].tobytes()
    stream = pipelines["block"].stream("red ring", 13)
    next(stream)
    stream.close()
    assert next(stream, None) is None


def test_a_picture_begins_the_clip(pipelines, tmp_path):
    block = pipelines["block"]
    mover = ImageToVideoPipeline(**block.components)
    picture = Image.new("RGBA", (24, 16), "#d2222280")
    picture.save(tmp_path / "fox.png")
    frames = make(mover, tmp_path / "fox.png", "red ring", 6)
    assert frames.shape[2] == 6
    pixels = torch.full((1, 3, 1, 16, 16), 1.0)
    pixels[:] = (
        torch.tensor([(c * 128 + 255 * 127) / 255 for c in (0xD2, 0x22, 0x22)]).view(1, 3, 1, 1, 1)
        / 127.5
        - 1
    )
    kept = block.tokenizer.decode(block.tokenizer.encode(pixels)).clamp(-1, 1)
    assert torch.allclose(frames[:, :, :1], kept, atol=0.02)
    with pytest.raises(InputError, match="Say what the picture does"):
        mover(picture)


def test_another_model_paints_the_first_frame(pipelines, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "painter")
    parts = pipelines["block"].components
    pipeline = TextToVideoPipeline(**parts, first_frame=str(tmp_path / "painter"))
    partials = list(pipeline.stream("red ring", 6, seed=3, output_type="pt"))
    assert [partial.step for partial in partials] == list(range(1, partials[0].total + 1))
    counts = [partial.frames().shape[2] for partial in partials]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 6
    frames = partials[-1].output.frames
    # The picture is that of the other model, as it moves in the hands of this one.
    generator = torch.Generator().manual_seed(3)
    painted = tiny_pipeline()(["red ring"], generator=[generator], output_type="pt").images
    shown = partials[counts.index(1)].frames()
    assert torch.allclose(shown[:, :, 0], fit_frames(painted, 16), atol=1e-5)
    mover = ImageToVideoPipeline.from_text_pipeline(pipeline)
    assert torch.equal(frames, make(mover, painted[0][:, None], "red ring", 6))

    both = make(pipeline, ["blue square", "red ring"], 6, seed=2)
    assert torch.allclose(both[1:], frames, atol=1e-4)
    told = make(pipeline, None, story=[("red ring", 0.5), ("blue square", 1.0)], frame_rate=8)
    assert torch.equal(told[:, :, :5], frames[:, :, :5])
    # Where nothing is left to move, and behind given frames, nothing is painted.
    one = make(pipeline, "red ring", 1)
    assert torch.equal(one, make(pipelines["block"], "red ring", 1))
    start = clip(5)
    given = make(pipeline, "red ring", 4, start=start)
    assert torch.equal(given, make(pipelines["block"], "red ring", 4, start=start))
    seen = []
    stopped = pipeline(
        "red ring", 6, seed=3, callback=lambda partial: seen.append(1) or len(seen) < 2
    )
    assert len(seen) == 2 and stopped.frames == [[]]

    pipeline.save_pretrained(tmp_path / "saved")
    again = load_video_pipeline(tmp_path / "saved")
    assert torch.equal(make(again, "red ring", 6), frames)
    style = tiny_pipeline().styles[0]
    styled = TextToVideoPipeline(
        **parts, first_frame=str(tmp_path / "painter"), first_frame_style=style
    )
    generator = torch.Generator().manual_seed(3)
    options = {"style": style, "generator": [generator], "output_type": "pt"}
    painted = tiny_pipeline()(["red ring"], **options).images
    mover = ImageToVideoPipeline.from_text_pipeline(styled)
    moved = make(mover, painted[0][:, None], "red ring", 6)
    assert torch.equal(make(styled, "red ring", 6), moved) and not torch.equal(moved, frames)
    broken = TextToVideoPipeline(**parts, first_frame=str(tmp_path / "none"))
    with pytest.raises(InputError, match="none"):
        broken("red ring")


@pytest.mark.parametrize(
    ("prompt", "still"),
    [
        ("rocket rising up", "rocket"),
        ("Rocket Rising Up", "Rocket"),
        (", animated", ", animated"),
        ("a dog dancing", "a dog"),
        ("raining stars", "stars"),
        ("red heart, animated", "red heart"),
        ("fish flying in from the left", "fish"),
        ("a butterfly flapping its wings", "a butterfly"),
        ("cloud with lightning", "cloud with lightning"),
        ("smiling face", "smiling face"),
        ("a very blue square", "a very blue square"),
    ],
)
def test_a_picture_does_not_move(prompt, still):
    """In a tower that has "lightning" for an entry, and "flapping" in pieces."""
    assert still_prompt(prompt, lambda word: 3 if word == "lightning" else 5) == still


def test_frames_alone_are_continued(tmp_path):
    pipeline = tiny_frames_pipeline()
    picture = Image.new("RGB", (16, 16), "teal")
    assert make(pipeline, picture, num_frames=14).shape[2] == 14
    with pytest.raises(InputError, match="reads no text"):
        pipeline(picture, "red ring")
    pipeline.save_pretrained(tmp_path / "model")
    again = load_video_pipeline(tmp_path / "model")
    assert isinstance(again, ImageToVideoPipeline) and again.clip is None
    assert torch.equal(make(pipeline, picture), make(again, picture))


def test_classes():
    pipeline = tiny_class_video()
    frames = make(pipeline, "surf", num_frames=3)
    assert frames.shape == (1, 3, 3, 8, 8)
    assert torch.equal(frames, make(pipeline, 2, num_frames=3))
    counts = [len(p.preview()[0]) for p in pipeline.stream(2, seed=3)]
    assert counts == [0, 0, 0, 0, 0, 4]
    with pytest.raises(InputError, match='no class "dancing"'):
        pipeline("dancing")
    with pytest.raises(InputError, match="at most 4 frames, got 5"):
        pipeline(0, num_frames=5)
    with pytest.raises(InputError, match="cannot go on from frames"):
        pipeline(0, start=clip(2, 8))
    with pytest.raises(InputError, match="cannot go on from a picture"):
        ImageToVideoPipeline(pipeline.tokenizer, pipeline.generator)


def test_frame_prediction_of_holistic_tokens():
    """Of 4 frames a round 2 are known."""
    pipeline = tiny_class_video(frame_prediction=True)
    start = clip(5, 8)
    partials = list(pipeline.stream(start, num_frames=8, seed=3, output_type="pt"))
    assert [p.step for p in partials if p.frames().shape[2] > 2][::6] == [6, 12, 18]
    frames = partials[-1].output.frames
    assert frames.shape[2] == 8
    assert torch.equal(frames, make(pipeline, start[:, -2:], num_frames=8))


@pytest.mark.parametrize("kind", TEXT)
def test_saved_pipelines_load_as_they_were(pipelines, kind, tmp_path):
    pipelines[kind].save_pretrained(tmp_path)
    again = load_video_pipeline(tmp_path)
    assert isinstance(again, TextToVideoPipeline)
    assert torch.equal(make(again, "red ring"), make(pipelines[kind], "red ring"))
    mover = ImageToVideoPipeline.from_pretrained(tmp_path)
    assert make(mover, Image.new("RGB", (9, 9)), "red ring").shape[2] == 9 - 4 * (kind == "masked")
    with pytest.raises(InputError, match="holds a TextToVideoPipeline"):
        ClassToVideoPipeline.from_pretrained(tmp_path)


def test_a_shipped_model_takes_a_part_from_another_one(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SHIPPED", tmp_path)
    pipeline = pipelines["block"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    pipeline.save_pretrained(whole)
    pipeline.save_pretrained(part)
    shutil.rmtree(part / "clip")
    with pytest.raises(InputError, match="could not be loaded"):
        TextToVideoPipeline.from_pretrained(part)
    (part / "tessera.json").write_text(json.dumps({"shared": {"clip": "whole/clip"}}))
    again = TextToVideoPipeline.from_pretrained(part)
    assert torch.equal(make(again, "red ring"), make(pipeline, "red ring"))
    assert weights_sha256(part) == weights_sha256(whole)


def test_generators_alone_need_their_parts(pipelines, tmp_path):
    block = pipelines["block"]
    block.generator.save_pretrained(tmp_path / "generator")
    block.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="pass its tokenizer"):
        load_video_pipeline(tmp_path / "generator")
    parts = {"tokenizer": tmp_path / "tokenizer", "clip": tiny_clip()}
    again = load_video_pipeline(tmp_path / "generator", **parts)
    assert torch.equal(make(again, "red ring"), make(block, "red ring"))


def test_models_that_are_none():
    with pytest.raises(InputError, match=r'no video model "animated-unicorn" here.*larp-l-long-ar'):
        load_video_pipeline("animated-unicorn")
    with pytest.raises(InputError, match="makes no video"):
        load_video_pipeline("titok-l-32")
    with pytest.raises(InputError, match="Unknown model"):
        load_video_pipeline("./no/such/folder")
    with pytest.raises(InputError, match=r'no model "unicorn" here.*vfimamba-s'):
        FrameInterpolationPipeline.from_pretrained("unicorn")
    with pytest.raises(InputError, match="ids below"):
        TextToVideoPipeline(
            tiny_masked_pipeline().tokenizer, tiny_block_pipeline().generator, tiny_clip()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 10_000}, r"10,000 frames of 16 x 16 .* at least .* GB .* 1,024 frames"),
        ({"num_frames": 300, "num_videos_per_prompt": 4}, r"1,200 frames .* in 4 clips"),
        ({"num_frames": 13, "max_frames": 12}, "the limit is 12 frames"),
        ({"num_frames": 0}, "at least 1 frames, got 0"),
        ({"frame_rate": 0}, "above 0"),
        ({"seed": -1}, "Seed must be"),
        ({"top_q": 3}, 'no setting "top_q"'),
        ({"num_steps": 3}, "takes no num_steps"),
        ({"output_type": "gif"}, "Unknown output_type"),
        ({"start": torch.zeros(2, 4, 4)}, "Frames to go on from"),
        ({"start": torch.full((3, 1, 4, 4), torch.nan)}, "not finite"),
        ({"start": []}, "Frames to go on from"),
        ({"story": [("a", 1)]}, "either a prompt"),
        ({"prime_frames": 0}, "at least 1 frame"),
        ({"num_videos_per_prompt": 0}, "at least 1 clip"),
    ],
)
def test_bad_arguments(pipelines, options, message):
    with pytest.raises(InputError, match=message):
        pipelines["block"]("red ring", **options)


@pytest.mark.parametrize(
    ("story", "message"),
    [
        ([], "at least one scene"),
        ([("red", -1)], "longer than 0 seconds"),
        (["red"], "A story is a list"),
        ([(" ", 1)], "empty"),
        ([("red", 2000)], "16,001 frames"),
    ],
)
def test_bad_stories(pipelines, story, message):
    with pytest.raises(InputError, match=message):
        pipelines["masked"](story=story)


# --- Interpolation ---


def test_interpolation_keeps_the_frames_between(smooth):
    """Odd sizes, twice and three times."""
    frames = clip(3, 20)[:, :, :17, :]
    for factor in (2, 3):
        made = smooth(Video(frames, 10.0), factor, output_type="pt")
        assert made.frames.shape == (3, 1 + 2 * factor, 17, 20)
        assert made.frame_rate == 10 * factor
        assert torch.equal(made.frames[:, ::factor], frames)
    assert len(smooth(frames).frames) == 5


def test_large_frames_go_in_tiles(smooth, monkeypatch):
    from tessera.pipelines import frame_interpolation

    seen, plain = [], type(smooth.generator).interpolate

    def interpolate(self, *args, **options):
        seen.append(options["tile"])
        return plain(self, *args, **options)

    monkeypatch.setattr(type(smooth.generator), "interpolate", interpolate)
    monkeypatch.setattr(frame_interpolation, "TILE_FROM", 40 * 40 - 1)
    monkeypatch.setattr(frame_interpolation, "TILE", 32)
    smooth(clip(2, 40), overlap=8)
    smooth(clip(2, 36), overlap=8)
    smooth(clip(2, 40), tile=0)
    assert seen == [32, None, None]


def test_files_are_converted_frame_by_frame(smooth, tmp_path, monkeypatch):
    """However long the clip, few of its frames are in memory."""
    from tessera.pipelines import frame_interpolation

    save_video(clip(10, 32), tmp_path / "in.mp4", 10)
    alive, counts, plain = weakref.WeakSet(), [], frame_interpolation._tensor

    def tensor(pixels):
        frame = plain(pixels)
        alive.add(frame)
        counts.append(len(alive))
        return frame

    monkeypatch.setattr(frame_interpolation, "_tensor", tensor)
    done = []
    paths = (tmp_path / "in.mp4", tmp_path / "out.mp4")
    written = smooth.convert(*paths, 2, callback=lambda *at: done.append(at))
    assert written == (19, 20.0) and done == [(n, 19) for n in range(1, 20)]
    assert len(counts) == 10 and max(counts) <= 4
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert (reader.num_frames, reader.frame_rate) == (19, 20.0)
        assert abs(reader.duration - 0.95) < 0.01

    def stop(n, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smooth.convert(tmp_path / "in.mp4", tmp_path / "stopped.mp4", callback=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_pictures_are_joined(smooth, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 14), colour).save(tmp_path / f"{name}.png")
    sources = [tmp_path / "a.png", tmp_path / "b.png"]
    assert smooth.convert(sources, tmp_path / "ab.webp", 4) == (5, 32.0)
    assert load_video(tmp_path / "ab.webp").frames.shape == (3, 5, 14, 20)


def variable(path):
    """An MP4 whose frames last 40 ms or 100 ms in turn; and one by one irregular."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        from fractions import Fraction

        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        at = 0
        for k in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * k, np.uint8), "rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            at += 37 + (k * k * 13) % 61
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_bad_clips(smooth, tmp_path):
    still, out = tmp_path / "still.png", tmp_path / "out.mp4"
    Image.new("RGB", (16, 16)).save(still)
    with pytest.raises(InputError, match="it is a picture"):
        smooth.convert(still, out)
    save_video(clip(1, 16), tmp_path / "one.mp4", 8)
    with pytest.raises(InputError, match="one frame"):
        smooth.convert(tmp_path / "one.mp4", out)
    variable(tmp_path / "phone.mp4")
    with pytest.raises(InputError, match=r"variable frame rate, .* even rate"):
        smooth.convert(tmp_path / "phone.mp4", out)
    frames, rate = smooth.convert(tmp_path / "phone.mp4", out, input_frame_rate=10)
    assert rate == 20 and frames > 3
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match="not an MP4"):
        smooth.convert(tmp_path / "text.mp4", out)
    save_video(clip(3, 16), tmp_path / "in.mp4", 8)
    for options, message in (
        ({"factor": 1}, "2 or more, got 1"),
        ({"factor": 64}, "at most 240"),
        ({"tile": 33}, "multiple of 32"),
    ):
        with pytest.raises(InputError, match=message):
            smooth.convert(tmp_path / "in.mp4", out, **options)
    with pytest.raises(InputError, match="must end in"):
        smooth.convert(tmp_path / "in.mp4", tmp_path / "out.txt")
    with pytest.raises(InputError, match="one size"):
        list(smooth.stream([clip(1, 16)[:, 0], clip(1, 20)[:, 0]]))
    with pytest.raises(InputError, match="two frames or more"):
        list(smooth.stream([clip(1, 16)[:, 0]]))
    with pytest.raises(InputError, match="two frames or more"):
        list(smooth.stream([]))


def test_saved_interpolators_load(smooth, tmp_path):
    frames = clip(2, 32)
    expected = smooth(frames, output_type="pt").frames
    smooth.save_pretrained(tmp_path / "pipeline")
    smooth.generator.save_pretrained(tmp_path / "model")
    for name in ("pipeline", "model"):
        again = FrameInterpolationPipeline.from_pretrained(tmp_path / name)
        assert torch.equal(again(frames, output_type="pt").frames, expected)


# --- Reconstruction ---


def test_clips_of_any_length_are_reconstructed(tmp_path):
    tokenizer = tiny_causal_tokenizer()
    save_video(clip(7, 24, channels=4), tmp_path / "a.webp", 10)
    done = []
    output = ReconstructionPipeline(tokenizer)(
        [tmp_path / "a.webp", clip(1)], callback=lambda *at: done.append(at)
    )
    assert [video.shape for video in output.videos] == [(3, 7, 16, 16), (3, 1, 16, 16)]
    assert [len(tokens) for tokens in output.tokens] == [12, 4] and done == [(1, 2), (2, 2)]
    assert output.frame_rates == [10, 8]
    again = tokenizer.decode(output.tokens[0][None])[0, :, :7].clamp(-1, 1)
    assert torch.equal(output.videos[0], again)
    error = (again - output.originals[0]).square().mean()
    assert output.psnr[0] == pytest.approx(float(10 * torch.log10(4 / error)), abs=1e-3)
    with pytest.raises(InputError, match="neither num_tokens"):
        ReconstructionPipeline(tokenizer)(clip(1), num_tokens=[1])
    with pytest.raises(InputError, match="A clip has the shape"):
        ReconstructionPipeline(tokenizer)(clip(1)[0])


def test_tokenizers_of_one_length_take_clips_in_pieces():
    tokenizer = tiny_class_video().tokenizer
    output = ReconstructionPipeline(tokenizer)(clip(6, 8))
    assert output.videos[0].shape == (3, 6, 8, 8) and len(output.tokens[0]) == 12
