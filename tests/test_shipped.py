"""The shipped models themselves: complete, small, and the same picture whichever way it is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tessera import ReconstructionPipeline, TextToImagePipeline
from tessera.pipelines.seeds import seed_generators
from tessera.weights.registry import list_models, model_info

PROMPTS = [
    "a red heart with an arrow",
    "red apple",
    "cat face",
    "rocket, flat",
    "a green tree",
    "yellow star",
    "fish, twemoji",
    "pizza",
    "snowman",
    "ein roter Apfel",
    "sun behind cloud, 3d",
    "a sleepy fox",
    "musical note",
    "house with garden",
    "dog",
    "birthday cake",
    "umbrella, gradient",
    "crying face",
    "key",
    "🚀",
]

# A line that the licence of some of the data asks for.
ATTRIBUTION = {
    "sticker": "Twemoji",
    "animated-sticker": "Animated Noto Emoji (c) Google",
    "animated-sticker-lingen": "Animated Noto Emoji (c) Google",
    "interpolation": "Animated Noto Emoji (c) Google",
    "sound": "FluidR3 GM (c) Frank Wen",
    "voice": "Carnegie Mellon University Flite",
}


# Task, size in MB that it must stay under, and what its card must say of its data.
PACKAGES = {
    "animated-sticker": ("text-to-video", 40, ("Animated Noto Emoji (c) Google, CC BY 4.0",)),
    "sound": ("text-to-sound", 15.5, ("FluidR3 GM (c) Frank Wen", "CC BY 3.0")),
    "voice": ("text-to-speech", 24.5, ("CC0", "Carnegie Mellon University Flite")),
}


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained("sticker")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", list_models(shipped=True))
def test_a_shipped_model_is_complete_and_safe(name):
    info = model_info(name)
    files = [path for path in info.folder.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files}
    assert suffixes <= {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in files) < 60 * 2**20
    card = (info.folder / "README.md").read_text(encoding="utf8")
    for part in ("## Data", "## Training", "## Results", "## Limits", ATTRIBUTION[name]):
        assert part in card
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118 (it is no dict)
                    assert weights.get_tensor(key).isfinite().all(), f"{path} {key}"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_says_what_it_is(name):
    task, megabytes, words = PACKAGES[name]
    info = model_info(name)
    assert (info.task, info.license_weights) == (task, "Apache-2.0")
    card = (info.folder / "README.md").read_text(encoding="utf8")
    assert all(each in card for each in words)
    assert sum(path.stat().st_size for path in info.folder.rglob("*")) < megabytes * 1e6


def test_the_same_seed_gives_the_same_tokens_alone_in_a_batch_and_on_any_threads(pipe):
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(pipe(PROMPTS, generator=seed_generators(11, len(PROMPTS))))
        generators = seed_generators(11, len(PROMPTS))
        alone = [pipe(p, generator=[g]) for p, g in zip(PROMPTS, generators, strict=True)]
    finally:
        torch.set_num_threads(threads)
    together = runs[0]
    assert torch.equal(runs[1].tokens, together.tokens)
    assert torch.equal(torch.cat([out.tokens for out in alone]), together.tokens)
    pixels = np.stack([np.asarray(image, int) for image in together.images])
    for other in (runs[1].images, [out.images[0] for out in alone]):
        difference = np.stack([np.asarray(image, int) for image in other]) - pixels
        assert abs(difference).max() <= 2


def test_prompts_and_seeds_matter(pipe):
    out = pipe(PROMPTS[:4], generator=[torch.Generator().manual_seed(0) for _ in range(4)])
    assert len({tuple(row) for row in out.tokens.tolist()}) == 4
    out = pipe(PROMPTS[0], num_images_per_prompt=4, generator=seed_generators(0, 4))
    assert len({tuple(row) for row in out.tokens.tolist()}) == 4


def test_save_load_same_picture(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    first, second = (
        p("cat face", generator=seed_generators(7, 1)).images[0] for p in (pipe, again)
    )
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_more_tokens_keep_more_of_a_picture_it_made(pipe):
    picture = pipe("red apple", generator=seed_generators(0, 1)).images[0]
    psnr = ReconstructionPipeline(pipe.tokenizer)(picture, num_tokens=[1, 8, 64]).psnr
    assert psnr[1][0] < psnr[8][0] < psnr[64][0]
