"""TiTok: An Image is Worth 32 Tokens for Reconstruction and Generation (Yu et al., NeurIPS 2024).

Paper: arXiv 2406.07550. Code: Apache-2.0 (bytedance/1d-tokenizer). Published checkpoints
(yucornetto/tokenizer_titok_*; tagged Apache-2.0, "for research purposes"): two-stage l32, b64, s128;
single-stage bl64_vq8k, bl128_vq8k, sl256_vq8k; single-stage continuous ll32_vae_c16, bl64_vae_c16,
bl128_vae_c16.

A ViT reads the patches of a picture together with K latent tokens, of which alone it keeps the outputs;
they are quantized, or are the moments of a Gaussian. A second ViT reads them beside a grid of equal mask
tokens and writes pixels, or, in the two-stage models, logits over the codes of a MaskGIT-VQGAN, whose
decoder writes the pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ...modalities.errors import InputError
from ..base import Tokenizer
from ..quantizers.vq import VectorQuantizer, codebook_use
from .maskgit_vqgan import VQGANDecoder


class Attention(nn.Module):
    """Multi-head self-attention of which only some rows are asked for."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, rows: slice, mask: Tensor | None = None) -> Tensor:
        """``[B, S, D]``, mask broadcastable to ``[B, heads, R, S]`` -> outputs of ``rows``, ``[B, R, D]``."""
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        if rows == slice(None):
            q, k, v = linear(x, weight, bias).chunk(3, dim=-1)
        else:
            q = linear(x[:, rows], weight[:dim], bias[:dim])
            k, v = linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(Linear(dim, 4 * dim), nn.GELU(), Linear(4 * dim, dim))

    def forward(self, x: Tensor, rows: slice = slice(None), mask: Tensor | None = None) -> Tensor:
        """``[B, S, D]`` -> the outputs of ``rows``, ``[B, R, D]``; mask as in `Attention`."""
        x, h = x[:, rows], self.attn(self.ln_1(x), rows, mask)
        x = x + h
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks between two LayerNorms, of which only some rows are read in the end."""

    def __init__(self, dim: int, depth: int, heads: int):
        super().__init__()
        self.ln_pre = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(dim)

    def forward(self, x: Tensor, rows: slice, mask: Tensor | None = None) -> Tensor:
        """Tokens after `ln_pre` ``[B, S, D]`` -> ``[B, R, D]``; the last block computes no others.

        A mask hides keys, the same ones from every query: ``[B, 1, 1, S]``.
        """
        for block in self.blocks[:-1]:
            x = block(x, mask=mask)
        return self.ln_post(self.blocks[-1](x, rows, mask))

    def _init_tokens(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


class Encoder(Transformer):
    """Pictures -> the outputs of the latent tokens."""

    def __init__(
        self,
        grid: int,
        patch_size: int,
        num_latents: int,
        dim: int,
        depth: int,
        heads: int,
        out_dim: int,
        legacy: bool,
    ):
        super().__init__(dim, depth, heads)
        self.legacy = legacy
        self.patch_embed = nn.Conv2d(3, dim, patch_size, patch_size)
        self.class_embedding = nn.Parameter(torch.empty(1, dim))
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, dim))
        self.latent_tokens = nn.Parameter(torch.empty(num_latents, dim))
        self.latent_positional_embedding = nn.Parameter(torch.empty(num_latents, dim))
        self.proj = Linear(dim, out_dim)
        self._init_tokens()

    def forward(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, S, S]`` in [0, 1] -> ``[B, K, out_dim]``."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        batch, latents = len(patches), len(self.latent_tokens)
        patches = patches + self.positional_embedding[1:]
        first = self.class_embedding + self.positional_embedding[:1]
        last = self.latent_tokens + self.latent_positional_embedding
        parts = [first.expand(batch, -1, -1), patches, last.expand(batch, -1, -1)]
        x = super().forward(self.ln_pre(torch.cat(parts, 1)), slice(-latents, None))
        if self.legacy:
            # The two-stage models were trained with the [K, D] outputs read as if they were [D, K].
            x = x.reshape(batch, -1, latents).transpose(1, 2)
        return self.proj(x)


class Decoder(Transformer):
    """Codes of the latent tokens -> features of the patches."""

    def __init__(
        self, grid: int, num_latents: int, token_size: int, dim: int, depth: int, heads: int
    ):
        super().__init__(dim, depth, heads)
        self.embed = Linear(token_size, dim)
        self.class_embedding = nn.Parameter(torch.empty(1, dim))
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.latent_positional_embedding = nn.Parameter(torch.empty(num_latents, dim))
        self._init_tokens()

    def forward(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        """Codes ``[B, K, token_size]`` and further tokens ``[B, L, D]`` -> ``[B, grid^2, D]``."""
        tokens = self.embed(codes) + self.latent_positional_embedding
        if context is not None:
            tokens = torch.cat([tokens, context], 1)
        # The grid's input is the same for every item: made once, not once an item.
        patches = len(self.positional_embedding) - 1
        grid = torch.cat([self.class_embedding, self.mask_token[0].expand(patches, -1)])
        grid = self.ln_pre(grid + self.positional_embedding)
        x = torch.cat([grid.expand(len(codes), -1, -1), self.ln_pre(tokens)], 1)
        return super().forward(x, slice(1, patches + 1))


class PixelHead(nn.Module):
    """Patch features -> pictures: a linear map to the pixels of each patch, then a convolution."""

    def __init__(self, grid: int, patch_size: int, dim: int):
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.proj = Linear(dim, 3 * patch_size**2)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, grid^2, D]`` -> ``[B, 3, S, S]``, about [0, 1]."""
        x = self.proj(x).unflatten(1, (self.grid, self.grid))
        x = x.unflatten(-1, (self.patch_size, self.patch_size, 3))
        return self.conv_out(x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


class VQGANHead(nn.Module):
    """Patch features -> logits over the codes of a MaskGIT-VQGAN -> pictures."""

    def __init__(self, grid: int, dim: int, codebook_size: int, z_channels: int, **options: Any):
        super().__init__()
        self.grid = grid
        self.proj = nn.Sequential(Linear(dim, 2 * dim), nn.Tanh(), Linear(2 * dim, codebook_size))
        self.codebook = nn.Embedding(codebook_size, z_channels)
        self.pixel_decoder = VQGANDecoder(z_channels=z_channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, grid^2, D]`` -> ``[B, 3, S, S]``, about [0, 1]."""
        # The mean code under the logits, not the likeliest one: that is how it was trained.
        codes = self.proj(x).float().softmax(-1).to(x.dtype) @ self.codebook.weight
        return self.pixel_decoder(codes.transpose(1, 2).unflatten(2, (self.grid, self.grid)))


class TiTokBase(Tokenizer, ModelMixin, ConfigMixin):
    """What TiTok and TA-TiTok share: the way from pictures to tokens.

    A subclass has ``encoder``, ``decoder``, ``head`` and, where tokens are ids, ``quantizer``.
    """

    ordered = False
    quantizer: VectorQuantizer | None
    _supports_gradient_checkpointing = False

    def _build_encoder(self, legacy: bool) -> None:
        c = self.config
        if c.quantize_mode not in ("vq", "vae"):
            raise InputError(f'quantize_mode must be "vq" or "vae", got "{c.quantize_mode}".')
        if c.image_size % c.patch_size:
            raise InputError(
                f"image_size {c.image_size} must be a multiple of patch_size {c.patch_size}."
            )
        self.grid = c.image_size // c.patch_size
        self.quantizer = None
        if c.quantize_mode == "vq":
            options = {"l2_norm": c.use_l2_norm, **(c.quantizer_options or {})}
            try:
                self.quantizer = VectorQuantizer(c.codebook_size, c.token_size, **options)
            except TypeError as error:
                raise InputError(f"quantizer_options do not fit: {error}.") from error
        self.encoder = Encoder(
            self.grid,
            c.patch_size,
            c.num_latent_tokens,
            c.encoder_dim,
            c.encoder_depth,
            c.encoder_heads,
            c.token_size if self.quantizer is not None else 2 * c.token_size,
            legacy,
        )

    def _build_decoder(self) -> None:
        c = self.config
        self.decoder = Decoder(
            self.grid,
            c.num_latent_tokens,
            c.token_size,
            c.decoder_dim,
            c.decoder_depth,
            c.decoder_heads,
        )

    def init_weights(self) -> None:
        """Truncated normal in linear and convolution layers, for training from scratch.

        The published 0.02 is that of width 1024; narrower layers need more, or the tokens learn
        nothing of the pictures for a long time.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                std = 0.02 * (1024 / module.weight[0].numel()) ** 0.5
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def num_tokens(self) -> int:
        return self.config.num_latent_tokens

    @property
    def vocab_size(self) -> int | None:
        return None if self.quantizer is None else self.config.codebook_size

    @property
    def latent_dim(self) -> int | None:
        return self.config.token_size if self.quantizer is None else None

    @property
    def image_size(self) -> int:
        return self.config.image_size

    def encode_latents(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> what the quantizer reads, ``[B, K, token_size]``; of a continuous
        tokenizer the moments, ``[B, K, 2 token_size]``. Differentiable."""
        self.check_images(images)
        return self.encoder((images.to(self.dtype) + 1) / 2)

    def posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        """The Gaussian of a continuous tokenizer, over ``[B, token_size, 1, K]``, in float32."""
        if self.quantizer is not None:
            raise InputError("This tokenizer is discrete and has no posterior: call encode.")
        moments = self.encode_latents(images).float()
        return DiagonalGaussianDistribution(moments.transpose(1, 2)[:, :, None])

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures ``[B, 3, image_size, image_size]`` in [-1, 1] -> tokens.

        Args:
            noise: of a continuous tokenizer, standard normal ``[B, num_tokens, latent_dim]`` with
                which its posterior is sampled; None takes the mean.

        Returns:
            ids int64 ``[B, num_tokens]``, or float32 ``[B, num_tokens, latent_dim]``.
        """
        if self.quantizer is not None:
            return self.quantizer.nearest(self.encode_latents(images))
        return _sample(self.posterior(images), noise)

    def bottleneck(
        self, images: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Pictures -> codes ``[B, K, token_size]`` for training.

        Returns:
            codes, the quantizer's loss or the mean KL divergence of a picture, values to report.
        """
        if self.quantizer is not None:
            codes, ids, loss = self.quantizer(self.encode_latents(images))
            return codes, loss, {"vq": loss.detach(), **codebook_use(ids, self.vocab_size)}
        posterior = self.posterior(images)
        kl = posterior.kl().mean()
        return _sample(posterior, noise), kl, {"kl": kl.detach()}

    def tokens_to_codes(self, tokens: Tensor) -> Tensor:
        """Ids ``[B, K]`` or latents ``[B, K, latent_dim]``, checked -> codes for the decoder."""
        if self.quantizer is None:
            self.check_latents(tokens)
            return tokens.to(self.dtype)
        self.check_tokens(tokens)
        return self.quantizer.ids_to_codes(tokens).to(self.dtype)


def _sample(posterior: DiagonalGaussianDistribution, noise: Tensor | None) -> Tensor:
    """Mean, or a sample with ``noise`` ``[B, K, C]``, as ``[B, K, C]``."""
    mean, std = (x[:, :, 0].transpose(1, 2) for x in (posterior.mean, posterior.std))
    return mean if noise is None else mean + std * noise


class TiTok(TiTokBase):
    """Picture <-> K unordered tokens that have no place in the picture.

    The defaults are the published two-stage tokenizer with 32 tokens.

    Args:
        image_size: side of the square pictures in pixels.
        patch_size: side of the patches of encoder and decoder.
        num_latent_tokens: K.
        two_stage: the decoder writes logits over the codes of a MaskGIT-VQGAN (and the encoder's
            outputs are read in the layout of that release); otherwise it writes pixels.
        quantize_mode: "vq" (ids) or "vae" (continuous tokens).
        codebook_size: number of ids.
        token_size: width of a code or of a continuous token.
        use_l2_norm: codes are compared by direction.
        quantizer_options: further arguments of `VectorQuantizer`, for training.
        pixel_decoder: arguments of `VQGANDecoder` and ``codebook_size`` of a two-stage model.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 32,
        two_stage: bool = True,
        quantize_mode: str = "vq",
        codebook_size: int = 4096,
        token_size: int = 12,
        use_l2_norm: bool = True,
        encoder_dim: int = 1024,
        encoder_depth: int = 24,
        encoder_heads: int = 16,
        decoder_dim: int = 1024,
        decoder_depth: int = 24,
        decoder_heads: int = 16,
        quantizer_options: dict[str, Any] | None = None,
        pixel_decoder: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._build_encoder(legacy=two_stage)
        self._build_decoder()
        if two_stage:
            options = {"codebook_size": 1024, "z_channels": 256, **(pixel_decoder or {})}
            self.head = VQGANHead(self.grid, decoder_dim, **options)
        else:
            self.head = PixelHead(self.grid, patch_size, decoder_dim)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes ``[B, K, token_size]`` (or mixtures of them) -> pictures, about [-1, 1].
        Differentiable."""
        return self.head(self.decoder(codes.to(self.dtype))) * 2 - 1

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Ids ``[B, num_tokens]``, or float ``[B, num_tokens, latent_dim]`` of a continuous
        tokenizer -> pictures ``[B, 3, image_size, image_size]``, about [-1, 1], not clamped."""
        return self.decode_codes(self.tokens_to_codes(tokens))

    def forward(
        self, images: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruct for training.

        Args:
            images: ``[B, 3, S, S]`` in [-1, 1].
            noise: ``[B, K, token_size]`` for a continuous tokenizer.

        Returns:
            reconstructions, and the loss and values of `bottleneck`.
        """
        codes, loss, parts = self.bottleneck(images, noise)
        return self.decode_codes(codes), loss, parts
