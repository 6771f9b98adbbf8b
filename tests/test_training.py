"""Recipes, and training that resumes, splits, accumulates and stops without a loss."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tessera.generators.autoregressive.flexar import FlexAR
from tessera.generators.conditioning.clip import TextImageCLIP
from tessera.modalities.datasets import ImageTextFolder, StickerPack
from tessera.modalities.errors import InputError
from tessera.tests.tiny import COLOURS, streams, tiny_clip, tiny_pack, tiny_pipeline, tiny_tokenizer
from tessera.tokenizers.image.flextok import FlexTok
from tessera.training import checkpoints
from tessera.training.captions import open_captions
from tessera.training.checkpoints import newest_checkpoint
from tessera.training.config import list_recipes, load_recipe
from tessera.training.registry import TASKS
from tessera.training.tasks import FlexARTask, FlexTokTask, shuffled_index
from tessera.training.trainer import check_settings, learning_rate, train

COMMON = {
    "training.precision": "fp32",
    "training.steps": 4,
    "training.batch_size": 4,
    "training.warmup": 2,
    "training.log_every": 1,
    "training.save_every": 2,
    "training.sample_every": 4,
}
FLEXTOK = {
    "start": "random",
    "image_size": 32,
    "model.num_registers": 16,
    "model.encoder_dim": 64,
    "model.encoder_depth": 1,
    "model.decoder_dim": 64,
    "model.decoder_depth": 1,
    "loss.lengths": "[1, 4, 16]",
    "loss.weights": "[1, 1, 1]",
}
DECODER = {"image_size": 32, "loss.lengths": "[4, 16]", "loss.weights": "[1, 1]"}
FLEXAR = {"model.dim": 32, "model.depth": 2, "model.heads": 2, "model.mlp_hidden": 64}
FLEXAR |= {"loss.lengths": "[8, 16]", "loss.weights": "[1, 1]", "model.embedding_dropout": 0.2}
CLIP = {
    "image_size": 32,
    "model.embed_dim": 16,
    "model.vision_cfg": "{image_size: 32, patch_size: 8, width: 32, layers: 1, head_width: 16}",
    "model.text_cfg": "{context_length: 16, vocab_size: 320, width: 32, heads: 2, layers: 1}",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with the tiny pack, and the tiny models saved as a run would leave them."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_pack(folder / "pack")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.vae.save_pretrained(folder / "vae")
    tiny_clip().save_pretrained(folder / "clip")
    return folder


@pytest.fixture
def recipe_of(parts, tmp_path):
    """(kind, output, **overrides) -> a tiny recipe that writes to ``tmp_path / output``."""

    def make(kind: str, output: str = "run", **overrides):
        name, settings = {
            "flextok": ("sticker-tokenizer", FLEXTOK | {"vae": parts / "vae"}),
            "flextok under components": (
                "sticker-tokenizer",
                FLEXTOK
                | {
                    "vae": parts / "vae",
                    "start": "components",
                    "model.decoder_dim": 128,
                    "model.decoder_depth": 2,
                },
            ),
            "flexar": (
                "sticker-generator",
                FLEXAR | {"tokenizer": parts / "tokenizer", "clip": parts / "clip"},
            ),
            "clip": ("sticker-clip", CLIP),
            "decoder": ("sticker-decoder", DECODER | {"tokenizer": parts / "tokenizer"}),
        }[kind]
        settings = {"data.root": parts / "pack", **COMMON, **settings, **overrides}
        settings["output"] = tmp_path / output
        return load_recipe(name, [f"{key}={value}" for key, value in settings.items()])

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every parameter and its average in a run's newest checkpoint."""
    folder = newest_checkpoint(run)
    assert folder is not None
    return {
        f"{part}/{key}": value
        for part in ("model", "ema")
        for key, value in load_file(folder / f"{part}.safetensors").items()
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[key] - b[key]).abs().max()) for key in a)


class Stop(Exception):
    pass


