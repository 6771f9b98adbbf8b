"""KARL: Single-pass Adaptive Image Tokenization for Minimum Program Search (Duggal et al., 2025).

Paper: arXiv 2507.07995. Neither code nor weights have a licence; published checkpoints (Dropbox links in
the README of ShivamDuggal4/karl): karl_small over a VQGAN or a VAE, with quantized or continuous latents.

One pass of an encoder reads a picture, the tokens of a base tokenizer, and the reconstruction error that
is asked for; it writes a budget of latent tokens and for each the probability that it is not needed. A
decoder writes the base tokens back from those that are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import Tokenizer
from ..quantizers.vq import VectorQuantizer
from .kl16_vae import KL16VAE
from .maskgit_vqgan import MaskGITVQGAN
from .titok import Block, Transformer

# Mean absolute errors of pixels in [0, 1] that can be asked for.
# fmt: off
ERRORS = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.1,
    0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.28, 0.32, 0.38,
)
# fmt: on


class Encoder(nn.Module):
    """Picture, base tokens and requested error -> latents and halting logits (section 3)."""

    def __init__(
        self,
        patch_size: int,
        grid: int,
        base_dim: int,
        num_latents: int,
        token_size: int,
        dim: int,
        depth: int,
        heads: int,
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim - base_dim, patch_size, patch_size)
        self.positions = nn.Parameter(torch.empty(grid**2, dim))
        self.latent_tokens = nn.Parameter(torch.empty(num_latents, dim))
        for parameter in (self.positions, self.latent_tokens):
            nn.init.normal_(parameter, std=dim**-0.5)
        self.error_embedding = nn.Embedding(len(ERRORS), dim)
        self.ln_pre = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(dim)
        self.proj = Linear(dim, token_size)
        self.ln_post_halt = nn.LayerNorm(dim)
        self.halting = nn.Sequential(Linear(dim, 512), nn.Tanh(), Linear(512, 1))
        self.register_buffer("errors", torch.tensor(ERRORS), persistent=False)

    def error_bin(self, error: Tensor) -> Tensor:
        """Requested errors ``[B]`` -> the first bin that is no smaller, else the last; int64 ``[B]``."""
        bins = torch.searchsorted(self.errors.float(), error.float())
        return bins.clamp(max=len(ERRORS) - 1)

    def forward(
        self, images: Tensor, base: Tensor, error: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            images: ``[B, 3, S, S]`` in [0, 1].
            base: features of the base tokenizer ``[B, base_dim, g, g]``.
            error: requested mean absolute errors ``[B]``.
            num_tokens: how many latents may be used at most.

        Returns:
            latents ``[B, num_tokens, token_size]`` before quantization, and logits ``[B, num_tokens]``
            of being dropped.
        """
        grid = torch.cat([self.patch_embed(images), base], dim=1).flatten(2).transpose(1, 2)
        condition = self.error_embedding(self.error_bin(error))[:, None]
        latents = self.latent_tokens[:num_tokens].expand(len(images), -1, -1)
        x = self.ln_pre(torch.cat([condition, grid + self.positions, latents], dim=1))
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, slice(-num_tokens, None))
        return self.proj(self.ln_post(x)), self.halting(self.ln_post_halt(x))[..., 0]


