"""VAR's tokenizer, a multi-scale VQ-VAE: "Visual Autoregressive Modeling: Scalable Image Generation
via Next-Scale Prediction" (Tian et al., NeurIPS 2024).

Paper: arXiv 2404.02905. Code and weights: MIT. Published checkpoint: vae_ch160v4096z32.pth of
FoundationVision/var, for 256 and 512 pixels.

A convolutional encoder makes latents at stride 16; residual quantization turns them into maps of ids
from 1x1 to the full grid, so that a few tokens already decode to a blurred picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from ..base import Tokenizer
from ..quantizers.residual import MultiScaleResidualVQ
from ..quantizers.vq import codebook_use
from .autoencoder import fold_upsampling


class MultiScaleVQVAE(Tokenizer, ModelMixin, ConfigMixin):
    """Pictures <-> ids of all scales, coarse to fine, each map in raster order.

    Args:
        vocab_size: codes, shared by all scales.
        code_dim: width of a code (z_channels).
        block_out_channels: width of each level, full resolution first.
        patch_nums: side of each scale's map; the last one times the stride is the picture's side.
        num_phi, phi_ratio, beta, revive: of `MultiScaleResidualVQ`.
    """

    ordered = True
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantizer"]
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        code_dim: int = 32,
        block_out_channels: Sequence[int] = (160, 160, 320, 320, 640),
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        revive: bool = False,
    ):
        super().__init__()
        plain = len(block_out_channels) - 1
        self.encoder = Encoder(
            out_channels=code_dim,
            down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
            block_out_channels=block_out_channels,
            double_z=False,
        )
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.quantizer = MultiScaleResidualVQ(
            vocab_size, code_dim, patch_nums, num_phi, phi_ratio, beta, revive
        )
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.decoder = Decoder(
            in_channels=code_dim,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
            block_out_channels=block_out_channels,
        )
        fold_upsampling(self.decoder)

    @property
    def image_size(self) -> int:
        return self.config.patch_nums[-1] * 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def token_grid(self) -> int:
        return self.config.patch_nums[-1]

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def num_tokens(self) -> int:
        return self.quantizer.num_tokens

    def encode_latents(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [-1, 1] -> latents before quantization ``[B, code_dim, h, w]``."""
        images = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(images))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Summed codes ``[B, code_dim, h, w]`` -> pictures ``[B, 3, H, W]``, not clamped."""
        latents = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, image_size, image_size]`` in [-1, 1] -> ids int64 ``[B, num_tokens]``.

        Raises:
            InputError: pictures of another size.
        """
        self.check_images(images)
        return self.quantizer(self.encode_latents(images))[1]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Ids ``[B, k]`` -> pictures, clamped to [-1, 1] as the published decoder does.

        Any k from 1 on decodes; ids of a scale that is not whole do not count.

        Raises:
            InputError: too many ids, or one outside the codebook.
        """
        self.check_tokens(tokens)
        return self.decode_latents(self.quantizer.ids_to_codes(tokens)).clamp(-1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 reconstruction and quantization losses (section 3.1, without its perceptual and GAN terms).

        Args:
            images: ``[B, 3, image_size, image_size]`` in [-1, 1].
        """
        self.check_images(images)
        codes, ids, quantization = self.quantizer(self.encode_latents(images))
        reconstruction = F.l1_loss(self.decode_latents(codes).float(), images.float())
        return reconstruction + quantization, {
            "l1": reconstruction.detach(),
            "vq": quantization.detach(),
            **codebook_use(ids, self.vocab_size),
        }