def stop_at(monkeypatch, task: type, index: int, action) -> None:
    """Run ``action`` when batch ``index`` is made."""
    original = task.batch

    def batch(self, number, *rest):
        if number == index:
            action()
        return original(self, number, *rest)

    monkeypatch.setattr(task, "batch", batch)


def stop() -> None:
    raise Stop


# Recipes


@pytest.mark.parametrize(
    "name", [name for name in list_recipes() if load_recipe(name)["task"] != "pipeline"]
)
def test_shipped_recipes_load_in_both_sizes(name):
    small, large = load_recipe(name), load_recipe(name, ["size=gpu"])
    assert small == load_recipe(name, ["size=cpu"]) and "sizes" not in small
    assert small["task"] in TASKS
    check_settings(small)
    check_settings(large)
    assert large["training"]["steps"] > small["training"]["steps"]
    assert large["training"]["warmup"] == small["training"]["warmup"]  # Kept from the base.


def test_overrides(tmp_path):
    recipe = load_recipe(
        "sticker-clip",
        ["training.lr=1e-3", "training.steps=1e3", "data.weights={}", "output=7", "size=gpu"],
    )
    assert recipe["training"]["lr"] == 1e-3
    assert recipe["training"]["steps"] == 1000 and isinstance(recipe["training"]["steps"], int)
    assert recipe["data"]["weights"] == {} and recipe["output"] == "7"
    assert recipe["model"]["vision_cfg"] == {
        **load_recipe("sticker-clip")["model"]["vision_cfg"],
        "image_size": 128,
        "width": 256,
    }
    path = tmp_path / "mine.yaml"
    path.write_text("task: clip\ntraining: {steps: 3, lr: 1e-3, min_lr: 2e-05, note: 1e}\n")
    training = {"steps": 3, "lr": 1e-3, "min_lr": 2e-5, "note": "1e"}
    assert load_recipe(path) == {"task": "clip", "training": training}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("size=huge", 'no size "huge": choose from cpu, gpu'),
        ("training.stepz=3", 'no setting "training.stepz"'),
        ("nonsense.deep.key=3", 'no setting "nonsense.deep.key"'),
        ("task.name=3", 'no setting "task.name"'),
        ("steps", '"steps" is not key=value'),
        ("training.steps=many", '"many" does not fit training.steps'),
        ("training.steps=2.5", '"2.5" does not fit training.steps'),
        ("training.compile=3", '"3" does not fit training.compile'),
        ("training.betas=0.9", '"0.9" does not fit training.betas'),
        ("training.betas=[0.9", "does not fit training.betas"),
    ],
)
def test_bad_overrides_are_refused(override, message):
    with pytest.raises(InputError) as caught:
        load_recipe("sticker-clip", [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"task: [", "is not valid YAML"),
        (b"\xff\xfe", "is not valid YAML"),
        (b"- clip", "is not a recipe"),
        (b"", "is not a recipe"),
    ],
)
def test_bad_recipe_files_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(InputError, match=r'No recipe "stickr".*sticker-tokenizer'):
        load_recipe("stickr")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.batch_size": 0}, "training.batch_size must be at least 1, got 0"),
        ({"training.precision": "fp8"}, 'Unknown training.precision "fp8"'),
        ({"task": "gan"}, 'Unknown task "gan"'),
        ({"start": "magic"}, 'Unknown start "magic": choose from random, components'),
        ({"data.root": "nowhere/stickers"}, 'no pictures at "nowhere/stickers": set data.root'),
        (
            {"vae": "no/where/model"},
            r'No AutoencoderKL could be loaded from "no/where/model" \(there is no.*set vae=',
        ),
        ({"data.options": "{colours: [red]}"}, "StickerPack cannot take these options"),
        ({"data.options": "{styles: [oil]}"}, 'Unknown style "oil"'),
    ],
)
def test_bad_settings_leave_nothing_behind(recipe_of, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        train(recipe_of("flextok", **overrides))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_a_setting_and_with_a_strange_model(recipe_of):
    recipe = recipe_of("flextok")
    recipe["model"]["dephth"] = 3
    with pytest.raises(InputError, match=r"does not fit FlexTok.*dephth"):
        train(recipe)
    recipe = recipe_of("flextok")
    del recipe["training"]["ema"]
    with pytest.raises(InputError, match='no setting "ema"'):
        train(recipe)


def test_learning_rate():
    settings = {"lr": 1.0, "min_lr": 0.1, "warmup": 4, "steps": 12}
    rates = [learning_rate(step, settings) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.55)  # Half of the way down.
    assert rates[12] == pytest.approx(0.1)
    assert sorted(rates[4:], reverse=True) == rates[4:]


# The order of the data


def test_shuffled_index_visits_all_in_each_epoch():
    picked = torch.cat([shuffled_index(i, 4, 10, seed=0) for i in range(5)]).tolist()
    assert sorted(picked[:10]) == sorted(picked[10:]) == list(range(10))
    assert picked[:10] != picked[10:]
    assert shuffled_index(3, 4, 10, seed=0).tolist() == picked[12:16]


def test_sticker_captions(parts):
    dataset = StickerPack(parts / "pack")
    captions = open_captions(dataset)
    rng = random.Random(0)
    index = [s.id for s in dataset.stickers].index("fluent-3d/1f301")
    drawn = [captions.draw(index, rng) for _ in range(300)]
    texts = {text for text, _ in drawn}
    assert {"red square", "red square, 3d", "3d red square", "rot Quadrat", "\U0001f301"} <= texts
    assert all(styled == ("3d" in text) for text, styled in drawn)
    assert "red" in texts  # Words drop out.
    everything = " ".join(captions.texts())
    assert "gelb Ring" in everything and "schwarz Ring" not in everything  # Of the test split.


def test_captions_of_own_pictures(tmp_path):
    own_pictures(tmp_path)
    captions = open_captions(ImageTextFolder(tmp_path), word_dropout=0.5)
    rng = random.Random(0)
    texts = {captions.draw(0, rng)[0] for _ in range(100)}
    assert texts == {"black", "plain", "black plain"}
    assert captions.concepts == [f"{colour} plain" for colour in sorted(COLOURS)]


def own_pictures(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, (_, colour) in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} plain\n")


# Runs


def test_a_run_leaves_its_files(recipe_of, tmp_path):
    model = train(recipe_of("flextok"))
    run = tmp_path / "run"
    assert model == run / "model"
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint-4",
        "log.jsonl",
        "model",
        "recipe.json",
        "samples",
        "tensorboard",
    ]
    assert json.loads((run / "recipe.json").read_text()) == recipe_of("flextok")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in rows])
    with Image.open(run / "samples" / "000004.png") as grid:
        assert grid.size == (16 * 34 + 2, 4 * 34 + 2)  # Pictures, and three prefix lengths.
        assert grid.getcolors(256) is None  # More than that many.
    # The exported weights are the averaged ones.
    tokenizer, found = FlexTok.from_pretrained(model), weights(run)
    for i, parameter in enumerate(tokenizer.parameters()):
        assert torch.equal(parameter, found[f"ema/{i}"])
    assert moved(
        {k: v for k, v in found.items() if k.startswith("model/encoder")},
        {f"model/{k}": v for k, v in tokenizer.state_dict().items()},
    )


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("flextok", FlexTokTask),
        ("flextok under components", FlexTokTask),
        ("flexar", FlexARTask),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(recipe_of, tmp_path, monkeypatch, task, kind):
    train(recipe_of(task, "whole"))
    torch.manual_seed(99)  # Whatever state a new process begins with.
    with monkeypatch.context() as patch:
        stop_at(patch, kind, 3, stop)
        with pytest.raises(Stop):
            train(recipe_of(task, "parts"))
    assert newest_checkpoint(tmp_path / "parts").name == "checkpoint-2"
    before = weights(tmp_path / "parts")
    # What a kill in the middle of writing the next checkpoint leaves.
    partial = tmp_path / "parts" / ".checkpoint-4.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    train(recipe_of(task, "parts"), resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert moved(before, weights(tmp_path / "parts")) > 1e-5
    assert not partial.exists()


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(recipe_of, tmp_path, monkeypatch):
    train(recipe_of("flextok", "whole"))
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(patch, FlexTokTask, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(recipe_of("flextok", "parts"))
    assert newest_checkpoint(tmp_path / "parts").name == "checkpoint-3"
    assert signal.getsignal(signal.SIGINT) is handler
    train(recipe_of("flextok", "parts"), resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_second_ctrl_c_does_not_wait(recipe_of, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, FlexTokTask, 2, twice)
    # A shell that starts tests in the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(recipe_of("flextok"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_ctrl_c_on_the_command_line_exits_130(recipe_of, tmp_path):
    steps = {"training.steps": 1_000_000, "training.save_every": 1_000_000}
    steps |= {"training.sample_every": 1_000_000}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of("flextok", **steps)))
    command = [sys.executable, "-m", "tessera", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert newest_checkpoint(tmp_path / "run") is not None


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(recipe_of, tmp_path):
    with pytest.raises(InputError, match="Nothing to resume"):
        train(recipe_of("flextok"), resume=True)
    train(recipe_of("flextok", **{"training.steps": 1}))
    with pytest.raises(InputError, match="already holds a run: pass --resume"):
        train(recipe_of("flextok"))


def test_a_checkpoint_of_another_recipe_or_a_damaged_one_is_refused(recipe_of, tmp_path):
    train(recipe_of("flextok", **{"training.steps": 1}))
    with pytest.raises(InputError, match=r'of another model \(they differ in "encoder') as caught:
        train(recipe_of("flextok", **{"model.encoder_depth": 2}), resume=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="of another model"):
        train(recipe_of("flexar"), resume=True)
    for file in ("model.safetensors", "optimizer.pt", "state.json"):
        path = tmp_path / "run" / "checkpoint-1" / file
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match="is damaged"):
            train(recipe_of("flextok"), resume=True)
        path.write_bytes(data)


