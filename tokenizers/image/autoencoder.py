"""The convolutional autoencoder of latent diffusion, made of diffusers' blocks.

Paper: "High-Resolution Image Synthesis with Latent Diffusion Models" (Rombach et al., CVPR 2022),
arXiv 2112.10752. KL-16 and VAR's tokenizer are this network with attention in the deepest level only.
"""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest upsampling by two and a 3x3 convolution, as one transposed convolution.

    Two of the three rows (and columns) that the convolution reads are copies of one, so their weights
    are added: 4 products an output in place of 9, the same numbers up to rounding.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[C', C, 3, 3]``.

    Returns:
        ``[B, C', 2H, 2W]``.
    """
    kernel = weight.float().flip(2, 3)
    kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
    kernel = (F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))).to(weight.dtype)
    return F.conv_transpose2d(x, kernel.transpose(0, 1), bias, stride=2, padding=1)


class Upsample(nn.Module):
    """`upsample_conv` in place of diffusers' ``Upsample2D``."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x, self.conv.weight, self.conv.bias)


def fold_upsampling(decoder: Decoder) -> None:
    """Replace the upsampling layers of a decoder by `Upsample`; names of weights stay."""
    for block in decoder.up_blocks:
        if block.upsamplers is not None:
            block.upsamplers = nn.ModuleList(Upsample(layer.conv) for layer in block.upsamplers)
