"""VFIMamba: Video Frame Interpolation with State Space Models (Zhang et al., NeurIPS 2024).

Paper: arXiv 2407.02315. Code and weights: Apache-2.0. Published checkpoints: MCG-NJU/VFIMamba_S,
MCG-NJU/VFIMamba.

Two frames pass one feature extractor; in its deepest stages their pixels are interleaved and scanned
together (S6). From the features a flow from the middle frame to both is estimated, coarse to fine; the
frames warped by it are joined, and a U-Net adds what is missing. Inside, frames are in [0, 1] with
channels in the order blue, green, red, as the published weights want them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ...kernels.selective_scan.ops import selective_scan
from ...modalities.errors import InputError
from ..layers.mamba import init_dt_bias_

MULTIPLE = 32  # Sides of a frame inside the network.
LOCAL = ("full", "reduced", "none")


def resize(x: Tensor, factor: float) -> Tensor:
    """Bilinear, corners not aligned."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Backward warp: ``[B, C, H, W]`` read at ``p + flow(p)``; flow ``[B, 2, H, W]`` (dx, dy) in pixels.

    Bilinear; beyond the border the border goes on.
    """
    height, width = x.shape[2:]
    # Places in a picture need more digits than half precision has.
    dtype = torch.promote_types(x.dtype, torch.float32)
    flow, options = flow.to(dtype), {"device": x.device, "dtype": dtype}
    columns = torch.linspace(-1, 1, width, **options) + flow[:, 0] * (2 / (width - 1))
    rows = torch.linspace(-1, 1, height, **options)[:, None] + flow[:, 1] * (2 / (height - 1))
    grid = torch.stack([columns, rows], dim=-1)
    y = F.grid_sample(x.to(dtype), grid, padding_mode="border", align_corners=True)
    return y.to(x.dtype)


@lru_cache(maxsize=16)
def scan_orders(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Orders of the scans over two frames, whose pixels lie frame after frame, row by row.

    Returns:
        int64 ``[2 rows columns]`` each: the places that the scan along rows visits, those that the
        scan along columns visits (the frames take turns in both), and the place whose result of the
        second scan counts at a place. The last is not the identity: the published code reads the
        two halves of the column-wise sequence back as if each were one frame, and its weights were
        trained so.
    """
    places = torch.arange(2 * rows * columns, device=device).view(2, rows, columns)
    by_rows = places.flatten(1).T.flatten()
    by_columns = places.permute(2, 1, 0).flatten()
    read = torch.empty_like(by_rows)
    read[by_rows] = by_columns.view(2, columns, rows).transpose(1, 2).flatten()
    return by_rows, by_columns, read


