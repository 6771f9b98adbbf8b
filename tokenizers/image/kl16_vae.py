"""KL-16, the image VAE of MAR: "Autoregressive Image Generation without Vector Quantization".

Paper: Li et al., NeurIPS 2024, arXiv 2406.11838. Code: MIT. Published checkpoint: kl16.ckpt (link in
the README of LTH14/mar; also vae/kl16.ckpt of Epiphqny/TokenBridge). xAR, Hi-MAR, FlowAR and
TokenBridge generate its latents.

Stride 16, 16 channels; the network is diffusers' `AutoencoderKL`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ...modalities.errors import InputError
from ..base import Tokenizer
from .autoencoder import fold_upsampling


class KL16VAE(Tokenizer, ModelMixin, ConfigMixin):
    """Pictures <-> a grid of continuous tokens in raster order.

    Args:
        image_size: side of the pictures of `encode` and `decode`; `encode_latents` and
            `decode_latents` take any size that the stride divides.
        block_out_channels: width of each level, full resolution first.
        down_block_types, up_block_types: of diffusers, one a level.
        layers_per_block: residual blocks a level (one more in the decoder).
        latent_channels: width of a token.
        scaling_factor: latents are multiplied by it; every published generator expects this.
    """

    vocab_size = None
    ordered = False
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512),
        down_block_types: Sequence[str] = (*["DownEncoderBlock2D"] * 4, "AttnDownEncoderBlock2D"),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",) * 5,
        layers_per_block: int = 2,
        latent_channels: int = 16,
        scaling_factor: float = 0.2325,
    ):
        super().__init__()
        self.vae = AutoencoderKL(
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            sample_size=image_size,
            scaling_factor=scaling_factor,
        )
        fold_upsampling(self.vae.decoder)

    @property
    def stride(self) -> int:
        """Pixels a token, along each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def token_grid(self) -> int:
        return self.image_size // self.stride

    @property
    def latent_dim(self) -> int:
        return self.config.latent_channels

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.stride) ** 2

    def posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        """Pictures ``[B, 3, H, W]`` in [-1, 1] -> the Gaussian of their unscaled latents.

        Its ``parameters`` ``[B, 2 * latent_dim, h, w]`` are what a cache of latents should keep.

        Raises:
            InputError: a side that the stride does not divide.
        """
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or any(s % self.stride for s in images.shape[2:])
        ):
            raise InputError(
                f"This VAE reads pictures [batch, 3, height, width] with sides divisible by "
                f"{self.stride}, got {list(images.shape)}: resize them first."
            )
        images = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.vae.encode(images).latent_dist

    def encode_latents(
        self,
        images: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [-1, 1] -> scaled latents ``[B, latent_dim, h, w]``.

        The mean of the posterior, or a sample of it where there is a generator (one, or one an item);
        the published generators are trained on samples.
        """
        posterior = self.posterior(images)
        if generator is None:
            return posterior.mode() * self.config.scaling_factor
        if isinstance(generator, Sequence):
            generator = list(generator)
        return posterior.sample(generator) * self.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents ``[B, latent_dim, h, w]`` -> pictures ``[B, 3, H, W]``, not clamped."""
        latents = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.vae.decode(latents / self.config.scaling_factor).sample

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Pictures ``[B, 3, image_size, image_size]`` in [-1, 1] -> float ``[B, num_tokens, latent_dim]``.

        Raises:
            InputError: pictures of another size.
        """
        self.check_images(images)
        return self.encode_latents(images, generator).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Scaled latents ``[B, num_tokens, latent_dim]`` -> pictures, not clamped.

        Raises:
            InputError: latents of another shape.
        """
        self.check_latents(tokens)
        side = self.image_size // self.stride
        return self.decode_latents(tokens.transpose(1, 2).unflatten(2, (side, side)))
