"""From a small animated pack and a small sticker pack to a pipeline: tokenizer, generators, interpolation."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tessera.generators.conditioning.text import text_prefix
from tessera.generators.linear_video.vfimamba import VFIMamba, warp
from tessera.generators.next_block.nbp import NBP as BlockModel
from tessera.modalities.datasets import StickerPack
from tessera.modalities.errors import InputError
from tessera.modalities.video import save_video
from tessera.modalities.video_datasets import ProceduralAnimations
from tessera.pipelines.text_to_video import TextToVideoPipeline
from tessera.tests.tiny import tiny_clip, tiny_pack
from tessera.tokenizers.video.nbp import NBPTokenizer
from tessera.training.config import load_recipe
from tessera.training.id_warm_start import smooth_ids
from tessera.training.moving_scenes import MovingScenes
from tessera.training.trainer import train
from tessera.training.video_tasks import Animations, augment, start_at_average, to_uint8
from tessera.training.video_warm_start import local_components

SMALL = {
    "training.steps": 3,
    "training.batch_size": 2,
    "training.log_every": 1,
    "training.warmup": 1,
    "training.save_every": 3,
    "training.sample_every": 3,
    "training.precision": "fp32",
}
TOKENIZER = {
    "model.image_size": 16,
    "model.num_frames": 5,
    "model.channels": "[16, 16, 16]",
    "model.fsq_levels": "[5, 3]",
}
GENERATOR = {
    "data.real_share": 0.5,
    "data.cached": "{clips: 5, stills: 4}",
    "model.dim": 32,
    "model.depth": 1,
    "prompts": "[red circle spinning]",
}
NBP = {"model.heads": 2, "model.block_size": 2, "model.text_length": 8, "model.max_positions": 32}
STAGES = (
    "[{steps: 2, frames: 1, size: 2, image_share: 1.0}, {steps: 9, frames: 2, size: 2, "
    "image_share: 0.0}]"
)
LINGEN = {
    "model.head_dim": 16,
    "model.d_state": 8,
    "model.window": "[2, 2, 2]",
    "model.num_steps": 2,
    "stages": STAGES,
}


def recipe(name, output, **settings):
    return load_recipe(name, [f"{k}={v}" for k, v in {"output": output, **settings}.items()])


def losses(run):
    rows = [json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every recipe of animated stickers, a few steps long, at a tiny size."""
    root = tmp_path_factory.mktemp("video")
    tiny_pack(root / "stickers")
    animated = root / "animated"
    animated.mkdir()
    stickers = StickerPack(root / "stickers")
    moving = ProceduralAnimations(stickers, ["spinning", "pulsing"], num_frames=6, size=32)
    data, rows = b"", []
    for i in range(4):
        save_video(moving.clip(i).frames, root / "a.webp", 8)
        encoded = (root / "a.webp").read_bytes()
        row = {"id": str(i), "kind": "real", "name": moving.name(i), "frames": 6, "file": "a.bin"}
        row |= {"split": "train", "offset": len(data), "length": len(encoded)}
        rows.append(row)
        data += encoded
    held = rows[0] | {"kind": "procedural", "split": "val", "name": "red circle"}
    rows.append(held | {"motion": "spinning"})
    (animated / "a.bin").write_bytes(data)
    (animated / "animated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_clip().save_pretrained(root / "clip")
    packs = {"data.root": animated, "data.stickers": root / "stickers", "data.options": "{}"}
    train(recipe("animated-tokenizer", root / "tokenizer", **TOKENIZER, **packs, **SMALL))
    parts = {"tokenizer": root / "tokenizer" / "model", "clip": root / "clip", **packs, **SMALL}
    of_tokenizer = {"tokenizer": root / "tokenizer" / "model", **packs, **SMALL}
    train(recipe("animated-decoder", root / "decoder", **of_tokenizer))
    train(recipe("animated-generator", root / "generator", **GENERATOR, **NBP, **parts))
    train(recipe("animated-lingen", root / "lingen", **GENERATOR, **LINGEN, **parts))
    small = {"data.size": 32, "model.dim": 4, **packs, **SMALL}
    train(recipe("animated-interpolation", root / "interpolation", **small))
    return root


@pytest.mark.parametrize("name", ["tokenizer", "decoder", "generator", "lingen", "interpolation"])
def test_every_recipe_trains_and_shows_samples(runs, name):
    steps, found = losses(runs / name)
    assert steps == [1, 2, 3] and all(map(math.isfinite, found))
    assert (runs / name / "samples" / "000003.png").is_file()


def test_a_decoder_is_trained_under_the_ids_of_its_tokenizer(runs):
    before, after = (
        NBPTokenizer.from_pretrained(runs / name / "model") for name in ("tokenizer", "decoder")
    )
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    ids = before.encode(video)
    assert torch.equal(after.encode(video), ids)
    assert not torch.equal(after.decode(ids), before.decode(ids))


def test_a_run_goes_on_from_its_checkpoint_and_from_its_tokens(runs):
    parts = {"tokenizer": runs / "tokenizer" / "model", "clip": runs / "clip"}
    packs = {"data.root": runs / "animated", "data.stickers": runs / "stickers"}
    settings = {**GENERATOR, **NBP, **parts, **packs, "data.options": "{}", **SMALL}
    files = sorted((runs / "generator" / "tokens").glob("*.safetensors"))
    assert [file.name for file in files] == ["clips-00000.safetensors", "stills-00000.safetensors"]
    written = [file.stat().st_mtime_ns for file in files]
    settings["training.steps"] = 4
    train(recipe("animated-generator", runs / "generator", **settings), resume=True)
    assert losses(runs / "generator")[0] == [1, 2, 3, 4]
    assert [file.stat().st_mtime_ns for file in files] == written


def test_the_parts_make_clips(runs, tmp_path):
    parts = {"clip": runs / "clip", "dtype": "fp32", "pipeline.num_frames": 5}
    parts |= {
        "generator": runs / "generator" / "model",
        "tokenizer": runs / "tokenizer" / "model",
    }
    train(recipe("animated-sticker", tmp_path / "blocks", **parts))
    pipeline = TextToVideoPipeline.from_pretrained(tmp_path / "blocks")
    assert pipeline.config.first_frame == "sticker"
    frames = pipeline("a red circle", seed=1, output_type="pt").frames
    assert frames.shape == (1, 3, 5, 16, 16) and bool(frames.isfinite().all())
    parts["generator"] = runs / "lingen" / "model"
    parts["tokenizer"] = runs / "lingen" / "model" / "tokenizer"
    parts["pipeline.first_frame"] = "null"
    train(recipe("animated-sticker", tmp_path / "flow", **parts))
    pipeline = TextToVideoPipeline.from_pretrained(tmp_path / "flow")
    assert pipeline("a red circle", seed=1, output_type="pt").frames.shape == (1, 3, 5, 16, 16)


def test_a_trained_interpolation_loads(runs):
    model = VFIMamba.from_pretrained(runs / "interpolation" / "model")
    frame = torch.zeros(1, 3, 20, 36)
    assert model.interpolate(frame, frame).shape == frame.shape


def test_interpolation_starts_at_the_mean_of_the_frames():
    model = VFIMamba(dim=4, depths=(1, 1, 1, 1, 1)).eval()
    frames = torch.rand(2, 1, 3, 40, 56) * 2 - 1
    assert not torch.allclose(model.interpolate(*frames), frames.mean(0), atol=0.05)
    start_at_average(model)
    assert torch.allclose(model.interpolate(*frames), frames.mean(0), atol=1e-4)
    # After a step of the heads the rest learns too.
    clips, model = torch.rand(3, 1, 3, 64, 64) * 2 - 1, model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(*clips)[0].backward()
        optimizer.step()
    assert float(model.features.blocks[0][0].weight.grad.abs().max()) > 0


def scenes(runs, **options) -> MovingScenes:
    settings = {"size": 32, "layers": 2, "motion": 0.1, "still_share": 0.0, "animated_share": 0.0}
    packs = {"root": runs / "animated", "stickers": runs / "stickers", "options": {}}
    return MovingScenes(packs | settings | {"noise": 1e-6} | options)


def test_scenes_come_from_their_seed(runs):
    made = scenes(runs, animated_share=0.5)
    first = [made.scene(seed) for seed in range(8)]
    again = [scenes(runs, animated_share=0.5).scene(seed) for seed in range(8)]
    for (frames, motion), others in zip(first, again, strict=True):
        assert frames.shape == (3, 3, 32, 32) and frames.abs().max() <= 1
        assert motion.shape == (4, 32, 32)
        assert torch.equal(frames, others[0]) and torch.equal(motion, others[1])
    assert not torch.equal(first[0][0], first[1][0])


def test_the_motion_of_a_scene_leads_from_the_middle_to_the_others(runs):
    """Warped by it, the outer frames are the middle one, but for edges and what is hidden."""
    made, wins = scenes(runs, motion=0.1, size=64, layers=1), 0
    for seed in range(20):
        frames, motion = made.scene(seed)
        first, middle, last = frames[:, None]
        for other, way in ((first, motion[:2]), (last, motion[2:])):
            moved = (warp(other, way[None]) - middle).abs().median()
            assert moved < 0.02
            wins += bool((warp(other, -way[None]) - middle).abs().mean() > 1.2 * moved)
    assert wins > 20


def test_things_move_evenly(runs):
    """The centre of the middle frame lies halfway between the others."""
    made, places = scenes(runs, motion=0.4), torch.arange(64.0)
    moved = []
    for seed in range(60):
        rng = random.Random(seed)
        alpha = made.draw(made.poses(False, rng), False, rng)[:, 3]
        if max(alpha[:, edge].max() for edge in (0, -1)) > 0 or alpha[..., [0, -1]].max() > 0:
            continue  # It leaves the canvas.
        mass = alpha.sum((1, 2))
        for share in (alpha.sum(1), alpha.sum(2)):
            first, middle, last = ((share * places).sum(1) / mass).tolist()
            assert abs((first + last) / 2 - middle) < 0.3
            moved.append(abs(last - first))
    assert len(moved) > 6 and max(moved) > 5


def test_grounds_stand_still_and_frames_have_noise(runs):
    made = scenes(runs, still_share=1.0)
    rng = random.Random(0)
    ground = made.draw(made.poses(True, rng), True, rng)
    assert torch.equal(ground[0], ground[2]) and ground.std() > 0.01
    still = scenes(runs, motion=1e-9)
    assert all(torch.allclose(*still.scene(seed)[0][::2], atol=1e-3) for seed in range(4))
    noisy = scenes(runs, motion=1e-9, noise=0.05)
    wrong = [float((a - b).std() / 2) for (a, _, b), _ in map(noisy.scene, range(20))]
    assert 0.02 < sum(wrong) / len(wrong) < 0.15


def test_held_out_pairs_are_never_drawn(runs):
    data = {"root": runs / "animated", "stickers": runs / "stickers", "options": {}, "captions": {}}
    animations = Animations({**data, "real_share": 0.5}, 5, 16)
    stickers = animations.stickers
    pairs = {(stickers.name(i), motion) for i, motion in animations.procedural.pairs}
    assert ("red circle", "spinning") not in pairs and ("red circle", "pulsing") in pairs
    assert "black ring" not in {name for name, _ in pairs}


def test_augmented_clips_keep_their_frames():
    clip = torch.randint(0, 255, (3, 5, 16, 16), dtype=torch.uint8)
    moved = augment(clip, random.Random(0))
    assert moved.shape == clip.shape and not torch.equal(moved, clip)
    means = [sorted(x.float()[:, :, 1:-1, 1:-1].mean((0, 2, 3)).tolist()) for x in (clip, moved)]
    assert means[0] == pytest.approx(means[1], rel=0.1)


def test_components_start_close_to_the_clips(runs):
    stickers = StickerPack(runs / "stickers")
    moving = ProceduralAnimations(stickers, num_frames=5, size=32)
    videos = torch.stack([to_uint8(moving.clip(i).frames) for i in range(0, 400, 13)])
    videos = videos.float() / 127.5 - 1
    errors = []
    for start in (lambda *_: None, local_components):
        torch.manual_seed(0)
        tokenizer = NBPTokenizer(
            32,
            5,
            (16, 32, 32),
            1,
            (8, 8, 8, 8),
            patch_size=4,
            strides=((1, 1), (2, 2), (2, 1)),
            norm_groups=8,
            end_norms=False,
        )
        tokenizer.init_weights()
        start(tokenizer, videos)
        errors.append(float((tokenizer(videos)[0] - videos).detach().square().mean()))
    flat = float((videos - videos.mean()).square().mean())
    assert errors[1] < 0.6 * flat and errors[1] < errors[0] / 2


def test_ids_and_places_that_are_near_start_alike(runs):
    tokenizer = NBPTokenizer.from_pretrained(runs / "tokenizer" / "model")
    generator = BlockModel.from_pretrained(runs / "generator" / "model")
    torch.manual_seed(0)
    generator.init_weights()
    smooth_ids(generator, tokenizer)
    ids = tokenizer.quantizer.codes_to_ids(torch.tensor([[-1.0, -1], [-0.5, -1], [1, 1]]))
    for rows in (generator.embedding.weight, generator.head.weight):
        cell, near, far = rows[generator.first_video + ids]
        assert cosine_similarity(cell, near, dim=0) > 0.7 > cosine_similarity(cell, far, dim=0)
        assert float(rows[generator.first_video :].detach().std()) == pytest.approx(0.02, rel=0.5)
    # Places: a frame's neighbours in a row, and the same place a step later.
    steps, height, width = tokenizer.grid
    first = generator.config.text_length + generator.config.block_size
    places = generator.positions[first : first + steps * height * width]
    places = places.unflatten(0, (steps, height, width))
    assert bool((places[0, 0, 0] != 0).all())
    same, other = places[1, 0, 0], places[1, 1, 1]
    here = places[0, 0, 0]
    assert cosine_similarity(here, same, dim=0) > cosine_similarity(here, other, dim=0)
    assert bool((generator.positions[:first] == 0).all())


def test_unknown_start(runs, tmp_path):
    packs = {"data.root": runs / "animated", "data.stickers": runs / "stickers"}
    with pytest.raises(InputError, match='Unknown start "magic"'):
        train(recipe("animated-tokenizer", tmp_path, start="magic", **packs, **TOKENIZER, **SMALL))
    parts = {"tokenizer": runs / "tokenizer" / "model", "clip": runs / "clip", **packs}
    with pytest.raises(InputError, match='Unknown start "magic"'):
        settings = {**GENERATOR, **NBP, **parts, **SMALL}
        train(recipe("animated-generator", tmp_path / "b", start="magic", **settings))


def test_a_text_s_features_stand_before_the_clip():
    torch.manual_seed(0)
    model = BlockModel(
        11, 8, 2, 0, 3, 16, dim=16, depth=2, heads=2, top_k=None, top_p=1.0, text_dim=5
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.eval()
    text = text_prefix(tiny_clip(), ["red circle"], 3)
    assert text.shape[1] == 3 and not text_prefix(tiny_clip(), ["red"], 9)[0, -1].any()
    text = torch.randn(2, 3, 5)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    likeliest = torch.ones(8, 2, 13)  # Equal draws: the likeliest id of each place.
    *_, ids = model.stream_joint(text, seeds, noise=likeliest)
    tokens = (ids - model.first_video).clamp(min=0)
    assert torch.equal(tokens + model.first_video, ids)
    assert torch.equal(model.logits(tokens, text).argmax(-1), ids)
    with pytest.raises(InputError, match="text features"):
        model.check_condition(torch.zeros(2, 3, dtype=torch.int64))