class Decoder(Transformer):
    """Latents, some of them dropped -> outputs of the base grid (section 4)."""

    def __init__(
        self,
        grid: int,
        num_latents: int,
        token_size: int,
        out_dim: int,
        dim: int,
        depth: int,
        heads: int,
    ):
        super().__init__(dim, depth, heads)
        self.embed = Linear(token_size, dim)
        self.positions = nn.Parameter(torch.empty(grid**2, dim))
        self.latent_positions = nn.Parameter(torch.empty(num_latents, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self._init_tokens()
        self.head = nn.Sequential(Linear(dim, 2 * dim), nn.Tanh(), Linear(2 * dim, out_dim))

    def forward(self, latents: Tensor, active: Tensor) -> Tensor:
        """Latents ``[B, T, token_size]``, which are there bool ``[B, T]`` -> ``[B, g * g, out_dim]``.

        The paper hides a dropped latent from all other tokens by a mask; here it is left out, and
        only items with fewer latents than others of the batch have some hidden ones.
        """
        tokens = self.ln_pre(self.embed(latents) + self.latent_positions[: latents.shape[1]])
        counts = active.sum(1)
        kept = (~active).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
        tokens = tokens.take_along_dim(kept[..., None], dim=1)
        # The grid's input is the same for every item.
        grid = self.ln_pre(self.mask_token + self.positions)
        x = torch.cat([grid.expand(len(latents), -1, -1), tokens], dim=1)
        mask = None
        if (counts != counts[0]).any():
            there = torch.arange(kept.shape[1], device=counts.device) < counts[:, None]
            mask = F.pad(there, (len(grid), 0), value=True)[:, None, None]
        return self.head(super().forward(x, slice(len(grid)), mask))


class KARL(Tokenizer, ModelMixin, ConfigMixin):
    """Picture <-> as many tokens as it needs for an error that one asks for.

    The defaults are the published karl_small over the VQGAN with quantized latents. A token keeps its
    place in the budget, so tokens are rows of ``num_tokens`` places: ids with -1 at the places that KARL
    leaves empty, or continuous latents with NaN there. `lengths` counts the others.

    Args:
        image_size: side of the square pictures in pixels.
        base_type: the tokenizer beneath, "vqgan" or "vae".
        base_config: arguments of `MaskGITVQGAN` or `KL16VAE`.
        max_latent_tokens: places for which there are weights.
        num_latent_tokens: default budget of ``encode``.
        quantize_latent: ids in place of continuous latents.
        codebook_size, token_size: ids, and the width of a latent.
        halt_threshold: a token is dropped where the probability of that is higher.
        target_error: default error that is asked for: mean absolute, of pixels in [0, 1].
    """

    ordered = False
    adaptive = True
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        base_type: str = "vqgan",
        base_config: dict[str, Any] | None = None,
        max_latent_tokens: int = 512,
        num_latent_tokens: int = 256,
        quantize_latent: bool = True,
        codebook_size: int = 4096,
        token_size: int = 12,
        encoder_dim: int = 1024,
        encoder_depth: int = 8,
        encoder_heads: int = 8,
        decoder_dim: int = 1024,
        decoder_depth: int = 8,
        decoder_heads: int = 8,
        halt_threshold: float = 0.75,
        target_error: float = 0.05,
    ):
        super().__init__()
        if base_type not in ("vqgan", "vae"):
            raise InputError(f'base_type must be "vqgan" or "vae", got "{base_type}".')
        kind = MaskGITVQGAN if base_type == "vqgan" else KL16VAE
        self.base = kind(image_size=image_size, **(base_config or {}))
        self.grid = image_size // patch_size
        if self.grid**2 != self.base.num_tokens:
            raise InputError(
                f"A grid of {self.grid} x {self.grid} patches does not fit the {self.base.num_tokens} "
                "tokens of the base tokenizer."
            )
        base_dim = self.base.config.z_channels if base_type == "vqgan" else self.base.latent_dim
        self.encoder = Encoder(
            patch_size,
            self.grid,
            base_dim,
            max_latent_tokens,
            token_size,
            encoder_dim,
            encoder_depth,
            encoder_heads,
        )
        self.decoder = Decoder(
            self.grid,
            max_latent_tokens,
            token_size,
            self.base.vocab_size if base_type == "vqgan" else base_dim,
            decoder_dim,
            decoder_depth,
            decoder_heads,
        )
        self.quantizer = None
        if quantize_latent:
            self.quantizer = VectorQuantizer(codebook_size, token_size, l2_norm=True)

    @property
    def num_tokens(self) -> int:
        return self.config.num_latent_tokens

    @property
    def vocab_size(self) -> int | None:
        return self.config.codebook_size if self.config.quantize_latent else None

    @property
    def latent_dim(self) -> int | None:
        return None if self.config.quantize_latent else self.config.token_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    def lengths(self, tokens: Tensor) -> Tensor:
        """How many tokens each item has: what KARL takes for its complexity. int64 ``[B]``."""
        return self._active(tokens).sum(1)

    def _active(self, tokens: Tensor) -> Tensor:
        return tokens >= 0 if self.quantizer is not None else ~tokens.isnan().any(-1)

    def base_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] -> what the encoder reads of the base tokenizer ``[B, base_dim, g, g]``.

        Both base tokenizers take [0, 1] here. Of the VAE the mean (the published code samples).
        """
        if self.config.base_type == "vqgan":
            return self.base.encoder(images)
        return self.base.encode_latents(images)

    def latents(
        self, images: Tensor, num_tokens: int | None = None, target_error: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pictures in [0, 1] -> latents ``[B, T, token_size]`` before quantization, halting logits ``[B, T]``."""
        num_tokens = num_tokens or self.num_tokens
        target = self.config.target_error if target_error is None else target_error
        error = torch.full((len(images),), target, device=images.device)
        return self.encoder(images, self.base_features(images), error, num_tokens)

    def active(self, halting: Tensor) -> Tensor:
        """Halting logits -> which tokens stay, bool."""
        return halting.float().sigmoid() <= self.config.halt_threshold

    @torch.no_grad()
    def encode(
        self, images: Tensor, num_tokens: int | None = None, target_error: float | None = None
    ) -> Tensor:
        """Pictures ``[B, 3, image_size, image_size]`` in [-1, 1] -> tokens, some places of them empty.

        Args:
            num_tokens: the budget T, 1 to max_latent_tokens.
            target_error: mean absolute error of pixels in [0, 1] to stay below, as trained in steps
                from 0.005 to 0.38. Smaller ones take more tokens.

        Returns:
            ids int64 ``[B, T]`` with -1 where KARL needs no token; or float ``[B, T, token_size]``
            with NaN there.
        """
        self.check_images(images)
        limit = self.config.max_latent_tokens
        if num_tokens is not None and not 1 <= num_tokens <= limit:
            raise InputError(f"The budget must be 1 to {limit} tokens, got {num_tokens}.")
        if target_error is not None and not target_error >= 0:
            raise InputError(f"The error asked for must be 0 or more, got {target_error}.")
        latents, halting = self.latents((images.to(self.dtype) + 1) / 2, num_tokens, target_error)
        dropped = ~self.active(halting)
        if self.quantizer is None:
            return latents.masked_fill(dropped[..., None], torch.nan)
        return self.quantizer.nearest(latents).masked_fill(dropped, -1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens as ``encode`` gives them, 1 to max_latent_tokens places -> pictures, about [-1, 1].

        Raises:
            InputError: tokens of another shape, or ids that there are not.
        """
        active = self._check(tokens)
        if self.quantizer is None:
            codes = tokens.masked_fill(~active[..., None], 0)
        else:
            codes = self.quantizer.ids_to_codes(tokens.clamp(min=0))
        return self.to_images(self.decoder(codes.to(self.dtype), active)) * 2 - 1

    def to_images(self, outputs: Tensor) -> Tensor:
        """Outputs of the decoder ``[B, g * g, out_dim]`` -> pictures ``[B, 3, S, S]``, about [0, 1]."""
        if self.config.base_type == "vqgan":
            outputs = self.soft_codes(outputs)
        grid = outputs.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if self.config.base_type == "vqgan":
            return self.base.decoder(grid)
        # Trained to write latents that the VAE takes as they are, without the scale of the input.
        return self.base.vae.decode(grid).sample

    def soft_codes(self, logits: Tensor) -> Tensor:
        """The mean base code under the logits ``[B, g * g, codes]`` -> ``[B, g * g, base_dim]``."""
        return logits.float().softmax(-1).to(logits.dtype) @ self.base.quantizer.embedding.weight

    def _check(self, tokens: Tensor) -> Tensor:
        limit, size = self.config.max_latent_tokens, self.config.token_size
        if self.quantizer is None:
            if tokens.ndim != 3 or tokens.shape[2] != size or not tokens.is_floating_point():
                raise InputError(
                    f"This tokenizer decodes latents of shape [batch, count, {size}], got "
                    f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}."
                )
        elif tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise InputError(
                f"Tokens must be whole numbers of shape [batch, count], got "
                f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}."
            )
        elif tokens.numel() and not (tokens.min() >= -1 and tokens.max() < self.vocab_size):
            raise InputError(
                f"Token ids must lie in 0 to {self.vocab_size - 1}, or be -1 for no token, got "
                f"{int(tokens.min())} to {int(tokens.max())}."
            )
        if not 1 <= tokens.shape[1] <= limit:
            raise InputError(f"This tokenizer decodes 1 to {limit} tokens, got {tokens.shape[1]}.")
        return self._active(tokens)

    def forward(
        self, images: Tensor, num_tokens: int, target_error: Tensor, needed: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the first stage, the base tokenizer frozen (section 6).

        The paper's iteration makes two passes: first a random budget T, all tokens kept, which gives
        the error that T tokens reach; then the full budget, that error as the target, and ``needed``
        T: the model learns to drop the rest.

        Args:
            images: ``[B, 3, image_size, image_size]`` in [-1, 1].
            target_error: ``[B]``.
            needed: tokens to keep; default all.
        """
        self.check_images(images)
        images = (images + 1) / 2
        with torch.no_grad():
            base = self.base_features(images)
        latents, halting = self.encoder(images, base, target_error, num_tokens)
        drop = torch.arange(num_tokens, device=images.device) >= (needed or num_tokens)
        drop = drop.expand(len(images), -1)
        parts = {"halting": F.binary_cross_entropy_with_logits(halting.float(), drop.float())}
        if self.quantizer is not None:
            latents, _, parts["quantizer"] = self.quantizer(latents)
        outputs = self.decoder(latents.to(base.dtype), ~drop)
        if self.config.base_type == "vqgan":
            ids = self.base.quantizer.nearest(base.flatten(2).transpose(1, 2))
            codes = self.base.quantizer.ids_to_codes(ids)
            parts["cross_entropy"] = F.cross_entropy(outputs.float().flatten(0, 1), ids.flatten())
            parts["code"] = F.mse_loss(self.soft_codes(outputs).float(), codes)
        else:
            target = base.flatten(2).transpose(1, 2) / self.base.config.scaling_factor
            parts["latent"] = F.mse_loss(outputs.float(), target.float())
        return sum(parts.values()), {name: value.detach() for name, value in parts.items()}
