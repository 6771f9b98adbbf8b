"""The shipped model of moving stickers: clips that show what they are asked for, move, and repeat."""

from __future__ import annotations

import json

import pytest
import torch

from tessera.evaluation.metrics import psnr
from tessera.evaluation.video import motion
from tessera.pipelines.frame_interpolation import FrameInterpolationPipeline
from tessera.pipelines.text_to_video import TextToVideoPipeline
from tessera.weights.registry import SHIPPED, model_info

PROMPTS = {
    "red heart pulsing": "red heart",
    "rocket rising up": "rocket",
    "yellow star shaking": "star",
    "pizza bouncing": "pizza",
    "a butterfly flapping": "butterfly",
    "snowman dancing": "snowman",
}


@pytest.fixture(scope="module")
def pipe() -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained("animated-sticker")


@pytest.fixture(scope="module")
def clips(pipe) -> torch.Tensor:
    return torch.cat([pipe(p, seed=0, output_type="pt").frames for p in PROMPTS])


def test_clips_show_what_was_asked_for(pipe, clips):
    """The middle frame is nearer to its own words than to most others'."""
    words = pipe.clip.encode_text(list(PROMPTS.values())).float()
    seen = pipe.clip.encode_image(clips[:, :, clips.shape[2] // 2]).float()
    ranks = (seen @ words.T).argsort(dim=1, descending=True)
    found = (ranks[:, :2] == torch.arange(len(PROMPTS))[:, None]).any(1)
    assert int(found.sum()) >= 4


def test_clips_move(clips):
    assert clips.shape == (len(PROMPTS), 3, 16, 64, 64)
    for clip in clips:
        assert motion(clip) > 0.005
        assert float(clip.std()) > 0.1


def test_the_same_seed_gives_the_same_clip_on_any_threads(pipe):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = pipe("pizza bouncing", num_frames=5, seed=11)
        torch.set_num_threads(2)
        two = pipe("pizza bouncing", num_frames=5, seed=11)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.tokens[0], two.tokens[0])


def test_the_first_frame_may_come_from_the_generator(pipe):
    own = TextToVideoPipeline.from_pretrained("animated-sticker", first_frame=None)
    painted, drawn = (
        p("red heart pulsing", num_frames=5, seed=0, output_type="pt").frames for p in (pipe, own)
    )
    assert not torch.equal(painted[:, :, 0], drawn[:, :, 0])
    index = json.loads((SHIPPED / "animated-sticker" / "model_index.json").read_text())
    assert index["first_frame"] == "sticker"


def test_lingen_goes_on_from_the_frame_that_sticker_draws(clips):
    """And makes clips longer than those it was trained on."""
    lingen = TextToVideoPipeline.from_pretrained("animated-sticker-lingen")
    assert model_info("animated-sticker-lingen").license_weights == "Apache-2.0"
    made = [lingen("red heart pulsing", 33, seed=0, output_type="pt").frames for _ in range(2)]
    assert made[0].shape == (1, 3, 33, 64, 64) and torch.equal(*made)
    assert motion(made[0][0]) > 0.005
    first = made[0][0, :, 0]
    assert float((first - clips[0, :, 0]).abs().mean()) < 0.1
    # The heart stays red and the ground white.
    middle = made[0][0, :, 16]
    assert (
        float(middle[:, 28:36, 28:36].mean((1, 2))[0]) > float(middle[:, 28:36, 28:36].mean()) + 0.3
    )
    assert float(middle[:, :6, :6].mean()) > 0.7


def test_frames_between_are_better_than_the_mean():
    """A disc that moves by six pixels over a still pattern: nothing like it was trained on."""
    pipe = FrameInterpolationPipeline.from_pretrained("interpolation")
    axis = torch.linspace(-1, 1, 96)
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def frame(at: float) -> torch.Tensor:
        ground = torch.stack([(9 * x).sin() * (7 * y).cos(), (5 * x + 3 * y).sin(), (8 * y).cos()])
        inside = ((x - at) ** 2 + (y - at / 2) ** 2 < 0.15)[None]
        texture = torch.stack([(20 * (x - at)).sin(), 0.8 - y, (11 * (y - at / 2)).cos()])
        return torch.where(inside, texture, 0.6 * ground).clamp(-1, 1)

    first, truth, last = (frame(at) for at in (-0.0625, 0.0, 0.0625))

    def decibels(made: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(psnr(made[None], wanted[None]))

    made = list(pipe.stream([first, last]))[1]
    assert decibels(made, truth) > decibels((first + last) / 2, truth) + 2
    assert decibels(list(pipe.stream([first, first]))[1], first) > 40