class SS2D(nn.Module):
    """Selective scans over both frames, along rows and along columns, forwards and backwards.

    Direction k = 0 .. 3 of the weights: rows, columns, rows reversed, columns reversed.
    """

    def __init__(self, dim: int, d_state: int = 16):
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.split = (rank, d_state, d_state)
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj = nn.Parameter(torch.empty(4, rank + 2 * d_state, inner))
        self.dt_proj = nn.Parameter(torch.empty(4, inner, rank))
        self.dt_bias = nn.Parameter(torch.empty(4, inner))
        self.A_log = nn.Parameter(torch.empty(4, inner, d_state))
        self.D = nn.Parameter(torch.ones(4, inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = Linear(inner, dim, bias=False)
        nn.init.uniform_(self.x_proj, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_proj, -(rank**-0.5), rank**-0.5)
        init_dt_bias_(self.dt_bias, 0.001, 0.1, 1e-4)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, d_state + 1).float().log())

    def forward(self, h: Tensor) -> Tensor:
        """``[2 B, H, W, C]``, the first frames and then the second ones -> the same shape."""
        frames, rows, columns, _ = h.shape
        x, z = self.in_proj(h).chunk(2, dim=-1)
        x = F.silu(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        x = x.unflatten(0, (2, frames // 2)).flatten(2, 3).transpose(0, 1).flatten(1, 2)
        steps, B, C = (
            linear(x, self.x_proj.flatten(0, 1))
            .unflatten(-1, (4, -1))
            .permute(2, 0, 1, 3)
            .split(self.split, dim=-1)
        )
        delta = steps @ self.dt_proj.transpose(1, 2)[:, None]
        A = -self.A_log.float().exp()

        def scan(axis: int, order: Tensor) -> Tensor:
            k = slice(axis, None, 2)
            return selective_scan(
                x.mT,
                delta[k].mT,
                A[k],
                B[k].mT,
                C[k].mT,
                D=self.D[k].sum(0),
                delta_bias=self.dt_bias[k],
                delta_softplus=True,
                direction="both",
                order=order,
            ).mT

        by_rows, by_columns, read = scan_orders(rows, columns, h.device)
        y = scan(0, by_rows) + scan(1, by_columns)[:, read]
        y = y.unflatten(1, (2, rows, columns)).transpose(0, 1).flatten(0, 1)
        return self.out_proj(self.out_norm(y) * F.silu(z))


class ChannelAttention(nn.Sequential):
    """Each channel times a gate made of all channels' means (arXiv 1807.02758)."""

    def __init__(self, dim: int, squeeze: int = 30):
        hidden = max(1, dim // squeeze)
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, dim, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x)


class MixedSSMBlock(nn.Module):
    """Scans, then convolutions with channel attention; both residual with learned scales."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.scan = SS2D(dim)
        self.scale1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim)
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim // 3, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 3, dim, 3, padding=1),
            ChannelAttention(dim),
        )
        self.scale2 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[2 B, C, H, W]`` -> the same shape, channels last in memory."""
        h = x.permute(0, 2, 3, 1)
        h = h * self.scale1 + self.scan(self.norm1(h))
        update = self.conv(self.norm2(h).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (h * self.scale2 + update).permute(0, 3, 1, 2)


class NormDown(nn.Module):
    """LayerNorm over channels, then a convolution of stride 2."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.proj = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def conv_prelu(in_dim: int, dim: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1), nn.PReLU(dim))


def deconv_prelu(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(in_dim, dim, 4, stride=2, padding=1), nn.PReLU(dim))


class FeatureExtractor(nn.Module):
    """Convolutions at scales 1, 1/2, 1/4; mixed SSM blocks at 1/8, 1/16."""

    def __init__(self, dims: Sequence[int], depths: Sequence[int]):
        super().__init__()
        self.downs = nn.ModuleList([nn.Identity()])
        self.blocks = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if i > 0:
                down = conv_prelu(dims[i - 1], dim, 2) if i < 3 else NormDown(dims[i - 1], dim)
                self.downs.append(down)
            if i < 3:
                layers = [
                    layer
                    for j in range(depth)
                    for layer in conv_prelu(3 if i + j == 0 else dim, dim)
                ]
            else:
                layers = [MixedSSMBlock(dim) for _ in range(depth)]
            self.blocks.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[2 B, 3, H, W]``, sides multiples of 16 -> a map ``[2 B, C_i, H / 2^i, W / 2^i]`` a stage."""
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(down(x))
            maps.append(x)
        return maps


class Motion(NamedTuple):
    """Where the middle frame's pixels are in the two frames.

    Attributes:
        flow: ``[B, 4, H, W]``, (dx, dy) to the first frame, then to the second, in pixels.
        mask: logit of the first frame's share, ``[B, 1, H, W]``.
        warped: both frames warped, ``[B, 6, H, W]``.
    """

    flow: Tensor
    mask: Tensor
    warped: Tensor

    @property
    def merged(self) -> Tensor:
        """``[B, 3, H, W]``."""
        first, second = self.warped.chunk(2, dim=1)
        return torch.lerp(second, first, self.mask.sigmoid())


def warp_both(images: Tensor, flow: Tensor) -> Tensor:
    """``[B, 2 C, H, W]`` (both frames) by ``[B, 4, H, W]``."""
    pairs = zip(images.chunk(2, dim=1), flow.chunk(2, dim=1), strict=True)
    return torch.cat([warp(image, part) for image, part in pairs], dim=1)


class FlowBlock(nn.Module):
    """An increment of flow and mask from a level's features, at a quarter of the level's scale."""

    def __init__(self, in_dim: int, dim: int, scale: int):
        super().__init__()
        self.scale = scale
        self.conv = nn.Sequential(conv_prelu(in_dim, dim), conv_prelu(dim, dim), conv_prelu(dim, 5))

    def forward(self, features: Tensor, images: Tensor, flow: Tensor | None) -> Tensor:
        """``[B, 2 C, H / scale, W / scale]``, ``[B, k, H, W]`` -> flow and mask ``[B, 5, H, W]``."""
        factor = 4 / self.scale
        parts = [F.pixel_shuffle(F.pixel_shuffle(features, 2), 2), resize(images, factor)]
        if flow is not None:
            parts.append(resize(flow, factor) * factor)
        x = resize(self.conv(torch.cat(parts, dim=1)), 1 / factor)
        return torch.cat([x[:, :4] / factor, x[:, 4:]], dim=1)


class LocalBlock(nn.Module):
    """An increment of flow and mask from the frames and the frames warped so far."""

    def __init__(self, dim: int, scale: int):
        super().__init__()
        self.scale = scale
        self.down = nn.Sequential(conv_prelu(17, dim // 2, 2), conv_prelu(dim // 2, dim, 2))
        self.body = nn.Sequential(*(conv_prelu(dim, dim) for _ in range(8)))
        self.up = nn.ConvTranspose2d(dim, 5, 4, stride=2, padding=1)

    def forward(self, images: Tensor, motion: Motion) -> Tensor:
        x = torch.cat([images, motion.warped, motion.mask, motion.flow / self.scale], dim=1)
        x = self.down(resize(x, 1 / self.scale))
        x = resize(self.up(x + self.body(x)), 2 * self.scale)
        return torch.cat([x[:, :4] * (2 * self.scale), x[:, 4:]], dim=1)


class Refinement(nn.Module):
    """The U-Net: what the merged frames lack, in -1 to 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.downs = nn.ModuleList(
            nn.Sequential(conv_prelu(in_dim, out_dim, 2), conv_prelu(out_dim, out_dim))
            for in_dim, out_dim in (
                (17 + dim, 2 * dim),
                (4 * dim, 4 * dim),
                (8 * dim, 8 * dim),
                (16 * dim, 16 * dim),
            )
        )
        self.ups = nn.ModuleList(
            deconv_prelu(in_dim, out_dim)
            for in_dim, out_dim in (
                (32 * dim, 8 * dim),
                (16 * dim, 4 * dim),
                (8 * dim, 2 * dim),
                (4 * dim, dim),
            )
        )
        self.conv = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, images: Tensor, motion: Motion, features: Sequence[Tensor]) -> Tensor:
        """Frames ``[B, 6, H, W]`` and the extractor's five maps -> ``[B, 3, H, W]``."""
        x = torch.cat([images, motion.warped, motion.mask, motion.flow], dim=1)
        flow, skips = motion.flow, []
        for i, maps in enumerate(features):
            if i > 0:
                flow = resize(flow, 0.5) * 0.5
            x = torch.cat([x, warp_both(torch.cat(maps.chunk(2), dim=1), flow)], dim=1)
            if i < len(self.downs):
                x = self.downs[i](x)
                skips.append(x)
        for up, skip in zip(self.ups, (*skips[2::-1], None), strict=True):
            x = up(x)
            x = x if skip is None else torch.cat([x, skip], dim=1)
        return 2 * self.conv(x).sigmoid() - 1


def laplacian_loss(x: Tensor, y: Tensor, levels: int = 5) -> Tensor:
    """Mean absolute differences of two Laplacian pyramids ``[B, C, H, W]``, added over the levels.

    Each level holds what a binomial blur of five taps takes away; the last one is what is left.
    """
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device, dtype=x.dtype) / 16
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 5, 5)

    def blur(image: Tensor) -> Tensor:
        image = F.pad(image, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(image, kernel, groups=len(kernel))

    difference, loss = x - y, x.new_zeros(())
    for level in range(levels):
        if level == levels - 1 or min(difference.shape[2:]) < 6:
            break
        low = blur(difference)[:, :, ::2, ::2]
        up = F.interpolate(low, size=difference.shape[2:], mode="bilinear", align_corners=False)
        loss = loss + (difference - up).abs().mean()
        difference = low
    return loss + difference.abs().mean()


class VFIMamba(ModelMixin, ConfigMixin):
    """Two frames -> a frame between them. The defaults are VFIMamba-S.

    Args:
        dim: channels of the first stage; each further stage doubles them (VFIMamba: 32).
        depths: layers of the five stages.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, dim: int = 16, depths: Sequence[int] = (2, 2, 2, 3, 3)):
        super().__init__()
        dims = [dim * 2**i for i in range(5)]
        self.features = FeatureExtractor(dims, depths)
        self.flow_blocks = nn.ModuleList(
            FlowBlock(2 * dims[level] // 16 + images, 4 * dim, 2**level)
            for level, images in ((4, 7), (3, 18))
        )
        self.local_blocks = nn.ModuleList(LocalBlock(4 * dim, scale) for scale in (2, 1))
        self.refinement = Refinement(2 * dim)
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                nn.init.zeros_(module.bias)

    def _add(self, images: Tensor, motion: Motion | None, change: Tensor) -> Motion:
        flow, mask = change[:, :4], change[:, 4:]
        if motion is not None:
            flow, mask = motion.flow + flow, motion.mask + mask
        return Motion(flow, mask, warp_both(images, flow))

    def estimate(
        self, images: Tensor, timestep: float | Tensor, features: Sequence[Tensor]
    ) -> Iterator[Motion]:
        """The motion after each of the two flow blocks.

        Args:
            images: both frames ``[B, 6, H, W]`` in [0, 1].
            timestep: place of the wanted frame, 0 to 1, for all or ``[B]``.
            features: of these frames.
        """
        time = torch.as_tensor(timestep, dtype=images.dtype, device=images.device)
        time = time.view(-1, 1, 1, 1).expand_as(images[:, :1])
        motion = None
        for block, maps in zip(self.flow_blocks, (features[4], features[3]), strict=True):
            maps = torch.cat(maps.chunk(2), dim=1)
            if motion is None:
                change = block(maps, torch.cat([images, time], dim=1), None)
            else:
                seen = torch.cat([images, motion.warped, motion.mask, time], dim=1)
                change = block(maps, seen, motion.flow)
            motion = self._add(images, motion, change)
            yield motion

    def sharpen(self, images: Tensor, motion: Motion) -> Iterator[Motion]:
        """The motion after each of the two local blocks."""
        for block in self.local_blocks:
            motion = self._add(images, motion, block(images, motion))
            yield motion

    def motion(
        self,
        images: Tensor,
        timestep: float | Tensor,
        flow_scale: float = 1.0,
        local: str = "full",
    ) -> tuple[Motion, list[Tensor] | None]:
        """The last motion, at full size, and the features of the frames at the flow's size.

        Args:
            images: both frames ``[B, 6, H, W]`` in [0, 1], sides multiples of 32 / flow_scale.
            flow_scale: the flow is estimated on frames of this size; published: 0.5 for 2K, 0.25
                for 4K.
            local: local blocks work at "full" size, at "reduced" size (that of the flow), or "none".

        Raises:
            InputError: an unknown ``local``.
        """
        if local not in LOCAL:
            raise InputError(f'Unknown local="{local}": use one of {", ".join(LOCAL)}.')
        small = resize(images, flow_scale)
        features = self.features(torch.cat(small.chunk(2, dim=1)))
        motion = _last(self.estimate(small, timestep, features))
        if local == "reduced":
            motion = _last(self.sharpen(small, motion))
        if flow_scale != 1:
            flow = resize(motion.flow, 1 / flow_scale) / flow_scale
            mask = resize(motion.mask, 1 / flow_scale)
            motion = Motion(flow, mask, warp_both(images, flow))
        if local == "full":
            motion = _last(self.sharpen(images, motion))
        return motion, features

    def refine(self, images: Tensor, motion: Motion, features: Sequence[Tensor]) -> Tensor:
        """The middle frame ``[B, 3, H, W]``, not clamped; all at one size."""
        return motion.merged + self.refinement(images, motion, features)

    def predict(
        self,
        images: Tensor,
        timestep: float | Tensor = 0.5,
        flow_scale: float = 1.0,
        local: str = "full",
        tile: int | None = None,
        overlap: int = 64,
    ) -> Tensor:
        """The published network: frames ``[B, 6, H, W]`` in [0, 1] -> ``[B, 3, H, W]`` in [0, 1].

        Arguments as of `motion` and `interpolate`.
        """
        motion, features = self.motion(images, timestep, flow_scale, local)
        if tile is not None:
            return self._refine_tiled(images, motion, tile, overlap).clamp(0, 1)
        if flow_scale != 1:
            features = self.features(torch.cat(images.chunk(2, dim=1)))
        return self.refine(images, motion, features).clamp(0, 1)

    def _refine_tiled(self, images: Tensor, motion: Motion, tile: int, overlap: int) -> Tensor:
        """`refine` in overlapping tiles, blended by linear ramps; features see their tile alone."""
        total = torch.zeros_like(motion.merged)
        weights = torch.zeros_like(total[:1, :1])
        height, width = images.shape[2:]
        for rows in _spans(height, tile, overlap):
            for columns in _spans(width, tile, overlap):
                here = (..., rows, columns)
                part = images[here]
                features = self.features(torch.cat(part.chunk(2, dim=1)))
                refined = self.refine(part, Motion(*(t[here] for t in motion)), features)
                ramps = [_ramp(s.stop - s.start, overlap, images) for s in (rows, columns)]
                weight = ramps[0][:, None] * ramps[1]
                total[here] += refined * weight
                weights[here] += weight
        return total / weights

    def forward(
        self,
        frame0: Tensor,
        frame1: Tensor,
        target: Tensor,
        timestep: float | Tensor = 0.5,
        decibels: float = 0.0,
        flow: Tensor | None = None,
        pull: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Laplacian losses of the prediction and, with weight 0.5, of each stage's merged frames.

        The training code is not published: the loss is that of the paper, the weight of the stages is
        that of its forerunner (EMA-VFI, arXiv 2303.00440).

        Args:
            frame0, frame1, target: ``[B, 3, H, W]`` in [-1, 1], sides multiples of 32.
            timestep: of the target, 0 to 1, for all or ``[B]``.
            decibels: weight of minus the prediction's PSNR in dB (its mean over the items). A hardly
                moving pair, where little is left to win by any other measure, then counts as much as
                others ("Simple Baselines for Image Restoration", arXiv 2204.04676, trains by it alone).
            flow: true motion ``[B, 4, H, W]`` in pixels from the target to frame0 and frame1, where
                it is known, as in drawn scenes.
            pull: weight of the distance in pixels of each stage's flow to it, as IFRNet (arXiv
                2205.14620) pulls its flows to those of a teacher.

        Raises:
            InputError: sides that are no multiples of 32.
        """
        if frame0.shape[2] % MULTIPLE or frame0.shape[3] % MULTIPLE:
            raise InputError(
                f"Training needs sides that are multiples of {MULTIPLE}, got "
                f"{frame0.shape[3]}x{frame0.shape[2]}: crop the frames."
            )
        images = torch.cat([_to_network(frame0), _to_network(frame1)], dim=1)
        truth = _to_network(target)
        features = self.features(torch.cat(images.chunk(2, dim=1)))
        motions = list(self.estimate(images, timestep, features))
        motions += self.sharpen(images, motions[-1])
        predicted = self.refine(images, motions[-1], features).clamp(0, 1)
        final = laplacian_loss(predicted, truth)
        stages = sum(laplacian_loss(motion.merged, truth) for motion in motions)
        mse = (predicted - truth).square().mean((1, 2, 3))
        psnr = -10 * mse.clamp(min=1e-7).log10().mean()
        loss = final + 0.5 * stages - decibels * psnr
        parts = {"laplacian": final, "stages": stages, "psnr": psnr}
        if flow is not None:
            pixels = [(m.flow - flow).unflatten(1, (2, 2)).norm(dim=2).mean() for m in motions]
            loss = loss + pull * sum(pixels)
            parts["pixels"] = pixels[-1]
        return loss, {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def interpolate(
        self,
        frame0: Tensor,
        frame1: Tensor,
        timestep: float = 0.5,
        flow_scale: float | None = None,
        tta: bool = False,
        tile: int | None = None,
        overlap: int = 64,
    ) -> Tensor:
        """The frame between two, of any size: ``[B, 3, H, W]`` in [-1, 1] -> the same shape.

        Frames are padded by their border to sides that the network takes.

        Args:
            timestep: 0 to 1 (exclusive); the published weights are used at 0.5.
            flow_scale: 1, 1/2, 1/4 or 1/8: the motion is looked for in frames of this size. Default
                1; with tiles the largest that fits into one.
            tta: also interpolate the frames turned by 180 degrees and average (published for the
                large model).
            tile: side of the squares in which large frames are refined, so that memory does not grow
                with the features of the whole frame. The motion is that of the whole frame.
            overlap: of the tiles, in pixels.

        Raises:
            InputError: frames of different shapes, or a setting out of range.
        """
        if frame0.shape != frame1.shape or frame0.ndim != 4 or frame0.shape[1] != 3:
            raise InputError(
                "Two frames of shape [batch, 3, height, width] are needed, got "
                f"{list(frame0.shape)} and {list(frame1.shape)}."
            )
        if not 0 < timestep < 1:
            raise InputError(f"The time must lie between 0 and 1, got {timestep}.")
        if tile is not None and (tile % MULTIPLE or not 0 <= overlap <= tile // 2):
            raise InputError(
                f"Tiles need a side that is a multiple of {MULTIPLE} and an overlap of at most half "
                f"of it, got {tile} and {overlap}."
            )
        height, width = frame0.shape[2:]
        if flow_scale is None:
            shrink = 0 if tile is None else math.ceil(math.log2(max(height, width, tile) / tile))
            flow_scale = 1 / 2 ** min(shrink, 3)
        if flow_scale not in (1, 0.5, 0.25, 0.125):
            raise InputError(f"flow_scale must be 1, 0.5, 0.25 or 0.125, got {flow_scale}.")
        multiple = round(MULTIPLE / flow_scale)
        down, right = -height % multiple, -width % multiple
        top, left = down // 2, right // 2
        images = torch.cat([_to_network(frame0), _to_network(frame1)], dim=1).to(self.dtype)
        images = F.pad(images, (left, right - left, top, down - top), mode="replicate")
        local = "full" if tile is None else "reduced"
        settings = (timestep, flow_scale, local, tile, overlap)
        middle = self.predict(images, *settings)
        if tta:
            turned = self.predict(images.flip(2, 3), *settings).flip(2, 3)
            middle = (middle + turned) / 2
        middle = middle[:, :, top : top + height, left : left + width]
        return (middle.flip(1) * 2 - 1).to(frame0.dtype)

    def stream(
        self,
        frames: Iterable[Tensor],
        factor: int = 2,
        callback: Callable[[int], None] | None = None,
        **settings,
    ) -> Iterator[Tensor]:
        """A clip with ``factor`` times the frames: each frame and then those before the next.

        Powers of two halve the intervals again and again, as published; other factors ask for the
        times between. Only two frames (and what lies between) are held at a time.

        Args:
            frames: ``[B, 3, H, W]`` in [-1, 1] each.
            factor: 2 or more.
            callback: ``(frames yielded)`` after each; closing the iterator stops.
            settings: of `interpolate`.

        Raises:
            InputError: a factor below 2, or fewer than two frames.
        """
        if factor < 2:
            raise InputError(f"The factor must be 2 or more, got {factor}.")
        count, last = 0, None
        for first, last in pairwise(frames):
            for frame in (first, *self._between(first, last, factor, settings)):
                yield frame
                count += 1
                if callback is not None:
                    callback(count)
        if last is None:
            raise InputError("Interpolation needs a clip of two frames or more.")
        yield last

    def _between(
        self, first: Tensor, last: Tensor, factor: int, settings: dict
    ) -> Iterator[Tensor]:
        if factor & (factor - 1):
            for i in range(1, factor):
                yield self.interpolate(first, last, i / factor, **settings)
            return
        middle = self.interpolate(first, last, **settings)
        if factor > 2:
            yield from self._between(first, middle, factor // 2, settings)
        yield middle
        if factor > 2:
            yield from self._between(middle, last, factor // 2, settings)


def _to_network(frames: Tensor) -> Tensor:
    """RGB in [-1, 1] -> BGR in [0, 1]."""
    return (frames.flip(1) + 1) / 2


def _last(items: Iterator[Motion]) -> Motion:
    return deque(items, maxlen=1)[0]


def _spans(size: int, tile: int, overlap: int) -> list[slice]:
    """Slices of ``tile`` places that cover ``size``; neighbours share ``overlap`` or more."""
    if size <= tile:
        return [slice(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [slice(start, start + tile) for start in starts]


def _ramp(size: int, overlap: int, like: Tensor) -> Tensor:
    """Weights that rise over the first ``overlap`` places and fall over the last."""
    distance = torch.arange(size, device=like.device, dtype=like.dtype) + 1
    distance = torch.minimum(distance, distance.flip(0))
    return (distance / max(overlap, 1)).clamp(max=1)
