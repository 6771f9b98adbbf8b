"""Every family of generator behind the two pipelines: seeds, stopping, editing, loading, bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer as TextTokenizer
from tokenizers import models, pre_tokenizers, processors

from tessera import ClassToImagePipeline, TextToImagePipeline
from tessera.generators.auto import AutoGenerator
from tessera.generators.conditioning.t5 import TextT5
from tessera.modalities.errors import InputError
from tessera.modalities.image import to_pil, to_tensor
from tessera.pipelines.auto import load_image_pipeline
from tessera.pipelines.class_names import find_class, imagenet_names
from tessera.pipelines.editing import Blend, blends
from tessera.pipelines.seeds import seed_generators
from tessera.tests.tiny import (
    GRID,
    tiny_class_pipeline,
    tiny_grid_tokenizer,
    tiny_maskgen_pipeline,
    tiny_pipeline,
    tiny_tokenizer,
)
from tessera.weights import registry
from tessera.weights.registry import ModelInfo, list_models, model_info

CLASS = ("flexar", "rar", "maskgit", "enat", "tokenbridge", "var", "flowar", "xar", "himar")
GRIDS = CLASS[1:]
TEXT = ("maskgen-vq", "maskgen-kl")


@cache
def build(family: str):
    if family == "sticker":
        pipe = tiny_pipeline()
    elif family in TEXT:
        pipe = tiny_maskgen_pipeline(family.removeprefix("maskgen-"))
    else:
        pipe = tiny_class_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(request):
    return build(request.param)


def families(*names):
    return pytest.mark.parametrize("pipe", names, indirect=True, ids=names)


def same(a, b):
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def draw(pipe, condition="blue ring", seed=5, count=1, **options):
    return pipe(
        condition, generator=seed_generators(seed, count), num_images_per_prompt=count, **options
    )


# --- seeds, threads, steps, stopping ---


@families(*CLASS, *TEXT)
def test_an_item_is_the_same_alone_and_in_a_batch(pipe):
    three = draw(pipe, count=3)
    assert three.seeds == [5, 6, 7] and len(three.images) == 3
    assert not torch.equal(three.tokens[0], three.tokens[1])
    assert same(draw(pipe, seed=7).tokens[0], three.tokens[2])
    assert not torch.equal(draw(pipe, "red circle", count=3).tokens, three.tokens)


@families("rar", "maskgit", "var", "maskgen-kl")
def test_one_thread_and_two_draw_the_same(pipe):
    threads = torch.get_num_threads()
    try:
        tokens = []
        for count in (1, 2):
            torch.set_num_threads(count)
            tokens.append(draw(pipe).tokens)
    finally:
        torch.set_num_threads(threads)
    assert same(*tokens)


@families(*CLASS, *TEXT)
def test_steps_are_counted_and_each_can_be_seen(pipe):
    partials = list(pipe.stream("blue ring", generator=seed_generators(5, 1)))
    assert [p.step for p in partials] == list(range(1, partials[0].total + 1))
    assert [p.output is not None for p in partials] == [False] * (len(partials) - 1) + [True]
    size = (pipe.image_size, pipe.image_size)
    assert all(p.preview()[0].size == size for p in (partials[0], partials[-2], partials[-1]))
    assert same(partials[-1].output.tokens, draw(pipe).tokens)


@families("flexar", "rar", "maskgit", "var", "xar", "himar", *TEXT)
def test_stopping_leaves_a_usable_pipeline(pipe):
    whole = draw(pipe)
    stream = pipe.stream("blue ring", generator=seed_generators(5, 1))
    next(stream)
    stream.close()

    def stop(pipeline, step, timestep, values):
        pipeline._interrupt = step == 2

    stopped = draw(pipe, callback_on_step_end=stop, output_type="pt")
    assert stopped.images.shape == (1, 3, pipe.image_size, pipe.image_size)
    assert same(draw(pipe).tokens, whole.tokens)


@families("rar")
def test_unwritten_places_stay_white(pipe):
    half = draw(pipe, num_tokens=6)
    picture = np.asarray(half.images[0])
    assert half.tokens.shape == (1, 6) and (picture[8:] == 255).all()
    assert torch.equal(draw(pipe).tokens[:, :6], half.tokens)


# --- editing ---


def photo(pipe) -> Image.Image:
    pixels = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    size = (pipe.image_size, pipe.image_size)
    return to_pil(F.interpolate(pixels, size=size, mode="bilinear"))[0]


@families(*GRIDS)
def test_in_painting_keeps_tokens_and_pixels_beside_the_mask(pipe):
    picture, size = photo(pipe), pipe.image_size
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, size // 2, size // 2))  # Two by two tokens.
    edit = pipe.inpainting(picture, mask)
    out = draw(pipe, edit=edit, count=2)
    kept = edit.token_mask[0]
    assert 0 < int(kept.sum()) < len(kept)
    tokens = pipe.tokenizer.encode(to_tensor(picture))
    for i in range(2):
        assert torch.equal(out.tokens[i, kept], tokens[0, kept])
        assert not torch.equal(out.tokens[i, ~kept], tokens[0, ~kept])
        pixels = np.asarray(out.images[i])
        assert np.array_equal(pixels[size // 2 :], np.asarray(picture)[size // 2 :])
        assert not np.array_equal(pixels[: size // 2], np.asarray(picture)[: size // 2])
    assert same(draw(pipe, edit=edit, seed=6).tokens[0], out.tokens[1])


@families("maskgit", "var", "flowar")
@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_out_painting_goes_on_beyond_a_side(pipe, side):
    picture, size = photo(pipe), pipe.image_size
    cell = size // GRID
    out = draw(pipe, edit=pipe.outpainting(picture, side, 2 * cell)).images[0]
    wide = side in ("left", "right")
    assert out.size == ((size + 2 * cell, size) if wide else (size, size + 2 * cell))
    start = 2 * cell if side in ("left", "top") else 0
    place = (start, 0) if wide else (0, start)
    old = out.crop((*place, place[0] + size, place[1] + size))
    assert np.array_equal(np.asarray(old), np.asarray(picture))
    again = draw(pipe, edit=pipe.outpainting(out, side, cell)).images[0]
    assert sum(again.size) == sum(out.size) + cell


@families("flexar", "var", "sticker")
def test_a_variation_keeps_the_first_tokens(pipe):
    first = draw(pipe)
    out = draw(pipe, seed=9, edit=pipe.variation(first.tokens[0], 5))
    assert torch.equal(out.tokens[0, :5], first.tokens[0, :5])
    assert not torch.equal(out.tokens, first.tokens)
    again = draw(pipe, edit=pipe.variation(first.tokens[0], 5))
    assert torch.equal(again.tokens, first.tokens)  # The same seed goes on as it did.


@families(*CLASS, *TEXT, "sticker")
def test_blends_lead_from_one_condition_to_the_other(pipe):
    conditions = blends("red circle", "blue ring", 3)
    out = pipe(conditions, generator=[torch.Generator().manual_seed(5) for _ in range(3)])
    assert same(out.tokens[0], draw(pipe, "red circle").tokens[0])
    assert same(out.tokens[2], draw(pipe, "blue ring").tokens[0])
    middle = draw(pipe, Blend("red circle", "blue ring", 0.5))
    assert same(middle.tokens[0], out.tokens[1])


# --- loading ---


@families("maskgit", "var", "himar", "tokenbridge", *TEXT)
def test_save_and_load_draw_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = load_image_pipeline(tmp_path)
    assert type(again) is type(pipe)
    assert same(draw(again).tokens, draw(pipe).tokens)
    other = {ClassToImagePipeline: TextToImagePipeline, TextToImagePipeline: ClassToImagePipeline}
    with pytest.raises(InputError, match=r"class.*text|text.*class|Text|Class"):
        other[type(pipe)].from_pretrained(tmp_path)


def test_a_new_process_loads_a_saved_pipeline(tmp_path):
    build("maskgit").save_pretrained(tmp_path)
    program = (
        "from tessera import load_image_pipeline\n"
        f"pipe = load_image_pipeline({str(tmp_path)!r})\n"
        "print(type(pipe.generator).__name__, type(pipe.tokenizer).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["MaskGIT", "MaskGITVQGAN"], done.stderr


def test_a_folder_of_a_generator_alone_needs_its_tokenizer(tmp_path):
    pipe = build("maskgit")
    pipe.generator.save_pretrained(tmp_path / "generator")
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = load_image_pipeline(tmp_path / "generator", tokenizer=tmp_path / "tokenizer")
    assert torch.equal(draw(again, 1).tokens, draw(pipe, 1).tokens)
    with pytest.raises(InputError, match="holds a generator alone: pass its tokenizer"):
        load_image_pipeline(tmp_path / "generator")
    with pytest.raises(InputError, match="holds a MaskGITVQGAN, which is no generator"):
        AutoGenerator.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Rows of tiny generators and their tokenizer, and their files in published form."""
    pipe = build("rar")
    config = {k: v for k, v in pipe.generator.config.items() if not k.startswith("_")}
    shared = {"hub_id": "nobody/tiny", "license_code": "x", "license_weights": "y", "title": "t"}
    rows = {
        name: ModelInfo(
            name=name,
            system="rar",
            task="class-to-image",
            model="generators.autoregressive.rar:RAR",
            config=config,
            files=(f"{name}.bin",),
            tokenizer="tiny-vqgan",
            non_commercial=True,
            **shared,
        )
        for name in ("tiny-rar", "tiny-rar-2")
    }
    tokenizer_config = {k: v for k, v in pipe.tokenizer.config.items() if not k.startswith("_")}
    rows["tiny-vqgan"] = ModelInfo(
        name="tiny-vqgan",
        system="maskgit_vqgan",
        task="image-tokenizer",
        model="tokenizers.image.maskgit_vqgan:MaskGITVQGAN",
        config=tokenizer_config,
        files=("vqgan.bin",),
        **shared,
    )
    models = {**registry._models(), **rows}
    monkeypatch.setattr(registry, "_models", lambda: models)
    return tmp_path, pipe


