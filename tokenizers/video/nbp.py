"""The tokenizer of Next Block Prediction: Video Generation via Semi-Autoregressive Modeling (Ren et al., 2025).

Paper: arXiv 2502.07737. Code: MIT (RenShuhuai-Andy/NBP). Published checkpoints (no licence text of the
weights was seen): ShuhuaiRen/NBP-tokenizer-ucf, ShuhuaiRen/NBP-tokenizer-k600.

A causal 3D CNN as in MAGVIT-v2 (Yu et al., arXiv 2310.05737) around finite scalar quantization. Every
convolution sees the past only, so a clip may be coded piece by piece with the same result: a convolution
needs no more than its last inputs of the piece before. The first frame is a step of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...modalities.errors import InputError
from ..base import Tokenizer
from ..quantizers.fsq import FSQ

# What the layers keep of the pieces before; None runs a whole clip at once.
Past = dict[nn.Module, Tensor] | None


class CausalConv3d(nn.Module):
    """Convolution over the past; edges of pictures, and the time before the first frame, repeat."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int] = (1, 1)
    ):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv3d(
            channels, out_channels, kernel, stride=(stride[0], stride[1], stride[1])
        )

    def forward(self, x: Tensor, past: Past = None) -> Tensor:
        """``[B, C, T, H, W]`` -> ``[B, C', T', H', W']``; a first piece has an odd number of frames
        where time is halved, later ones an even number."""
        edge, before = self.kernel // 2, self.kernel - 1
        if before == 0:
            return self.conv(x)
        earlier = None if past is None else past.get(self)
        if past is not None:
            keep = self.kernel - self.stride[0]
            known = x if earlier is None else torch.cat([earlier, x], dim=2)
            missing = max(keep - known.shape[2], 0)
            start = known[:, :, :1].expand(-1, -1, missing, -1, -1)
            past[self] = torch.cat([start, known[:, :, -keep:]], dim=2)
        if earlier is None and x.shape[2] == 1:
            # All frames that the kernel sees are this one.
            x = F.pad(x[:, :, 0], (edge, edge, edge, edge), mode="replicate")
            weight, bias = self.conv.weight.sum(2), self.conv.bias
            return F.conv2d(x, weight, bias, stride=self.stride[1])[:, :, None]
        if earlier is None:
            x = F.pad(x, (edge, edge, edge, edge, before, 0), mode="replicate")
        else:
            x = torch.cat([earlier, x], dim=2)
            x = F.pad(x, (edge, edge, edge, edge, 0, 0), mode="replicate")
        return self.conv(x)


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each frame by itself."""

    def __init__(self, channels: int, groups: int):
        super().__init__(groups, channels, eps=1e-5)

    def forward(self, x: Tensor, past: Past = None) -> Tensor:
        frames = x.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


class Swish(nn.Module):
    """``x sigmoid(beta x)`` with a learned beta for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, past: Past = None) -> Tensor:
        return x * torch.sigmoid(self.beta[:, None, None, None] * x)


class Pointwise(nn.Conv3d):
    """The 1x1x1 convolution that ends the encoder."""

    def forward(self, x: Tensor, past: Past = None) -> Tensor:
        return super().forward(x)


class ResidualUnit(nn.Module):
    """Twice norm, Swish, convolution, beside a skip."""

    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                FrameNorm(channels, groups),
                Swish(channels),
                CausalConv3d(channels, out_channels),
                FrameNorm(out_channels, groups),
                Swish(out_channels),
                CausalConv3d(out_channels, out_channels),
            ]
        )
        self.skip = None if channels == out_channels else CausalConv3d(channels, out_channels, 1)

    def forward(self, x: Tensor, past: Past = None) -> Tensor:
        h = x
        for layer in self.layers:
            h = layer(h, past)
        return h + (x if self.skip is None else self.skip(x))


class DepthToSpace(nn.Module):
    """Channels -> (frames, rows, columns); doubling time, the first frame stays one."""

    def __init__(self, time: int, space: int = 2):
        super().__init__()
        self.time, self.space = time, space

    def forward(self, x: Tensor, past: Past = None) -> Tensor:
        x = x.unflatten(1, (self.time, self.space, self.space, -1))
        x = x.permute(0, 4, 5, 1, 6, 2, 7, 3)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        first = past is None or self not in past
        if past is not None:
            past[self] = x[:, :, :0]
        return x[:, :, self.time - 1 :] if first else x


class SpaceToDepth(nn.Module):
    """Squares of pixels -> channels, of each frame."""

    def __init__(self, space: int):
        super().__init__()
        self.space = space

    def forward(self, x: Tensor, past: Past = None) -> Tensor:
        x = x.unflatten(4, (-1, self.space)).unflatten(3, (-1, self.space))
        return x.permute(0, 4, 6, 1, 2, 3, 5).flatten(1, 3)


class TanFSQ(FSQ):
    """FSQ with the published code's bounds: a little inside of the levels, shifted by a tangent."""

    def bound(self, z: Tensor) -> Tensor:
        half = (self.sizes - 1) * (1 - 1e-3) / 2
        offset = torch.where(self.sizes % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.tan(offset / half)) * half - offset


