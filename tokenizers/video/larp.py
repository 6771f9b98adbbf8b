"""LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior (Wang et al., ICLR 2025).

Paper: arXiv 2410.21264. Code: MIT (hywang66/LARP). Published checkpoint: hywang66/LARP-L-long-tokenizer
(no licence text of the weights was seen).

A ViT reads the patches of a clip together with learned queries, of which alone it keeps the outputs: each
becomes the nearest of 8192 codes on a sphere. A second ViT reads the codes beside the fixed queries of
all patches and writes pixels. The tokens have no place in the clip; a small causal transformer that is
trained along with them (the prior) makes their order predictable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ...modalities.errors import InputError
from ..base import Tokenizer
from ..quantizers.vq import VectorQuantizer, codebook_use


def sincos_1d(length: int, dim: int) -> Tensor:
    """``[length, dim]`` float64: sines, then cosines, of positions times 10000^(-2 i / dim)."""
    omega = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_3d(frames: int, side: int, dim: int) -> Tensor:
    """``[frames, side, side, dim]`` float64: halves for column and row, plus the whole width for time."""
    axis = sincos_1d(side, dim // 2)
    columns = axis.expand(side, side, -1)
    plane = torch.cat([columns, columns.transpose(0, 1)], dim=-1)
    return plane + sincos_1d(frames, dim)[:, None, None]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, rows: slice, causal: bool) -> Tensor:
        """``[B, S, D]`` -> the outputs of ``rows``, ``[B, R, D]``."""
        dim, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
        q = linear(x[:, rows], weight[:dim], q_bias)
        k, v = linear(x, weight[dim:], kv_bias).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block (LayerNorm eps 1e-5, exact GELU) of which only some rows may be asked for."""

    def __init__(self, dim: int, heads: int, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, heads, bias, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = nn.Sequential(Linear(dim, 4 * dim), nn.GELU(), Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rows: slice = slice(None), causal: bool = False) -> Tensor:
        x = x[:, rows] + self.dropout(self.attn(self.norm1(x), rows, causal))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """Clips -> the outputs of the queries."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch: tuple[int, int],
        queries: int,
        dim: int,
        depth: int,
        heads: int,
    ):
        super().__init__()
        size = (patch[0], patch[1], patch[1])
        self.patch_embed = nn.Conv3d(3, dim, size, size)
        self.queries = nn.Parameter(torch.empty(queries, dim))
        nn.init.normal_(self.queries, std=0.02)
        positions = sincos_3d(*grid, dim).flatten(0, 2).float()
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, video: Tensor) -> Tensor:
        """``[B, 3, T, S, S]`` in [0, 1] -> ``[B, queries, dim]``."""
        patches = self.patch_embed(video).flatten(2).transpose(1, 2)
        patches = patches + self.positions.to(patches.dtype)
        x = torch.cat([patches, self.queries.expand(len(video), -1, -1)], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, slice(patches.shape[1], None))


class Decoder(nn.Module):
    """Codes beside the queries of all patches -> clips."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch: tuple[int, int],
        latents: int,
        dim: int,
        depth: int,
        heads: int,
    ):
        super().__init__()
        self.grid, self.patch = grid, patch
        self.patch_token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.patch_token, std=0.02)
        positions = sincos_3d(*grid, dim).flatten(0, 2).float()
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("latent_positions", sincos_1d(latents, dim).float(), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = Linear(dim, 3 * patch[0] * patch[1] ** 2)

    def forward(self, latents: Tensor) -> Tensor:
        """``[B, latents, dim]`` -> ``[B, 3, T, S, S]``, about [0, 1]."""
        queries = self.positions.to(latents.dtype) + self.patch_token
        latents = latents + self.latent_positions.to(latents.dtype)
        x = torch.cat([latents, queries.expand(len(latents), -1, -1)], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.proj(self.norm(self.blocks[-1](x, slice(latents.shape[1], None))))
        (frames, side), (p_t, p) = self.grid, self.patch
        x = x.unflatten(1, (frames, side, side)).unflatten(-1, (p_t, p, p, 3))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Prior(nn.Module):
    """The causal transformer over codes that training uses (section 3.3)."""

    def __init__(
        self, length: int, code_dim: int, dim: int, depth: int, heads: int, dropout: float
    ):
        super().__init__()
        self.input_proj = Linear(code_dim, dim)
        self.positions = nn.Parameter(torch.empty(length, dim))
        nn.init.normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, True, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = Linear(dim, code_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes ``[B, n, C]`` -> a unit vector for each, ``[B, n, C]``: that of code i from codes
        0 to i - 1, and of the first the code itself."""
        x = self.input_proj(codes[:, :-1])
        x = self.dropout(x + self.positions[: x.shape[1]])
        for block in self.blocks:
            x = block(x, causal=True)
        return F.normalize(torch.cat([codes[:, :1], self.head(self.norm(x))], dim=1), dim=-1)


class LARP(Tokenizer, ModelMixin, ConfigMixin):
    """Clip <-> tokens that have an order but no place in the clip. The defaults are the published ones.

    Args:
        image_size, num_frames: of a clip; its frames are square.
        patch_size, temporal_patch_size: of the encoder's patches.
        decoder_patch_size, decoder_temporal_patch_size: of the decoder's; None: the same.
        num_latent_tokens: tokens of a clip.
        codebook_size, code_dim: number and width of codes.
        l2_norm: codes are compared by direction.
        code_temperature: of the softmax over cosines that training draws codes from.
        prior_depth: blocks of the prior; 0 leaves it out, as decoding needs none.
        prior_dropout: in training.
        vq_weight, prior_weight: of the two losses in training.
    """

    ordered = False
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantizer"]
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        num_frames: int = 16,
        patch_size: int = 8,
        temporal_patch_size: int = 4,
        decoder_patch_size: int | None = None,
        decoder_temporal_patch_size: int | None = None,
        num_latent_tokens: int = 1024,
        codebook_size: int = 8192,
        code_dim: int = 16,
        l2_norm: bool = True,
        code_temperature: float = 0.03,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        prior_dim: int = 384,
        prior_depth: int = 12,
        prior_heads: int = 6,
        prior_dropout: float = 0.1,
        vq_weight: float = 0.1,
        prior_weight: float = 0.06,
    ):
        super().__init__()
        patch = (temporal_patch_size, patch_size)
        out_patch = (decoder_temporal_patch_size or patch[0], decoder_patch_size or patch[1])
        grids = [(num_frames // t, image_size // s) for t, s in (patch, out_patch)]
        for t, s in (patch, out_patch):
            if num_frames % t or image_size % s:
                raise InputError(
                    f"Clips of {num_frames} frames of {image_size} pixels cannot be cut into patches "
                    f"of {t} frames of {s}."
                )
        self.encoder = Encoder(
            grids[0], patch, num_latent_tokens, encoder_dim, encoder_depth, encoder_heads
        )
        self.to_codes = Linear(encoder_dim, code_dim)
        self.quantizer = VectorQuantizer(codebook_size, code_dim, l2_norm)
        self.from_codes = Linear(code_dim, decoder_dim)
        self.decoder = Decoder(
            grids[1], out_patch, num_latent_tokens, decoder_dim, decoder_depth, decoder_heads
        )
        self.prior = None
        if prior_depth:
            self.prior = Prior(
                num_latent_tokens, code_dim, prior_dim, prior_depth, prior_heads, prior_dropout
            )

    def init_weights(self) -> None:
        """Xavier-uniform layers, a kaiming-uniform codebook, an output of zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(self.quantizer.embedding.weight)
        nn.init.zeros_(self.decoder.proj.weight)

    @property
    def num_tokens(self) -> int:
        return self.config.num_latent_tokens

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_frames(self) -> int:
        return self.config.num_frames

    @property
    def temporal_patch_size(self) -> int:
        return self.config.temporal_patch_size

    def pad(self, video: Tensor) -> Tensor:
        """Clips ``[B, 3, T, S, S]`` of too few frames -> ``num_frames``, the last one repeated."""
        missing = self.num_frames - video.shape[2]
        return torch.cat([video, video[:, :, -1:].expand(-1, -1, max(missing, 0), -1, -1)], dim=2)

    def encode_latents(self, video: Tensor) -> Tensor:
        """Clips in [-1, 1] -> what the quantizer reads, ``[B, num_tokens, code_dim]``. Differentiable."""
        self.check_video(video)
        return self.to_codes(self.encoder((video.to(self.dtype) + 1) / 2))

    def code_probabilities(self, latents: Tensor) -> Tensor:
        """Latents ``[B, n, code_dim]`` -> softmax of their cosines to all codes over
        ``code_temperature``, float32 ``[B, n, codebook_size]`` (equation 3)."""
        codebook = self.quantizer.normalize(self.quantizer.embedding.weight.float())
        cosines = linear(self.quantizer.normalize(latents.float()), codebook)
        return (cosines / self.config.code_temperature).softmax(-1)

    def draw_ids(
        self, latents: Tensor, generators: Sequence[torch.Generator | None] | None = None
    ) -> Tensor:
        """Ids int64 ``[B, n]`` drawn from `code_probabilities`, with one generator an item."""
        p = self.code_probabilities(latents.detach())
        noise = torch.empty_like(p)
        for row, generator in zip(noise, generators or [None] * len(p), strict=True):
            row.exponential_(generator=generator)
        return (p / noise).argmax(-1)

    @torch.no_grad()
    def encode(self, video: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Clips ``[B, 3, num_frames, image_size, image_size]`` in [-1, 1] -> ids int64
        ``[B, num_tokens]``.

        Args:
            generators: one an item draws the ids, as in training; default: the nearest codes.
        """
        latents = self.encode_latents(video)
        if generators is not None:
            return self.draw_ids(latents, generators)
        return self.quantizer.nearest(latents)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes ``[B, num_tokens, code_dim]`` -> clips, about [-1, 1]. Differentiable."""
        return self.decoder(self.from_codes(codes.to(self.dtype))) * 2 - 1

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Ids ``[B, num_tokens]`` -> clips ``[B, 3, num_frames, image_size, image_size]``, about
        [-1, 1]."""
        self.check_tokens(tokens)
        return self.decode_codes(self.quantizer.ids_to_codes(tokens))

    def prior_loss(self, codes: Tensor, ids: Tensor, mix: float) -> Tensor:
        """Cross-entropy of the prior over two rounds with scheduled sampling (section 3.3).

        The second round reads codes of which the share ``mix`` was drawn from the first one's
        predictions. The gradient reaches the encoder through the codes; the codebook is constant.
        """
        codebook = self.quantizer.ids_to_codes(torch.arange(self.vocab_size, device=ids.device))
        codebook = codebook.detach()
        losses, inputs = [], codes
        for _ in range(2):
            logits = (self.prior(inputs.to(self.dtype)).float() @ codebook.T)[:, 1:]
            losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
            p = logits.detach().softmax(-1)
            drawn = codebook[(p / torch.empty_like(p).exponential_()).argmax(-1)]
            replaced = torch.rand(drawn.shape[:2], device=ids.device) < mix
            mixed = torch.where(replaced[..., None], drawn, codes[:, 1:].float())
            inputs = torch.cat([codes[:, :1].float(), mixed], dim=1)
        return (losses[0] + losses[1]) / 2

    def forward(self, video: Tensor, mix: float = 0.5) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruct with drawn codes, for training.

        Args:
            video: ``[B, 3, num_frames, image_size, image_size]`` in [-1, 1].
            mix: share of drawn codes in the prior's second round; the paper's recipe: from 0 to 0.5
                over the first 30 % of training.

        Returns:
            clips, the weighted losses of codebook and prior (to which L1, perceptual and adversarial
            losses are added), values to report.
        """
        latents = self.encode_latents(video)
        codes, ids, vq = self.quantizer(latents, self.draw_ids(latents))
        loss = self.config.vq_weight * vq
        parts = {"vq": vq.detach(), **codebook_use(ids, self.vocab_size)}
        if self.prior is not None:
            prior = self.prior_loss(codes, ids, mix)
            loss = loss + self.config.prior_weight * prior
            parts["prior"] = prior.detach()
        return self.decode_codes(codes), loss, parts