def test_a_registered_name_downloads_converts_and_joins_the_tokenizer(published, monkeypatch):
    folder, pipe = published
    fetched = []

    def converted(info, files):
        fetched.append((info.name, [Path(file).name for file in files]))
        return {"tiny-rar": pipe.generator, "tiny-vqgan": pipe.tokenizer}[info.name]

    def download(hub_id, name, **_):
        return str(folder / name)

    monkeypatch.setattr("tessera.weights.loading.hf_hub_download", download)
    for module in ("generators.auto", "tokenizers.auto"):
        monkeypatch.setattr(f"tessera.{module}.load_published", converted)
    with pytest.warns(UserWarning, match="tiny-rar: not for commercial use"):
        loaded = load_image_pipeline("tiny-rar")
    assert fetched == [("tiny-rar", ["tiny-rar.bin"]), ("tiny-vqgan", ["vqgan.bin"])]
    assert isinstance(loaded, ClassToImagePipeline) and loaded.name == "tiny-rar"
    assert same(draw(loaded, 1).tokens, draw(pipe, 1).tokens)


def test_a_repository_of_several_models_is_not_guessed_at(published):
    with pytest.raises(InputError, match="holds several models: name one of tiny-rar, tiny-rar-2"):
        load_image_pipeline("nobody/tiny")
    assert registry.find_model("nobody/tiny", "-tokenizer").name == "tiny-vqgan"


