"""TA-TiTok: Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware
One-Dimensional Tokens (Kim et al., ICCV 2025).

Paper: arXiv 2501.07730. Code: Apache-2.0 (bytedance/1d-tokenizer). Published checkpoints
(turkeyju/tokenizer_tatitok_*; tagged Apache-2.0, "research purposes only"): bl32_vq, bl64_vq, bl128_vq,
bl32_vae, bl64_vae, sl128_vae.

Single-stage TiTok whose decoder also reads the CLIP features of a caption; the tokens need not say
what the text says. Encoder and quantizer never see the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin  # Diffusers looks for this name beside a class it loads.
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from .titok import PixelHead, TiTokBase

if TYPE_CHECKING:
    from open_clip import CLIP

# The tower of the published checkpoints, pretrained="openai". Its weights were trained with QuickGELU;
# open_clip's plain "ViT-L-14-336" computes an exact GELU.
TEXT_TOWER = "ViT-L-14-336-quickgelu"


@torch.no_grad()
def embed_text(clip: CLIP, texts: Sequence[str], tower: str = TEXT_TOWER) -> Tensor:
    """Captions -> what the decoder reads of them.

    Args:
        clip: ``open_clip.create_model(tower, pretrained="openai")``, or another CLIP of open_clip.
        texts: "" is a caption, too.
        tower: the name whose tokenizer is used; it pads with zeros, and the padding counts.

    Returns:
        ``[B, L, D]``: every position's features after the last LayerNorm, not projected.
    """
    import open_clip

    ids = open_clip.get_tokenizer(tower, context_length=clip.context_length)(list(texts))
    return embed_ids(clip, ids.to(clip.token_embedding.weight.device))


@torch.no_grad()
def embed_ids(clip: CLIP, ids: Tensor) -> Tensor:
    """`embed_text` of text tokens ``[B, L]``."""
    found = clip.forward_intermediates(
        text=ids,
        text_indices=1,
        normalize_intermediates=True,
        intermediates_only=True,
    )
    return found["text_intermediates"][-1]


class TATiTok(TiTokBase, ModelMixin):
    """Picture <-> K unordered tokens, decoded beside a text.

    The defaults are the published discrete tokenizer with 32 tokens.

    Args:
        image_size: side of the square pictures in pixels.
        patch_size: side of the patches of encoder and decoder.
        num_latent_tokens: K.
        quantize_mode: "vq" (ids) or "vae" (continuous tokens).
        codebook_size: number of ids.
        token_size: width of a code or of a continuous token.
        use_l2_norm: codes are compared by direction.
        text_context_length: positions of the text features.
        text_embed_dim: their width.
        quantizer_options: further arguments of `VectorQuantizer`, for training.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 32,
        quantize_mode: str = "vq",
        codebook_size: int = 8192,
        token_size: int = 64,
        use_l2_norm: bool = False,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 1024,
        decoder_depth: int = 24,
        decoder_heads: int = 16,
        text_context_length: int = 77,
        text_embed_dim: int = 768,
        quantizer_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._build_encoder(legacy=False)
        self._build_decoder()
        self.text_proj = Linear(text_embed_dim, decoder_dim)
        self.text_positional_embedding = nn.Parameter(torch.empty(text_context_length, decoder_dim))
        nn.init.normal_(self.text_positional_embedding, std=decoder_dim**-0.5)
        self.head = PixelHead(self.grid, patch_size, decoder_dim)

    def decode_codes(self, codes: Tensor, text_embeddings: Tensor) -> Tensor:
        """Codes ``[B, K, token_size]`` and text -> pictures, about [-1, 1]. Differentiable."""
        text = self.text_proj(text_embeddings.to(self.dtype)) + self.text_positional_embedding
        return self.head(self.decoder(codes.to(self.dtype), text)) * 2 - 1

    @torch.no_grad()
    def decode(self, tokens: Tensor, text_embeddings: Tensor) -> Tensor:
        """Tokens and the text of each -> pictures.

        Args:
            tokens: ids ``[B, num_tokens]``, or float ``[B, num_tokens, latent_dim]``.
            text_embeddings: ``[B, text_context_length, text_embed_dim]`` of `embed_text`: the caption
                of a picture that was encoded, the prompt of one that is generated.

        Returns:
            ``[B, 3, image_size, image_size]``, about [-1, 1], not clamped.
        """
        codes = self.tokens_to_codes(tokens)
        expected = (len(codes), self.config.text_context_length, self.config.text_embed_dim)
        if tuple(text_embeddings.shape) != expected:
            raise InputError(
                f"The text embeddings must have the shape {list(expected)}, got "
                f"{list(text_embeddings.shape)}: make them with embed_text."
            )
        return self.decode_codes(codes, text_embeddings)

    def forward(
        self, images: Tensor, text_embeddings: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruct for training.

        Args:
            images: ``[B, 3, S, S]`` in [-1, 1].
            text_embeddings: ``[B, text_context_length, text_embed_dim]``.
            noise: ``[B, K, token_size]`` for a continuous tokenizer.

        Returns:
            reconstructions, and the loss and values of `bottleneck`.
        """
        codes, loss, parts = self.bottleneck(images, noise)
        return self.decode_codes(codes, text_embeddings), loss, parts
