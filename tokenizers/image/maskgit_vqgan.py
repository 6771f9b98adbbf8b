"""MaskGIT's VQGAN: MaskGIT: Masked Generative Image Transformer (Chang et al., CVPR 2022).

Paper: arXiv 2202.04200. Code and weights: Apache-2.0 (google-research/maskgit). Its weights in torch:
``maskgit-vqgan-imagenet-f16-256.bin`` of the hub's fun-research/TiTok (used by TiTok and RAR), and
``vqgan_jax_strongaug.ckpt`` (used by MAGE and ENAT), the same network under other names.

Two-stage TiTok takes its pixel decoder from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...modalities.errors import InputError
from ..base import Tokenizer
from ..quantizers.vq import VectorQuantizer
from .autoencoder import Upsample


class ResBlock(nn.Module):
    """Two convolutions. Where the width changes, the shortcut reads their output, not their input."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class VQGANEncoder(nn.Module):
    """Pictures ``[B, 3, H, W]`` in [0, 1] -> ``[B, z_channels, H / f, W / f]``."""

    def __init__(
        self,
        channel_mult: Sequence[int],
        hidden: int,
        num_res_blocks: int,
        z_channels: int,
        mid_blocks: int | None = None,
    ):
        super().__init__()
        widths = [hidden * mult for mult in (1, *channel_mult)]
        self.conv_in = nn.Conv2d(3, hidden, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            _level(widths[i], widths[i + 1], num_res_blocks) for i in range(len(channel_mult))
        )
        self.mid = _level(widths[-1], widths[-1], mid_blocks or num_res_blocks)
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for i, level in enumerate(self.down):
            if i > 0:
                x = F.avg_pool2d(x, 2)
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQGANDecoder(nn.Module):
    """Codes ``[B, z_channels, h, w]`` -> pictures ``[B, 3, f h, f w]``, about [0, 1]."""

    def __init__(
        self,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        hidden_channels: int = 128,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        mid_blocks: int | None = None,
    ):
        super().__init__()
        widths = [hidden_channels * mult for mult in (*channel_mult, channel_mult[-1])]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _level(widths[-1], widths[-1], mid_blocks or num_res_blocks)
        # Level 0 is the finest, as in the encoder.
        self.up = nn.ModuleList(
            _level(widths[i + 1], widths[i], num_res_blocks) for i in range(len(channel_mult))
        )
        self.upsample = nn.ModuleList(
            Upsample(nn.Conv2d(width, width, 3, padding=1)) for width in widths[1:-1]
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)
            if i > 0:
                x = self.upsample[i - 1](x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _level(in_channels: int, out_channels: int, num_res_blocks: int) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * num_res_blocks
    return nn.Sequential(*(ResBlock(widths[i], widths[i + 1]) for i in range(num_res_blocks)))


class MaskGITVQGAN(Tokenizer, ModelMixin, ConfigMixin):
    """Picture <-> a grid of ids, row by row; no attention.

    Args:
        image_size: side of the square pictures in pixels.
        channel_mult: width of each level, from the finest, in units of ``hidden_channels``; each
            level after the first halves the side.
        num_res_blocks: of each level, in encoder and decoder alike.
        z_channels: width of a code.
        codebook_size: number of ids.
        mid_blocks: residual blocks of the middle; default as many as a level has.
    """

    ordered = False
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        hidden_channels: int = 128,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 1024,
        mid_blocks: int | None = None,
    ):
        super().__init__()
        self.grid, rest = divmod(image_size, 2 ** (len(channel_mult) - 1))
        if rest:
            raise InputError(
                f"image_size must be a multiple of {2 ** (len(channel_mult) - 1)}, got {image_size}."
            )
        widths = (channel_mult, hidden_channels, num_res_blocks, z_channels, mid_blocks)
        self.encoder = VQGANEncoder(*widths)
        self.decoder = VQGANDecoder(*widths)
        self.quantizer = VectorQuantizer(codebook_size, z_channels)

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def token_grid(self) -> int:
        return self.grid

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, image_size, image_size]`` in [-1, 1] -> ids int64 ``[B, num_tokens]``."""
        self.check_images(images)
        z = self.encoder((images.to(self.dtype) + 1) / 2)
        return self.quantizer.nearest(z.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Ids ``[B, num_tokens]`` -> pictures ``[B, 3, image_size, image_size]``, about [-1, 1]."""
        self.check_tokens(tokens)
        codes = self.quantizer.ids_to_codes(tokens).to(self.dtype)
        codes = codes.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.decoder(codes) * 2 - 1