def test_published_files_in_a_folder(tmp_path):
    """The published form of a small TiTok generator is read back through its converter."""
    name = "maskgit-titok-l-32"
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_image_pipeline(name, files=tmp_path)
    with pytest.raises(InputError, match="is a class-to-image model, not text-to-image"):
        TextToImagePipeline.from_pretrained(name)
    with pytest.raises(
        InputError, match="is a image-tokenizer model and makes no pictures from text or a class"
    ):
        load_image_pipeline("titok-l-32")


def test_every_published_generator_names_a_registered_tokenizer():
    names = list_models(task="class-to-image", shipped=False)
    names += list_models(task="text-to-image", shipped=False)
    assert len(names) >= 25
    for name in names:
        info = model_info(name)
        tokenizer = model_info(info.tokenizer)
        assert tokenizer.task == "image-tokenizer"
        assert tokenizer.vocab_size == info.vocab_size
        assert tokenizer.tokens.split("-")[-1] == info.tokens.split("-")[-1], name
        assert (info.text_tower is None) == (info.task == "class-to-image")


def test_damaged_folders_are_one_sentence(tmp_path):
    build("maskgit").save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut/generator/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut"):
        load_image_pipeline(tmp_path / "cut")
    (tmp_path / "cut/model_index.json").write_text(json.dumps({"_class_name": "os.system"}))
    with pytest.raises(InputError, match="holds no model that makes pictures"):
        load_image_pipeline(tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/generator")
    with pytest.raises(InputError, match="no-such-model"):
        load_image_pipeline("no-such-model")


# --- bad input ---


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("maskgit", "kl", "MaskGIT writes 16 tokens, ids below 24; KL16VAE decodes 16 tokens, num"),
        ("flowar", "vqgan", "numbers of width 4; MaskGITVQGAN decodes 16 tokens, ids below 24"),
        ("rar", "scales", "MultiScaleVQVAE decodes 30 tokens"),
        ("var", "vqgan", "they do not fit"),
        ("tokenbridge", "kl", "they do not fit"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(family, kind, words):
    with pytest.raises(InputError, match=words):
        ClassToImagePipeline(tiny_grid_tokenizer(kind), build(family).generator)


def test_parts_of_another_kind_are_refused():
    text = build("sticker")
    with pytest.raises(InputError, match="FlexAR draws from a text, not from a class"):
        ClassToImagePipeline(text.tokenizer, text.generator)
    with pytest.raises(InputError, match="reads text features of width 32, the text tower makes"):
        TextToImagePipeline(text.tokenizer, text.generator, tiny_t5())


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("maskgit", {"num_tokens": 4}, "MaskGIT takes no num_tokens: leave it out"),
        ("flowar", {"temperature": 1.0}, "FlowAR takes no temperature"),
        ("maskgit", {"num_inference_steps": 4}, "MaskGITVQGAN takes no num_inference_steps"),
        ("rar", {"num_tokens": 17}, "1 to 16 tokens, got 17. Use 16"),
        ("rar", {"top_k": 0}, "top_k must be"),
        ("var", {"top_p": 1.5}, "top_p must lie"),
        ("enat", {"temperature": -1.0}, "Temperature must be"),
        ("enat", {"num_steps": 0}, "1 .*step"),
        ("himar", {"num_steps": 99}, "1 to 16 steps"),
        ("flexar", {"num_inference_steps": 0}, "1 step or more, got 0"),
        ("maskgit", {"output_type": "gif"}, 'Unknown output_type "gif"'),
        ("maskgit", {"num_images_per_prompt": 0}, "at least 1, got 0"),
        ("maskgit", {"tokens": torch.full((1, 16), 24)}, "0 to 23, got 24"),
        ("flowar", {"tokens": torch.zeros(1, 16, 5)}, r"got float32 \[1, 16, 5\]"),
        ("rar", {"tokens": torch.zeros(2, 16, dtype=torch.int64)}, "of 1 pictures, got 2|1 or 1"),
    ],
)
def test_illegal_settings_are_one_sentence(family, options, words):
    with pytest.raises(InputError, match=words):
        build(family)(1, **{"generator": seed_generators(0, 1), **options})


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (5, "numbered 0 to 4, got 5"),
        ("-1", "numbered 0 to 4, got -1"),
        (
            "purple",
            'no class "purple": give a number of 0 to 4 or a name, for example "red circle"',
        ),
        ("green", "stands for 2 classes"),
        ([], "list of classes is empty"),
        (Blend(0, "purple", 0.5), 'no class "purple"'),
    ],
)
def test_classes_that_are_none(condition, words):
    with pytest.raises(InputError, match=words):
        build("maskgit")(condition)