class NBPTokenizer(Tokenizer, ModelMixin, ConfigMixin):
    """Clip <-> a (t, h, w) grid of ids in raster order; t = 1 + k for 1 + 4 k frames, h and w eighths.

    The defaults are the published tokenizers.

    Args:
        image_size, num_frames: of the clips of training; any number 1 + 4 k of frames is coded.
        channels: widths at the finest, the two middle and the coarsest resolution, multiples of
            ``norm_groups``.
        num_blocks: residual units of a resolution; the coarsest has twice as many.
        fsq_levels: of the quantizer.
        patch_size: side of the squares of pixels that the first layer reads at once; with strides to
            match it saves the work at full resolution.
        strides: in time and space, of the three layers that shrink a clip.
        norm_groups: of channels. One channel a group would lose the colour of flat areas.
        end_norms: whether encoder and decoder end with norm and Swish before their last layer; without
            them the brightness of a frame passes as it is.
        latent_mean, latent_std: of each dimension of the codes before they are rounded. With them the
            tokens are these, continuous ``[B, t h w, levels]`` of mean 0 and variance 1, for
            generators that draw no ids; the weights are the same.
    """

    ordered = False
    causal = True
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantizer"]
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        num_frames: int = 17,
        channels: Sequence[int] = (128, 256, 512),
        num_blocks: int = 4,
        fsq_levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        patch_size: int = 1,
        strides: Sequence[tuple[int, int]] = ((1, 2), (2, 2), (2, 2)),
        norm_groups: int = 32,
        end_norms: bool = True,
        latent_mean: Sequence[float] | None = None,
        latent_std: Sequence[float] | None = None,
    ):
        super().__init__()
        if image_size % self.spatial_patch_size or (num_frames - 1) % self.temporal_patch_size:
            raise InputError(
                f"Clips have 1 + {self.temporal_patch_size} k frames with sides that are multiples "
                f"of {self.spatial_patch_size}, got {num_frames} of {image_size} pixels."
            )
        fine, middle, coarse = channels
        first, second, third = (tuple(stride) for stride in strides)
        self.quantizer = TanFSQ(fsq_levels)
        if latent_std is not None:
            self.register_buffer("mean", torch.tensor(latent_mean).float(), persistent=False)
            self.register_buffer("std", torch.tensor(latent_std).float(), persistent=False)
        pixels = 3 * patch_size**2

        def units(width: int, out_width: int, count: int) -> list[nn.Module]:
            widths = [width] + [out_width] * count
            return [ResidualUnit(widths[i], out_width, norm_groups) for i in range(count)]

        def grow(width: int, stride: tuple[int, int]) -> list[nn.Module]:
            time, space = stride
            return [CausalConv3d(width, time * space**2 * width), DepthToSpace(time, space)]

        def end(width: int) -> list[nn.Module]:
            return [FrameNorm(width, norm_groups), Swish(width)] if end_norms else []

        patches = patch_size > 1
        self.encoder = nn.ModuleList(
            [
                *([SpaceToDepth(patch_size)] if patches else []),
                CausalConv3d(pixels, fine),
                *units(fine, fine, num_blocks),
                CausalConv3d(fine, fine, stride=first),
                *units(fine, middle, num_blocks),
                CausalConv3d(middle, middle, stride=second),
                *units(middle, middle, num_blocks),
                CausalConv3d(middle, middle, stride=third),
                *units(middle, coarse, 2 * num_blocks),
                *end(coarse),
                Pointwise(coarse, self.quantizer.dim, 1),
            ]
        )
        self.decoder = nn.ModuleList(
            [
                CausalConv3d(self.quantizer.dim, coarse),
                *units(coarse, coarse, 2 * num_blocks),
                *grow(coarse, third),
                *units(coarse, middle, num_blocks),
                *grow(middle, second),
                *units(middle, middle, num_blocks),
                *grow(middle, first),
                *units(middle, fine, num_blocks),
                *end(fine),
                CausalConv3d(fine, pixels),
                *([DepthToSpace(1, patch_size)] if patches else []),
            ]
        )

    def init_weights(self) -> None:
        """Kaiming normal; residual units begin as their skips, so that signals and gradients pass."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualUnit):
                nn.init.zeros_(module.layers[-1].conv.weight)

    @property
    def temporal_patch_size(self) -> int:
        return prod(time for time, _ in self.config.strides)

    @property
    def spatial_patch_size(self) -> int:
        return self.config.patch_size * prod(space for _, space in self.config.strides)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of a clip of ``num_frames``."""
        side = self.image_size // self.spatial_patch_size
        return 1 + (self.num_frames - 1) // self.temporal_patch_size, side, side

    @property
    def num_tokens(self) -> int:
        steps, rows, columns = self.grid
        return steps * rows * columns

    @property
    def vocab_size(self) -> int | None:
        return self.quantizer.vocab_size if self.latent_dim is None else None

    @property
    def latent_dim(self) -> int | None:
        return None if self.config.latent_std is None else self.quantizer.dim

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_frames(self) -> int:
        return self.config.num_frames

    def encode_latents(self, video: Tensor, past: Past = None) -> Tensor:
        """Clips ``[B, 3, 1 + 4 k, S, S]`` in [-1, 1] -> what the quantizer reads, ``[B, 1 + k, S / 8,
        S / 8, levels]``. Differentiable.

        Args:
            past: filled with what the next piece needs; pieces after the first have 4 k frames.
        """
        x = (video.to(self.dtype) + 1) / 2
        for layer in self.encoder:
            x = layer(x, past)
        return x.movedim(1, -1)

    def decode_codes(self, codes: Tensor, past: Past = None) -> Tensor:
        """Codes ``[B, t, h, w, levels]`` -> clips, about [-1, 1]. Differentiable.

        Args:
            past: filled with what the next piece needs.
        """
        x = codes.to(self.dtype).movedim(-1, 1)
        for layer in self.decoder:
            x = layer(x, past)
        return x * 2 - 1

    def unrounded(self, latents: Tensor) -> Tensor:
        """What `encode_latents` gives -> codes before rounding, float32, as `decode_codes` reads them."""
        return self.quantizer.bound(latents.float()) / (self.quantizer.sizes // 2)

    @torch.no_grad()
    def encode(self, video: Tensor, steps: int = 1) -> Tensor:
        """Clips ``[B, 3, 1 + 4 k, image_size, image_size]`` in [-1, 1] -> ids int64 ``[B, (1 + k) h w]``
        (or latents).

        Args:
            steps: latent frames coded at a time; fewer take less memory, the ids are the same.
        """
        self.check_video(video)
        pieces = list(self.encode_stream(_pieces(video, self.temporal_patch_size, steps)))
        return torch.cat(pieces, dim=1)

    @torch.no_grad()
    def encode_stream(self, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pieces of a clip, ``[B, 3, 1, S, S]`` (or 1 + 4 k frames) and then 4 k frames each -> the ids
        ``[B, k h w]`` of each, as `encode` gives; memory does not grow with the clip."""
        past: Past = {}
        for piece in pieces:
            latents = self.encode_latents(piece, past)
            if self.latent_dim is None:
                yield self.quantizer(latents)[1].flatten(1)
            else:
                latents = (self.unrounded(latents) - self.mean) / self.std
                yield latents.flatten(1, 3)

    @torch.no_grad()
    def decode(self, tokens: Tensor, steps: int = 1) -> Tensor:
        """Ids ``[B, t h w]`` of any t > 0 -> clips ``[B, 3, 1 + 4 (t - 1), image_size, image_size]``,
        about [-1, 1].

        Args:
            steps: latent frames decoded at a time; fewer take less memory, the clip is the same.
        """
        self.check_tokens(tokens)
        whole = self.tokens_per_step
        first, rest = tokens[:, :whole], tokens[:, whole:]
        pieces = [first, *rest.split(steps * whole, dim=1)] if rest.shape[1] else [first]
        return torch.cat(list(self.decode_stream(iter(pieces))), dim=2)

    @torch.no_grad()
    def decode_stream(self, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """Ids ``[B, k h w]`` of one or more latent frames at a time -> their frames as they come: 1
        (and 4 more for each further latent frame) of the first piece, then 4 of each latent frame."""
        past: Past = {}
        for piece in pieces:
            self.check_tokens(piece)
            grid = piece.unflatten(1, (-1, *self.grid[1:]))
            if self.latent_dim is None:
                codes = self.quantizer.ids_to_codes(grid)
            else:
                codes = grid.float() * self.std + self.mean
            yield self.decode_codes(codes, past)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise InputError unless these are the tokens of whole steps."""
        if self.latent_dim is None:
            super().check_tokens(tokens)
        elif (
            tokens.ndim != 3
            or tokens.shape[2] != self.latent_dim
            or not tokens.shape[1]
            or tokens.shape[1] % self.tokens_per_step
        ):
            raise InputError(
                f"This tokenizer decodes latents of shape [batch, k {self.tokens_per_step}, "
                f"{self.latent_dim}], got {list(tokens.shape)}."
            )

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruct, for training.

        Args:
            video: ``[B, 3, 1 + 4 k, S, S]`` in [-1, 1]; k = 0 trains on pictures, as the paper does
                first.

        Returns:
            clips, the quantizer's loss (FSQ has none: 0; L1, perceptual and adversarial losses are
            added to it), values to report.
        """
        self.check_video(video)
        codes, ids = self.quantizer(self.encode_latents(video))
        used = ids.unique().numel() / min(self.quantizer.vocab_size, ids.numel())
        return self.decode_codes(codes), codes.new_zeros(()), {"distinct_ids": torch.tensor(used)}


def _pieces(video: Tensor, stride: int, steps: int) -> Iterator[Tensor]:
    """The first frame, then ``steps`` times ``stride`` frames at a time."""
    yield video[:, :, :1]
    if video.shape[2] > 1:
        yield from video[:, :, 1:].split(steps * stride, dim=2)
