"""What can be trained on moving pictures: tokenizers, generators over their tokens, interpolation."""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..generators.conditioning.text import text_prefix
from ..generators.linear_video.lingen import LinGen, Stage, training_shape
from ..generators.linear_video.vfimamba import VFIMamba
from ..generators.next_block.nbp import NBP
from ..modalities.datasets import StickerPack
from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..modalities.image import fit_image, to_pil, to_tensor
from ..modalities.video import composite
from ..modalities.video_datasets import AnimatedPack, ProceduralAnimations
from ..tokenizers.video.nbp import NBPTokenizer
from .captions import open_captions
from .generator_tasks import load_clip
from .id_warm_start import smooth_ids
from .moving_scenes import MovingScenes
from .tasks import STARTS, Task, build, from_uint8, load_frozen, save_grid
from .video_losses import VideoTokenizerLoss
from .video_warm_start import local_components

# Clips that the tokens are cached of at a time.
PART = 64
START_CLIPS = 24
NBP_STARTS = ("smooth", "random")
BOX = Image.Resampling.BOX


REAL, PROCEDURAL, STILL = range(3)
Item = tuple[int, int]


class Animations:
    """Real loops, procedural animations and still stickers: items (kind, index), drawn when asked for.

    Nothing of either pack's test split is among them, nor the pairs of sticker and motion that are
    held out.

    Args:
        data: ``root`` of the animated pack, ``stickers``, the sticker pack's folder, ``options`` of
            `StickerPack`, ``captions`` of stills (`open_captions`), and ``real_share`` of the clips.
        num_frames, size: of a clip.
    """

    def __init__(self, data: dict[str, Any], num_frames: int, size: int):
        root = data["root"]
        self.size, self.real_share = size, data["real_share"]
        self.real = AnimatedPack(root, ("real",), ("train",), num_frames, size)
        self.stickers = StickerPack(data["stickers"], **data["options"])
        if not len(self.real) or not len(self.stickers):
            raise InputError(
                f'There is nothing to train on: "{root}" has {len(self.real)} animations, '
                f'"{data["stickers"]}" {len(self.stickers)} stickers.'
            )
        held_out = AnimatedPack(root, ("procedural",), ("val", "test")).rows
        self.procedural = ProceduralAnimations(
            self.stickers,
            num_frames=num_frames,
            size=size,
            exclude={(row["name"], row["motion"]) for row in held_out},
        )
        self.still_captions = open_captions(self.stickers, **data["captions"])
        self.loops: dict[int, Tensor] = {}

    def draw(self, still: bool, rng: random.Random) -> Item:
        """A clip, or a still sticker."""
        if still:
            return STILL, rng.randrange(len(self.stickers))
        if rng.random() < self.real_share:
            return REAL, rng.randrange(len(self.real))
        return PROCEDURAL, rng.randrange(len(self.procedural))

    def frames(self, item: Item, rng: random.Random) -> Tensor:
        """uint8 ``[3, T, S, S]`` over white, T = 1 of a still one; loops stay in memory."""
        kind, index = item
        if kind == STILL:
            picture = fit_image(self.stickers.image(index), self.size, background="white")
            return to_uint8(to_tensor(picture).transpose(0, 1))
        if kind == PROCEDURAL:
            return to_uint8(self.procedural.clip(index, rng).frames)
        if index not in self.loops:
            self.loops[index] = to_uint8(self.real.clip(index).frames)
        return self.loops[index]

    def caption(self, item: Item, rng: random.Random) -> str:
        kind, index = item
        if kind == STILL:
            return self.still_captions.draw(index, rng)[0]
        return (self.real if kind == REAL else self.procedural).caption(index, rng)


def to_uint8(frames: Tensor) -> Tensor:
    """``[3 or 4, T, H, W]`` in [-1, 1] -> uint8 ``[3, T, H, W]`` over white."""
    return ((composite(frames) + 1) * 127.5).round().to(torch.uint8)