def test_classes_by_name():
    assert [build("maskgit").class_label(c) for c in (2, "3", " Black  RING ", "circle")] == [
        2,
        3,
        4,
        0,
    ]
    names = imagenet_names()
    assert find_class("golden retriever", 1000, names) == 207
    with pytest.raises(InputError, match="sunglasses"):
        find_class("sunglasses", 1000, names)
    with pytest.raises(InputError, match="give a number of 0 to 9"):
        find_class("dog", 10, [])


def test_edits_that_are_not_possible(tmp_path):
    grid, ordered = build("maskgit"), build("flexar")
    picture = photo(grid)
    with pytest.raises(InputError, match="have no place in the picture"):
        ordered.inpainting(photo(ordered), Image.new("L", (32, 32), 255))
    with pytest.raises(InputError, match="paints over no token"):
        grid.inpainting(picture, Image.new("L", picture.size))
    with pytest.raises(InputError, match="as large as the picture, 16x16 pixels, got 8x8"):
        grid.inpainting(picture, Image.new("L", (8, 8), 255))
    with pytest.raises(InputError, match='goes on at the left, right, top, bottom, got "up"'):
        grid.outpainting(picture, "up")
    with pytest.raises(InputError, match="adds 4 to 12 pixels at once, got 16"):
        grid.outpainting(picture, "left", 16)
    with pytest.raises(InputError, match="not ordered from coarse to fine"):
        grid.variation(torch.zeros(16, dtype=torch.int64), 4)
    with pytest.raises(InputError, match="keeps 1 to 16 tokens, got 17"):
        ordered.variation(torch.zeros(16, dtype=torch.int64), 17)
    with pytest.raises(InputError, match="0 to 1, got 2"):
        Blend(0, 1, 2)
    with pytest.raises(InputError, match="2 pictures or more, got 1"):
        blends(0, 1, 1)


