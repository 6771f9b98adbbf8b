"""Training of every generator over a tokenizer that fits it: loss, resume, classes, pipelines, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tessera.generators.masked.maskgen import MaskGenVQ
from tessera.modalities.datasets import ImageTextFolder
from tessera.modalities.errors import InputError
from tessera.pipelines.class_to_image import ClassToImagePipeline
from tessera.pipelines.text_to_image import TextToImagePipeline
from tessera.tests.tiny import (
    tiny_grid_tokenizer,
    tiny_maskgen_pipeline,
    tiny_pack,
    tiny_tokenizer,
)
from tessera.tests.tiny_generators import tiny_generator
from tessera.training.checkpoints import newest_checkpoint
from tessera.training.config import load_recipe
from tessera.training.generator_tasks import GENERATORS, GeneratorTask, annealed, class_names
from tessera.training.trainer import train

TWICE = {f"{part}_depth": 1 for part in ("encoder", "decoder")}
TRUNKS = {
    f"{part}_{name}": n
    for part in ("encoder", "decoder")
    for name, n in (("dim", 32), ("heads", 2))
}
SMALL = {"dim": 32, "heads": 2}
# Which tokenizer, and the sizes.
FAMILIES = {
    "rar": ("flextok", {**SMALL, "depth": 1, "mlp_hidden": 64}),
    "flexar": ("flextok", {**SMALL, "depth": 1, "mlp_hidden": 64}),
    "flexar-class": ("flextok", {**SMALL, "depth": 1, "mlp_hidden": 64}),
    "token-shuffle": ("flextok", {**SMALL, "depth": 1, "mlp_hidden": 64}),
    "tokenbridge": (
        "levels",
        {**TWICE, **TRUNKS, "head_dim": 32, "head_depth": 1, "head_heads": 2, "buffer_size": 2},
    ),
    "xar": ("kl", {**SMALL, **TWICE}),
    "maskgit": ("flextok", {**SMALL, "depth": 1, "mlp_hidden": 64, "trunk": "bert"}),
    "enat": ("flextok", {**SMALL, **TWICE, "mlp_hidden": 64}),
    "maskgen-vq": ("flextok", {**SMALL, "depth": 1, "micro_dim": 0, "unused_ids": 0}),
    "maskgen-kl": ("kl", {**SMALL, "depth": 1, "micro_dim": 0, "head_dim": 32, "head_depth": 1}),
    "himar": (
        "kl",
        {**TWICE, **TRUNKS, "buffer_size": 2, "head_dim": 32, "head_depth": 1}
        | {"dit_dim": 32, "dit_depth": 1, "dit_heads": 2},
    ),
    "var": ("scales", {**SMALL, "depth": 1}),
    "flowar": ("kl", {**SMALL, **TWICE, "flow_dim": 64, "flow_depth": 1}),
}
# So that samples of a few pictures take no time.
SAMPLING = {
    "maskgen-kl": {"num_steps": 2, "diffusion_steps": 2},
    "himar": {"num_steps": 1, "pivot_steps": 1, "diffusion_steps": 2, "pivot_diffusion_steps": 2},
    "xar": {"num_steps": 2},
    "flowar": {"num_steps": 2},
    "tokenbridge": {"num_steps": 2},
    "maskgen-vq": {"num_steps": 2},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """The tiny pack, tokenizers of every kind, and a text tower."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_pack(folder / "pack")
    tiny_tokenizer().save_pretrained(folder / "flextok")
    for kind in ("kl", "levels", "scales"):
        tiny_grid_tokenizer(kind).save_pretrained(folder / kind)
    tiny_maskgen_pipeline("vq").clip.save_pretrained(folder / "clip")
    return folder


@pytest.fixture
def recipe_of(parts, tmp_path):
    """(generator, output, **overrides) -> a tiny recipe that writes to ``tmp_path / output``."""

    def make(name: str, output: str = "run", **overrides):
        tokenizer, sizes = FAMILIES[name]
        settings = {
            "generator": name,
            "output": tmp_path / output,
            "tokenizer": parts / tokenizer,
            "clip": parts / "clip",
            "data.root": parts / "pack",
            "model": json.dumps(sizes),
            "sampling": json.dumps(SAMPLING.get(name, {})),
            "prompts": "[red circle]",
            "training.precision": "fp32",
            "training.steps": 4,
            "training.batch_size": 4,
            "training.warmup": 1,
            "training.log_every": 1,
            "training.save_every": 2,
            "training.sample_every": 100,
            **overrides,
        }
        return load_recipe("sticker-masked", [f"{key}={value}" for key, value in settings.items()])

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(run) / "model.safetensors")


