"""Pipelines over tiny models: what a call returns, seeds, streaming, stopping, files, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tessera import ReconstructionPipeline, TextToImagePipeline
from tessera.modalities.errors import InputError
from tessera.pipelines.seeds import item_seeds, seed_generators
from tessera.tests.tiny import tiny_clip, tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_one_sentence_one_picture(pipe):
    out = pipe("red circle", generator=seeds(7))
    assert [image.size for image in out.images] == [(32, 32)]
    assert out.tokens.shape == (1, 8) and out.tokens.dtype == torch.int64
    assert out.seeds == [7]
    images, tokens, used = pipe("red circle", generator=seeds(7), return_dict=False)
    assert images == out.images and torch.equal(tokens, out.tokens) and used == [7]


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("pil", lambda x: isinstance(x[0], Image.Image) and len(x) == 2),
        ("np", lambda x: isinstance(x, np.ndarray) and x.shape == (2, 32, 32, 3) and x.min() >= 0),
        ("pt", lambda x: x.shape == (2, 3, 32, 32) and x.min() >= -1 and x.max() <= 1),
        ("tokens", lambda x: x is None),
    ],
)
def test_output_types(pipe, kind, check):
    assert check(pipe(["red circle", "blue ring"], output_type=kind, generator=seeds(1, 2)).images)


def test_an_item_is_the_same_alone_and_in_a_batch(pipe):
    four = pipe("red circle", num_images_per_prompt=4, generator=seed_generators(3, 4))
    assert four.seeds == [3, 4, 5, 6]
    for i in range(4):
        one = pipe("red circle", generator=seeds(3 + i))
        assert torch.equal(one.tokens[0], four.tokens[i])
        difference = np.asarray(one.images[0], int) - np.asarray(four.images[i], int)
        assert abs(difference).max() <= 2


def test_prompts_and_pictures_per_prompt_come_in_order(pipe):
    out = pipe(["red circle", "blue ring"], num_images_per_prompt=2, generator=seeds(1, 2, 1, 2))
    red = pipe("red circle", num_images_per_prompt=2, generator=seeds(1, 2))
    assert torch.equal(out.tokens[:2], red.tokens)
    assert not torch.equal(out.tokens[2:], red.tokens)


def test_a_single_generator_is_split_by_item():
    first = item_seeds(torch.Generator().manual_seed(5), 1)
    assert item_seeds(torch.Generator().manual_seed(5), 3)[:1] == first
    used = torch.Generator().manual_seed(5)
    assert item_seeds(used, 1) == first and item_seeds(used, 1) != first
    assert item_seeds(seeds(5), 1) == [5]


def test_style_and_negative_prompt_change_the_tokens(pipe):
    plain = pipe("red circle", generator=seeds(0)).tokens
    assert not torch.equal(pipe("red circle", style="3d", generator=seeds(0)).tokens, plain)
    negative = pipe("red circle", negative_prompt="blue ring", generator=seeds(0)).tokens
    assert not torch.equal(negative, plain)
    named = pipe("red circle, 3d", generator=seeds(0)).tokens
    assert torch.equal(pipe("red circle", style="3d", generator=seeds(0)).tokens, named)


def test_embeddings_in_place_of_the_prompt(pipe):
    embeds, _ = pipe.clip.text_features(["red circle"])
    out = pipe("anything", prompt_embeds=embeds, generator=seeds(0))
    assert torch.equal(out.tokens, pipe("red circle", generator=seeds(0)).tokens)


def test_stream_yields_each_token_and_ends_with_the_output(pipe):
    partials = list(pipe.stream("red circle", num_tokens=5, generator=seeds(0)))
    assert [(p.step, p.total, p.tokens.shape[1]) for p in partials] == [
        (i, 5, i) for i in range(1, 6)
    ]
    assert all(p.output is None for p in partials[:-1])
    whole = pipe("red circle", num_tokens=5, generator=seeds(0))
    assert torch.equal(partials[-1].output.tokens, whole.tokens)
    assert partials[2].preview()[0].size == (32, 32)


def test_closing_a_stream_and_interrupting_leave_the_pipeline_usable(pipe):
    expected = pipe("red circle", generator=seeds(0)).tokens
    stream = pipe.stream("red circle", generator=seeds(0))
    next(stream)
    stream.close()

    def stop(pipeline, step, timestep, values):
        assert values["tokens"].shape == (1, step)
        pipeline._interrupt = step == 3
        return {}

    stopped = pipe("red circle", generator=seeds(0), callback_on_step_end=stop)
    assert torch.equal(stopped.tokens, expected[:, :3]) and len(stopped.images) == 1
    assert torch.equal(pipe("red circle", generator=seeds(0)).tokens, expected)


def test_going_on_from_given_tokens(pipe):
    whole = pipe("red circle", generator=seeds(0)).tokens
    again = pipe("red circle", tokens=whole[:, :4], generator=seeds(0)).tokens
    assert torch.equal(again, whole)


def test_prompt_report_names_what_is_cut(pipe):
    assert pipe.prompt_report("red circle").cut == ""
    report = pipe.prompt_report("red circle " * 20)
    assert report.words == 40 and report.kept and report.cut
    assert f"{report.kept} {report.cut}".split() == ["red", "circle"] * 20
    assert pipe.clip.count_tokens(report.kept) <= report.limit
    long = pipe("red circle " * 20, generator=seeds(0)).tokens
    assert torch.equal(long, pipe(report.kept, generator=seeds(0)).tokens)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "  "}, "The prompt is empty"),
        ({"prompt": []}, "list of prompts is empty"),
        ({"prompt": "x" * 2001}, "2,001 characters"),
        ({"prompt": "a", "height": 64}, "32x32 pictures, got 64"),
        ({"prompt": "a", "style": "oil"}, 'Unknown style "oil": choose from 3d, flat'),
        ({"prompt": "a", "num_images_per_prompt": 0}, "at least 1, got 0"),
        ({"prompt": "a", "num_tokens": 17}, "1 to 16 tokens, got 17. Use 16"),
        ({"prompt": "a", "num_tokens": 0}, "got 0. Use 1"),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, "1 prompts need as many"),
        ({"prompt": "a", "output_type": "gif"}, 'Unknown output_type "gif"'),
        ({"prompt": "a", "temperature": -1}, "Temperature"),
        ({"prompt": "a", "generator": seeds(1, 2)}, "1 pictures need 1 generators"),
        ({"prompt": "a", "tokens": torch.full((1, 3), 512)}, "0 to 511, got 512"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 3, 5)}, r"got \[1, 3, 5\]"),
    ],
)
def test_bad_arguments_are_one_sentence(pipe, arguments, words):
    with pytest.raises(InputError, match=words):
        pipe(**arguments)


def test_save_load_same_picture(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    first, second = (p("red circle", generator=seeds(7)).images[0] for p in (pipe, again))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_unusable_models_are_one_sentence(pipe, tmp_path):
    with pytest.raises(InputError, match="no-such-model"):
        TextToImagePipeline.from_pretrained("no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        TextToImagePipeline.from_pretrained(tmp_path / "empty")
    pipe.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut/generator/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut"):
        TextToImagePipeline.from_pretrained(tmp_path / "cut")
    tiny_clip().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="other"):
        TextToImagePipeline.from_pretrained(tmp_path / "other")


def test_reconstruction_at_prefix_lengths(pipe, tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), "red").save(path)
    reconstruct = ReconstructionPipeline(pipe.tokenizer)
    done = []
    out = reconstruct(path, num_tokens=[1, 4, 16], callback=lambda i, n: done.append((i, n)))
    assert list(out.reconstructions) == [1, 4, 16] and done == [(1, 3), (2, 3), (3, 3)]
    assert out.tokens.shape == (1, 16)
    assert all(len(values) == 1 for values in out.psnr.values())
    again = reconstruct(path, num_tokens=[4])
    assert again.psnr[4] == out.psnr[4]
    assert list(reconstruct(path).reconstructions) == [1, 2, 4, 8, 16]
    with pytest.raises(InputError, match="1 to 16 tokens, got 17"):
        reconstruct(path, num_tokens=[17])
    with pytest.raises(InputError, match="nothing"):
        reconstruct(tmp_path / "nothing.png")


def test_reconstruction_pipeline_by_folder(pipe, tmp_path):
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    by_folder = ReconstructionPipeline.from_pretrained(tmp_path / "tokenizer")
    pipe.save_pretrained(tmp_path / "pipeline")
    by_pipeline = ReconstructionPipeline.from_pretrained(tmp_path / "pipeline")
    picture = Image.new("RGB", (32, 32), "blue")
    expected = ReconstructionPipeline(pipe.tokenizer)(picture).tokens
    assert torch.equal(by_folder(picture).tokens, expected)
    assert torch.equal(by_pipeline(picture).tokens, expected)
    config = tmp_path / "tokenizer/config.json"
    row = json.loads(config.read_text(encoding="utf8"))
    config.write_text(json.dumps({**row, "_class_name": "os.system"}), encoding="utf8")
    with pytest.raises(InputError, match=r"os\.system"):
        ReconstructionPipeline.from_pretrained(tmp_path / "tokenizer")