# --- T5 ---


def tiny_t5() -> TextT5:
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "red", "blue", "ring"])}
    tower = TextT5(
        {"vocab_size": 6, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}, 5
    )
    tower.texts = TextTokenizer(models.WordLevel(words, "<unk>"))
    tower.texts.pre_tokenizer = pre_tokenizers.Whitespace()
    tower.texts.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return tower.eval()


def test_t5_features_do_not_depend_on_the_padding(tmp_path):
    tower = tiny_t5()
    features, mask = tower.text_features(["red ring", "", "blue blue blue blue blue blue"])
    assert features.shape == (3, 5, 24) and mask.sum(1).tolist() == [3, 1, 5]
    alone, _ = tower.text_features(["red ring"])
    assert torch.allclose(alone[0], features[0, :3], atol=1e-6)
    assert (tower.text_dim, tower.context_length, tower.count_tokens("red ring")) == (24, 5, 3)
    tower.save_pretrained(tmp_path)
    again, _ = TextT5.from_pretrained(tmp_path).text_features(["red ring"])
    assert torch.equal(again, alone)


def test_flexar_draws_from_t5():
    from tessera.generators.autoregressive.flexar import FlexAR

    torch.manual_seed(1)
    generator = FlexAR(512, 16, 32, 2, 2, 64, text_dim=24).eval()
    pipe = TextToImagePipeline(tiny_tokenizer(), generator, tiny_t5())
    pipe.set_progress_bar_config(disable=True)
    out = draw(pipe, "red ring", num_tokens=4)
    assert out.tokens.shape == (1, 4) and pipe.default_num_tokens == 16
    assert pipe.prompt_report("red ring blue ring red").cut == "red"