def test_every_generator_is_tried():
    assert set(FAMILIES) == set(GENERATORS)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_short_run_lowers_the_loss(recipe_of, tmp_path, name):
    """The loss of one fixed batch before and after 12 steps; the model loads and has drawn pictures."""
    steps = {"training.steps": 12, "training.lr": 0.005, "training.batch_size": 8}
    recipe = recipe_of(name, **steps, **{"training.save_every": 12, "training.log_every": 12})
    torch.manual_seed(recipe["seed"])
    task = GeneratorTask(recipe, torch.device("cpu"))
    batch = task.batch(0, 32, torch.Generator().manual_seed(5), slice(None))

    def loss(model) -> float:
        with torch.no_grad():
            draws = []
            for seed in range(4):
                torch.manual_seed(seed)
                draws.append(float(model.eval()(**batch)[0]))
        return sum(draws) / len(draws)

    before = loss(task.model)
    folder = train(recipe)
    trained = type(task.model).from_pretrained(folder)
    trained.load_state_dict(weights(tmp_path / "run"))
    assert loss(trained) < before
    trained.check_tokenizer(task.tokenizer)
    with Image.open(tmp_path / "run" / "samples" / "000012.png") as grid:
        assert min(grid.size) > 10
    if trained.condition == "class":
        assert json.loads((folder / "classes.json").read_text("utf8")) == ["symbols"]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_interrupted_and_resumed_equals_uninterrupted(recipe_of, tmp_path, monkeypatch, name):
    train(recipe_of(name, "whole"))
    torch.manual_seed(99)  # Whatever state a new process begins with.
    original = GeneratorTask.batch

    def batch(self, number, *rest):
        if number == 3:
            raise InterruptedError
        return original(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GeneratorTask, "batch", batch)
        with pytest.raises(InterruptedError):
            train(recipe_of(name, "parts"))
    before = weights(tmp_path / "parts")
    train(recipe_of(name, "parts"), resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    assert any(not torch.equal(before[key], parts[key]) for key in before)


def test_classes_are_folders_groups_or_captions(tmp_path, parts):
    for name in ("cats/a.png", "cats/b.png", "dogs/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert class_names(ImageTextFolder(tmp_path)) == ["cats", "cats", "dogs"]
    Image.new("RGB", (8, 8)).save(tmp_path / "red_bird.png")
    assert class_names(ImageTextFolder(tmp_path)) == ["a", "b", "c", "red bird"]


def test_published_schedules():
    rar, himar = tiny_generator("rar").model, tiny_generator("himar").model
    ratios = [annealed(rar, progress)["random_ratio"] for progress in (0, 0.5, 0.625, 0.75, 1)]
    assert ratios == [1, 1, 0.5, 0, 0]
    rates = [annealed(himar, progress)["pivot_rate"] for progress in (0, 0.0625, 0.125, 1)]
    assert rates == [0, 0.125, 0.25, 0.25]


def test_trained_generators_become_pipelines(recipe_of, tmp_path, parts):
    for name, kind, options in (
        ("maskgen-vq", TextToImagePipeline, {"styles": "3d"}),
        ("maskgit", ClassToImagePipeline, {}),
    ):
        folder = train(recipe_of(name, name, **{"training.steps": 1}))
        settings = {"generator": folder, "tokenizer": parts / "flextok", "clip": parts / "clip"}
        settings |= {"output": tmp_path / f"{name}-pipeline", "dtype": "fp32"}
        settings["pipeline"] = json.dumps(options)
        train(load_recipe("sticker", [f"{key}={value}" for key, value in settings.items()]))
        pipeline = kind.from_pretrained(tmp_path / f"{name}-pipeline")
        prompt = "symbols" if kind is ClassToImagePipeline else "red circle"
        assert pipeline(prompt, num_steps=2).images[0].size == (32, 32)


def test_incomplete_weights_are_refused(recipe_of, tmp_path, parts):
    """Diffusers only warns of weights that are missing, and leaves them empty."""
    tiny_maskgen_pipeline("vq").clip.save_pretrained(tmp_path / "clip")
    file = next((tmp_path / "clip").glob("*.safetensors"))
    state = load_file(file)
    state.pop("model.text_projection")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match=r'"model\.text_projection" is missing'):
        train(recipe_of("maskgen-vq", clip=tmp_path / "clip"))


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("maskgit", {"generator": "gan"}, 'Unknown generator "gan": choose from rar, '),
        ("maskgit", {"tokenizer": "nowhere"}, 'Unknown tokenizer "nowhere"'),
        ("maskgit", {"tokenizer": "{parts}/kl"}, "writes ids, which a KL16VAE does not make"),
        (
            "xar",
            {"tokenizer": "{parts}/flextok"},
            "continuous tokens, which a FlexTok does not make",
        ),
        ("var", {"tokenizer": "{parts}/flextok"}, "cannot be trained over a FlexTok"),
        ("maskgit", {"model": "{width: 3}"}, "does not fit MaskGIT"),
        ("maskgit", {"model": "{num_tokens: 9}"}, "they do not fit"),
        ("maskgen-vq", {"clip": "nowhere"}, 'No TextImageCLIP could be loaded from "nowhere"'),
    ],
)
def test_what_does_not_fit_is_refused(recipe_of, tmp_path, parts, name, overrides, words):
    overrides = {key: value.replace("{parts}", str(parts)) for key, value in overrides.items()}
    with pytest.raises(InputError, match=words) as caught:
        train(recipe_of(name, **overrides))
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_the_text_is_read(recipe_of):
    """Captions, and the empty one for some, reach the batch."""
    torch.manual_seed(0)
    task = GeneratorTask(recipe_of("maskgen-vq"), torch.device("cpu"))
    batch = task.batch(0, 64, torch.Generator().manual_seed(0), slice(None))
    assert isinstance(task.model, MaskGenVQ) and batch["pooled"].shape == (64, 32)
    null = task.model.text_condition(task.clip, [""], [])["pooled"]
    empty = torch.isclose(batch["pooled"].float(), null, atol=2e-2).all(1)
    assert 0 < int(empty.sum()) < 20
