"""Scenes to learn interpolation from: stickers and animations that move over one another."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modalities.datasets import StickerPack
from ..modalities.image import to_tensor
from ..modalities.video_datasets import AnimatedPack
from .tasks import from_uint8

STEPS = torch.tensor([-0.5, 0.0, 0.5])


class MovingScenes:
    """Three even frames of a scene: a sticker, tiled, as the ground, and some things on it.

    Everything moves, turns and grows evenly; some things are animations. Often the ground is still,
    as under a camera that stands, and every frame has noise of its own, as a camera's has.

    Args:
        data: ``root`` of the animated pack, ``stickers``, the sticker pack's folder, ``options`` of
            `StickerPack`; ``size`` of a frame in pixels; ``layers``, most things on the ground;
            ``motion``, mean way from the first frame to the last, of the side; ``still_share`` of
            grounds; ``animated_share`` of things; ``noise``, mean of its deviation, of the range
            from black to white.
    """

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.loops = AnimatedPack(data["root"], ("real",), ("train",))
        self.stickers = StickerPack(data["stickers"], **data["options"])
        # 0.9 MB a loop, 0.6 GB when all have been seen.
        self.decoded: dict[int, Tensor] = {}

    def scene(self, seed: int) -> tuple[Tensor, Tensor]:
        """Frames ``[3, 3, S, S]`` in [-1, 1], and the motion of what the middle one shows.

        The motion ``[4, S, S]`` leads from places in the middle frame to the same thing in the first
        and in the last, (dx, dy) each, in pixels; what changes inside an animation is not in it.
        """
        rng, size = random.Random(seed), self.data["size"]
        # Drawn at twice the size, for smooth edges.
        canvas = torch.tensor([rng.random() for _ in range(3)]).view(1, 3, 1, 1)
        canvas = canvas.expand(3, 3, 2 * size, 2 * size)
        motion = torch.zeros(4, size, size)
        for layer in range(1 + rng.randint(1, self.data["layers"])):
            theta = self.poses(layer == 0, rng)
            drawn = self.draw(theta, layer == 0, rng)
            canvas = drawn[:, :3] + canvas * (1 - drawn[:, 3:])
            # The plain colour behind the ground moves with it.
            seen = (F.avg_pool2d(drawn[1, 3:], 2) > 0.5) | (layer == 0)
            motion = torch.where(seen, flow(theta, size), motion)
        frames = F.avg_pool2d(canvas, 2)
        noise = min(rng.expovariate(1 / self.data["noise"]), 10 * self.data["noise"])
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        frames = frames + noise * torch.randn(frames.shape, generator=generator)
        return 2 * frames.clamp(0, 1) - 1, motion

    def poses(self, ground: bool, rng: random.Random) -> Tensor:
        """From places on the canvas to places in a sprite, both from -1 to 1: ``[3, 2, 3]``."""
        still = ground and rng.random() < self.data["still_share"]
        reach = 0.0 if still else rng.expovariate(1 / self.data["motion"])
        width = math.exp(rng.uniform(math.log(0.4), math.log(5))) if ground else rng.uniform(0.2, 1)
        x, y = (0.0 if ground else rng.uniform(-0.8, 0.8) for _ in range(2))
        dx, dy, turn, growth = (reach * rng.uniform(-1, 1) for _ in range(4))
        angle = rng.uniform(-math.pi, math.pi) if ground else rng.uniform(-0.5, 0.5)
        turned, wide = angle + turn * STEPS, width * (1 + growth / 2 * STEPS)
        cos, sin = turned.cos() / wide, turned.sin() / wide
        across, down = x + 2 * dx * STEPS, y + 2 * dy * STEPS
        rows = [cos, sin, -cos * across - sin * down, -sin, cos, sin * across - cos * down]
        return torch.stack(rows, dim=-1).view(3, 2, 3)

    def draw(self, theta: Tensor, ground: bool, rng: random.Random) -> Tensor:
        """One layer of all frames, premultiplied RGBA ``[3, 4, 2S, 2S]`` in [0, 1]."""
        side = 2 * self.data["size"]
        sprites = self.sprites(ground, rng)
        pixels = max(8, round(side / float(theta[1, :, 0].norm())))
        if pixels < sprites.shape[-1]:
            sprites = F.interpolate(sprites, size=(pixels, pixels), mode="bilinear", antialias=True)
        grid = F.affine_grid(theta, [3, 4, side, side], align_corners=False)
        beyond = "reflection" if ground else "zeros"
        return F.grid_sample(sprites, grid, padding_mode=beyond, align_corners=False)

    def sprites(self, ground: bool, rng: random.Random) -> Tensor:
        """A sticker three times, or three even frames of a loop: premultiplied ``[3, 4, h, w]``."""
        if ground or rng.random() >= self.data["animated_share"]:
            image = to_tensor(self.stickers.image(rng.randrange(len(self.stickers))))
            return premultiplied(image).expand(3, -1, -1, -1)
        which = rng.randrange(len(self.loops))
        if which not in self.decoded:
            frames = self.loops.clip(which).frames
            self.decoded[which] = ((frames + 1) * 127.5).round().to(torch.uint8)
        frames = from_uint8(self.decoded[which])
        stride = rng.choice((1, 1, 2))
        start = rng.randrange(frames.shape[1] - 2 * stride)
        return premultiplied(frames[:, start : start + 2 * stride + 1 : stride].transpose(0, 1))


def flow(theta: Tensor, size: int) -> Tensor:
    """Poses ``[3, 2, 3]`` -> how things get from the middle to the first and the last frame, pixels
    ``[4, size, size]``."""
    whole = torch.cat([theta, torch.tensor([0.0, 0.0, 1.0]).expand(3, 1, 3)], dim=1)
    moved = torch.linalg.solve(whole[[0, 2]], whole[[1, 1]]) - torch.eye(3)
    grid = F.affine_grid(moved[:, :2], [2, 1, size, size], align_corners=False)
    return grid.movedim(-1, 1).flatten(0, 1) * (size / 2)


def premultiplied(images: Tensor) -> Tensor:
    """RGBA ``[B, 4, H, W]`` in [-1, 1] -> colours times alpha, and alpha, in [0, 1]."""
    images = (images + 1) / 2
    return torch.cat([images[:, :3] * images[:, 3:], images[:, 3:]], dim=1)