def test_a_full_disk_keeps_the_checkpoint_before(recipe_of, tmp_path, monkeypatch):
    saves = []

    def save(state, path):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        Path(path).write_bytes(b"")
        original(state, path)

    original = torch.save
    monkeypatch.setattr(checkpoints.torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        train(recipe_of("flextok"))
    run = tmp_path / "run"
    assert [p.name for p in run.glob("*checkpoint*")] == ["checkpoint-2"]
    assert [p.name for p in run.glob(".*")] == []


def test_a_loss_that_is_not_finite_stops_the_run(recipe_of, tmp_path):
    with pytest.raises(InputError, match=r"The loss is (nan|inf) after step .: lower training.lr"):
        train(recipe_of("flextok", **{"training.lr": 1e30, "training.clip": 1e30}))


def test_accumulation_of_two_halves_equals_the_joined_batch(recipe_of, tmp_path, monkeypatch):
    def halves(self, index, size, generator, rows):
        """Batch i of size n in one piece; at size n / 2, half i % 2 of batch i // 2."""
        whole = 4
        part = slice(index % (whole // size) * size, (index % (whole // size) + 1) * size)
        index //= whole // size
        seed = self.recipe["seed"] * 1_000_003 + index
        return original(self, index, whole, torch.Generator().manual_seed(seed), part)

    original = FlexTokTask.batch
    monkeypatch.setattr(FlexTokTask, "batch", halves)
    train(recipe_of("flextok", "joined"))
    split = {"training.batch_size": 2, "training.gradient_accumulation": 2}
    train(recipe_of("flextok", "split", **split))
    train(recipe_of("flextok", "half", **{"training.batch_size": 2}))
    joined, split, half = (weights(tmp_path / run) for run in ("joined", "split", "half"))
    assert moved(joined, split) < 2e-6
    assert moved(joined, half) > 1e-4


def environment() -> dict[str, str]:
    """One thread a process, no GPU, and only the loopback device between processes."""
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | ours


def test_two_processes_equal_one_with_the_joined_batch(recipe_of, tmp_path):
    steps = {"training.steps": 3}
    train(recipe_of("flextok", "one", **steps))
    recipe = recipe_of("flextok", "two", **steps)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "tessera", "train"]
    command.append(str(tmp_path / "recipe.yaml"))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert moved(one, two) < 2e-6


# A pipeline of the parts, and own data


def test_assembled_parts_make_pictures(parts, tmp_path):
    from tessera.pipelines.text_to_image import TextToImagePipeline

    tiny_pipeline().generator.save_pretrained(tmp_path / "generator")
    folders = {"tokenizer": parts / "tokenizer", "clip": parts / "clip"}
    folders |= {"generator": tmp_path / "generator", "output": tmp_path / "pipeline"}
    overrides = [f"{key}={value}" for key, value in folders.items()]
    overrides += ["dtype=fp32", "pipeline.default_num_tokens=16", "pipeline.styles=3d,flat"]
    overrides += ["pipeline.temperature=1.0", "pipeline.top_p=1.0"]
    for _ in range(2):  # The second time in place of the first.
        assert train(load_recipe("sticker", overrides)) == tmp_path / "pipeline"
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "pipeline")
    expected, generators = tiny_pipeline(), [torch.Generator().manual_seed(7)]
    assert loaded.styles == ["3d", "flat"]
    again = [torch.Generator().manual_seed(7)]
    images = loaded("red ring", generator=again, output_type="pt")
    wanted = expected("red ring", generator=generators, num_tokens=16, output_type="pt")
    assert torch.equal(images.tokens, wanted.tokens)
    assert torch.equal(images.images, wanted.images)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dtype=int8", 'Unknown dtype "int8"'),
        ("generator=no/where/model", r'No FlexAR could be loaded from "no/where/model"'),
        ("output=.", '"." holds something else'),
    ],
)
def test_bad_parts_are_refused(parts, tmp_path, monkeypatch, override, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    folders = {key: parts / key for key in ("tokenizer", "clip")}
    overrides = [f"{key}={value}" for key, value in folders.items()]
    with pytest.raises(InputError, match=message):
        train(load_recipe("sticker", [*overrides, override]))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_decoder_goes_on_under_the_same_ids(recipe_of, parts):
    recipe = recipe_of("decoder")
    task = TASKS["flextok_decoder"](recipe, torch.device("cpu"))
    assert bool((task.batch(0, 4, torch.Generator(), slice(0, 4))["t"] == 1).all())
    before = FlexTok.from_pretrained(parts / "tokenizer").eval()
    after = FlexTok.from_pretrained(train(recipe)).eval()
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = before.encode(pictures)
    assert torch.equal(after.encode(pictures), tokens)
    assert after.config.num_inference_steps == 1
    one, other = (each.decode(tokens, 1, generator=streams(0, 1)) for each in (before, after))
    assert not torch.allclose(one, other)


def test_own_pictures_train_all_three_models(recipe_of, tmp_path):
    own_pictures(tmp_path / "mine")
    own = {"data.root": tmp_path / "mine", "training.steps": 2}
    tokenizer = train(recipe_of("flextok", "tokenizer", **own))
    clip = train(recipe_of("clip", "clip", **own))
    models = {"tokenizer": tokenizer, "clip": clip}
    generator = train(recipe_of("flexar", "generator", **own, **models))
    assert "plain" in TextImageCLIP.from_pretrained(clip).bpe.encode("red plain").tokens[-1]
    model = FlexAR.from_pretrained(generator)
    assert model.config.num_tokens == 16
    # Go on with it: nothing moves where nothing is learnt.
    still = {"start": generator, "training.lr": 0, "training.min_lr": 0}
    again = FlexAR.from_pretrained(train(recipe_of("flexar", "again", **own, **models, **still)))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    narrow = train(recipe_of("clip", "narrow", **own, **{"model.text_cfg.width": 48}))
    with pytest.raises(InputError, match="text features of width"):
        train(recipe_of("flexar", "no", **own, **models | still | {"clip": narrow}))
    for run in ("tokenizer", "clip", "generator"):
        assert (tmp_path / run / "samples" / "000002.png").is_file()