def seeded(generator: torch.Generator) -> random.Random:
    """Python's random numbers, out of torch's."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator)))


def augment(clip: Tensor, rng: random.Random) -> Tensor:
    """A loop begun elsewhere, perhaps backwards, moved by up to 1/16 of the side over white."""
    frames, reach = clip.shape[1], clip.shape[2] // 16
    clip = clip.roll(rng.randrange(frames), 1)
    clip = clip.flip(1) if rng.random() < 0.5 else clip
    moved = torch.full_like(clip, 255)
    y, x = (rng.randint(-reach, reach) for _ in range(2))
    size = clip.shape[2]
    moved[:, :, max(0, y) : size + min(0, y), max(0, x) : size + min(0, x)] = clip[
        :, :, max(0, -y) : size - max(0, y), max(0, -x) : size - max(0, x)
    ]
    return moved


def frame_rows(clips: Tensor, count: int = 8) -> list[Image.Image]:
    """``count`` frames of each clip ``[B, 3, T, S, S]``, a clip a row."""
    every = torch.linspace(0, clips.shape[2] - 1, count).round().long()
    return [frame for clip in clips for frame in to_pil(clip[:, every].transpose(0, 1).float())]


class VideoTokenizerTask(Task):
    """The causal tokenizer, on clips and, in a share of the batches, on still stickers.

    ``start: components`` writes its first weights down (see `video_warm_start`). With ``tokenizer``, a
    trained one's folder, its decoder alone is trained further: ids stay what they are.
    """

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        if recipe["start"] not in STARTS:
            raise InputError(f'Unknown start "{recipe["start"]}": choose from {", ".join(STARTS)}.')
        if recipe["tokenizer"] is None:
            self.tokenizer = build(NBPTokenizer, **recipe["model"])
            self.tokenizer.init_weights()
        else:
            self.tokenizer = load_frozen(NBPTokenizer, recipe, "tokenizer")
            self.tokenizer.encoder.requires_grad_(False)
        self.data = Animations(recipe["data"], self.tokenizer.num_frames, self.tokenizer.image_size)
        if recipe["tokenizer"] is None and recipe["start"] == "components":
            local_components(self.tokenizer, self.clips(START_CLIPS))
        self.model = VideoTokenizerLoss(
            self.tokenizer, {"regularizer": 0.0}, {}, None, 0, recipe["loss"]["distance"]
        )

    @property
    def networks(self) -> list[nn.Module]:
        return [self.tokenizer]

    def clips(self, count: int) -> Tensor:
        """Some clips ``[count, 3, T, S, S]``, always the same."""
        found = []
        for seed in range(count):
            rng = random.Random(seed)
            found.append(self.data.frames(self.data.draw(False, rng), rng))
        return from_uint8(torch.stack(found))

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        rng = seeded(generator)
        still = rng.random() < self.recipe["data"]["still_share"]
        clips = []
        for each in [random.Random(rng.getrandbits(62)) for _ in range(size)][rows]:
            clip = self.data.frames(self.data.draw(still, each), each)
            clips.append(augment(clip, each))
        step = index // self.recipe["training"]["gradient_accumulation"]
        return {"video": from_uint8(torch.stack(clips)), "step": step}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Frames of four clips, and below each what its tokens decode to."""
        videos = self.clips(4).to(self.device)
        decoded = self.tokenizer.decode(self.tokenizer.encode(videos))
        save_grid(frame_rows(torch.stack([videos, decoded], 1).flatten(0, 1)), 8, path)

    def export(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class CachedTokens:
    """Tokens of clips and of still stickers, in files that a restart reads again.

    Args:
        data, tokenizer: what is encoded, and with what.
        counts: how many "clips" and "stills".
        folder: of the files, `PART` items each. Those of another tokenizer, other data or another seed
            are written anew.
        seed: of the choice.

    Attributes:
        tokens: ``[M, N]`` (or ``[M, N, latent_dim]``) of "clips" and of "stills".
        items: what they show.
    """

    def __init__(
        self,
        data: Animations,
        tokenizer: NBPTokenizer,
        counts: dict[str, int],
        folder: Path,
        seed: int,
    ):
        self.data, self.tokenizer, self.folder, self.seed = data, tokenizer, folder, seed
        sizes = (len(data.real), len(data.procedural), data.real_share, seed)
        self.key = "-".join(map(str, (fingerprint(tokenizer), *sizes)))
        self.tokens: dict[str, Tensor] = {}
        self.items: dict[str, list[Item]] = {}
        for kind in ("clips", "stills"):
            count = counts[kind]
            parts = [self._part(kind, part) for part in self._track(kind, -(-count // PART))]
            self.tokens[kind] = torch.cat([part["tokens"] for part in parts])[:count]
            items = torch.cat([part["items"] for part in parts])[:count]
            self.items[kind] = [tuple(item) for item in items.tolist()]

    @staticmethod
    def _track(kind: str, parts: int) -> Iterable[int]:
        return track(
            range(parts),
            f"Tokens of {kind}",
            console=Console(stderr=True),
            transient=True,
            disable=not PartialState().is_main_process,
        )

    def _part(self, kind: str, part: int) -> dict[str, Tensor]:
        path = self.folder / f"{kind}-{part:05d}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                if file.metadata().get("key") == self.key:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            pass  # Not there yet, or not whole.
        found = self._encode(kind, part)
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial:
                save_file(found, partial, {"key": self.key})
        return found

    @torch.no_grad()
    def _encode(self, kind: str, part: int) -> dict[str, Tensor]:
        items, videos = [], []
        for number in range(part * PART, (part + 1) * PART):
            rng = random.Random(f"{self.seed}/{kind}/{number}")
            items.append(self.data.draw(kind == "stills", rng))
            videos.append(self.data.frames(items[-1], rng))
        device = self.tokenizer.device
        tokens = [
            self.tokenizer.encode(from_uint8(some).to(device)).cpu()
            for some in torch.stack(videos).split(8)
        ]
        return {"tokens": torch.cat(tokens), "items": torch.tensor(items)}


def fingerprint(model: nn.Module) -> str:
    """Changes with any weight."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class VideoGeneratorTask(Task):
    """A generator over cached tokens of a frozen tokenizer and a frozen text tower.

    A share of the batches holds still stickers, clips of one frame.
    """

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        tokenizer = load_frozen(NBPTokenizer, recipe, "tokenizer").to(device).eval()
        self.clip = load_clip(recipe["clip"]).to(device).eval()
        self.clip.requires_grad_(False)
        data = recipe["data"]
        self.data = Animations(data, tokenizer.num_frames, tokenizer.image_size)
        self.tokenizer = self.prepare(tokenizer.requires_grad_(False))
        folder = Path(recipe["output"]) / "tokens"
        self.cached = CachedTokens(
            self.data, self.tokenizer, data["cached"], folder, recipe["seed"]
        )
        self.model = self.build_model()

    def prepare(self, tokenizer: NBPTokenizer) -> NBPTokenizer:
        """The tokenizer whose tokens are learned."""
        return tokenizer

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model."""

    @abstractmethod
    def inputs(self, tokens: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """Arguments of the model's forward."""

    def drawn(
        self, still: bool, size: int, rng: random.Random, rows: slice
    ) -> tuple[Tensor, list[str]]:
        """Tokens and captions of the rows of a batch."""
        kind = "stills" if still else "clips"
        items, tokens = self.cached.items[kind], self.cached.tokens[kind]
        picked = [rng.randrange(len(items)) for _ in range(size)]
        captions = [self.data.caption(items[i], rng) for i in picked]
        return tokens[picked[rows]], captions[rows]

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


class NBPTask(VideoGeneratorTask):
    """Next-block prediction: text features to ids.

    ``start: smooth`` begins with embeddings that know the grids of codes and places (see
    `id_warm_start`), ``random`` without.
    """

    def build_model(self) -> NBP:
        model = build(
            NBP,
            vocab_size=self.tokenizer.vocab_size,
            num_tokens=self.tokenizer.num_tokens,
            text_vocab_size=0,
            text_dim=self.clip.text_dim,
            **self.recipe["model"],
        )
        if self.tokenizer.tokens_per_step % model.config.block_size:
            raise InputError(
                f"A step in time has {self.tokenizer.tokens_per_step} tokens: set "
                "model.block_size to a divisor of it."
            )
        model.init_weights()
        start = self.recipe["start"]
        if start not in NBP_STARTS:
            raise InputError(f'Unknown start "{start}": choose from {", ".join(NBP_STARTS)}.')
        if start == "smooth":
            smooth_ids(model, self.tokenizer)
        return model

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        rng = seeded(generator)
        still = rng.random() < self.recipe["data"]["still_share"]
        return self.inputs(*self.drawn(still, size, rng, rows))

    def inputs(self, tokens: Tensor, captions: list[str]) -> dict[str, Tensor]:
        text = text_prefix(self.clip, captions, self.recipe["model"]["text_length"])
        return {"tokens": tokens, "text": text}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Frames of a clip of each of the recipe's prompts."""
        prompts = self.recipe["prompts"]
        text = text_prefix(self.clip, prompts, self.recipe["model"]["text_length"])
        seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        ids = self.model.generate(text, seeds)
        save_grid(frame_rows(self.tokenizer.decode(ids)), 8, path)


class LinGenTask(VideoGeneratorTask):
    """Flow over the tokenizer's codes before they are rounded, scaled to unit variance.

    The recipe's ``stages`` (of `lingen.Stage`) say how long the clips are, and how often a batch holds
    pictures. The export holds the tokenizer of these latents in ``tokenizer/``.
    """

    def prepare(self, tokenizer: NBPTokenizer) -> NBPTokenizer:
        """The same weights with continuous tokens, whose mean and spread some clips decide."""
        codes = []
        with torch.no_grad():
            for seed in range(PART):
                rng = random.Random(seed)
                video = from_uint8(self.data.frames(self.data.draw(False, rng), rng))
                latents = tokenizer.encode_latents(video[None].to(self.device))
                codes.append(tokenizer.unrounded(latents).flatten(0, 3).cpu())
        found = torch.cat(codes)
        config = {k: v for k, v in tokenizer.config.items() if not k.startswith("_")}
        # Rounded, so that another machine finds the same.
        config["latent_mean"] = [round(float(x), 3) for x in found.mean(0)]
        config["latent_std"] = [max(round(float(x), 3), 0.001) for x in found.std(0)]
        continuous = NBPTokenizer(**config)
        continuous.load_state_dict(tokenizer.state_dict())
        return continuous.to(self.device).eval().requires_grad_(False)

    def build_model(self) -> LinGen:
        self.stages = [Stage(**stage) for stage in self.recipe["stages"]]
        side = self.tokenizer.grid[1]
        for stage in self.stages:
            if stage.size != side or not 1 <= stage.frames <= self.tokenizer.grid[0]:
                raise InputError(
                    f"Stages have size {side} and 1 to {self.tokenizer.grid[0]} latent frames, got "
                    f"{stage}."
                )
        return build(
            LinGen,
            latent_channels=self.tokenizer.latent_dim,
            text_dim=self.clip.text_dim,
            **self.recipe["model"],
        )

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        step = index // self.recipe["training"]["gradient_accumulation"]
        frames, _ = training_shape(self.stages, step, generator)
        rng = seeded(generator)
        tokens, captions = self.drawn(frames == 1, size, rng, rows)
        tokens = tokens[:, : frames * self.tokenizer.tokens_per_step]
        return self.inputs(tokens, captions)

    def inputs(self, tokens: Tensor, captions: list[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            features, mask = self.clip.text_features(captions)
        grid = (-1, *self.tokenizer.grid[1:])
        latents = tokens.movedim(2, 1).unflatten(2, grid).contiguous()
        return {"latents": latents, "text_features": features, "text_mask": mask}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Frames of a clip of each of the recipe's prompts."""
        prompts = self.recipe["prompts"]
        features, mask = self.clip.text_features(prompts)
        seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        latents = self.model.generate(features, mask, seeds, self.tokenizer.grid)
        decoded = self.tokenizer.decode(latents.flatten(2).movedim(1, 2))
        save_grid(frame_rows(decoded), 8, path)

    def export(self, folder: Path) -> None:
        super().export(folder)
        self.tokenizer.save_pretrained(folder / "tokenizer")


@torch.no_grad()
def start_at_average(model: VFIMamba) -> None:
    """Nothing moves and nothing is added at first: the frame between is the mean of the two.

    A quarter of real pairs hardly move, and there nothing is better.
    """
    heads = [block.conv[-1][0] for block in model.flow_blocks]
    heads += [block.up for block in model.local_blocks]
    for head in (*heads, model.refinement.conv):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)


class InterpolationTask(Task):
    """VFIMamba on `MovingScenes`."""

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        self.scenes = MovingScenes(recipe["data"])
        self.model = build(VFIMamba, **recipe["model"])
        start_at_average(self.model)

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        seeds = torch.randint(2**62, (size,), generator=generator)[rows].tolist()
        frames, motion = map(torch.stack, zip(*map(self.scenes.scene, seeds), strict=True))
        first, middle, last = frames.unbind(1)
        weights = {"decibels": self.recipe["loss"]["decibels"], "pull": self.recipe["loss"]["flow"]}
        return {"frame0": first, "frame1": last, "target": middle, "flow": motion, **weights}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """First, true middle, found middle and last frames of eight scenes."""
        scenes = [self.scenes.scene(seed)[0] for seed in range(8)]
        first, middle, last = torch.stack(scenes, 1)
        found = self.model.interpolate(first.to(self.device), last.to(self.device)).cpu()
        rows = torch.cat([first, middle, found, last])
        save_grid(to_pil(rows), 8, path)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
