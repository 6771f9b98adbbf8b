"""FlexAR: autoregressive text-to-image over FlexTok's ordered tokens (Bachmann et al., ICML 2025).

Paper: arXiv 2502.13967, section 9 of its released models. Published checkpoints (Apache-2.0):
EPFL-VILAB/FlexAR-113M-T2I, -382M-T2I, -1B-T2I, -3B-T2I. The shipped sticker generator is this class
at laptop size, trained by this project.

A causal transformer writes one id after the other; every block looks at the text by cross-attention.
Ordered tokens may stop early: the first k of them already decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...modalities.errors import InputError
from ..cache import StaticCache
from ..sampling import check_sampling, guide, sample


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cache: StaticCache | None, layer: int, position: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            k, v = cache.update(layer, position, k, v)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, L, D]`` -> two of ``[B, heads, L, head_dim]``; computed once a prompt."""
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.k_norm(k).to(v.dtype), v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = keys_values
        q = self.q_norm(q).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(x.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.fc1_fc3 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1_fc3(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, heads, bias, qk_norm)
        self.norm_2 = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, heads, bias, qk_norm)
        self.norm_3 = nn.LayerNorm(dim)
        self.mlp = GatedMLP(dim, hidden, bias)

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        x = x + self.self_attn(self.norm_1(x), cache, layer, position)
        x = x + self.cross_attn(self.norm_2(x), keys_values, mask)
        return x + self.mlp(self.norm_3(x))


class TextProjection(nn.Module):
    """Features of a frozen text encoder -> width of the generator."""

    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(text_dim, text_dim, bias=False)
        self.fc2 = nn.Linear(text_dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class FlexAR(ModelMixin, ConfigMixin):
    """Text features -> ordered token ids.

    Args:
        vocab_size: ids of the tokenizer.
        num_tokens: longest sequence.
        text_dim: width of the text features.
        mlp_hidden: hidden width of the gated MLP.
        embedding_dropout: on the input embeddings, in training.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 64000,
        num_tokens: int = 256,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_hidden: int = 2048,
        text_dim: int = 2048,
        bias: bool = False,
        qk_norm: bool = True,
        embedding_dropout: float = 0.0,
    ):
        super().__init__()
        self.text_projection = TextProjection(text_dim, dim)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.zeros(num_tokens, dim))
        self.dropout = nn.Dropout(embedding_dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_hidden, bias, qk_norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def init_weights(self) -> None:
        """Normal 0.02; projections into the residual stream are scaled by depth (GPT-2)."""
        depth = len(self.blocks)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2 or name in ("start",):
                residual = name.endswith(("proj.weight", "fc2.weight")) and "blocks" in name
                nn.init.normal_(parameter, std=0.02 / (3 * depth) ** 0.5 if residual else 0.02)

    def embed(self, tokens: Tensor, position: int = 0) -> Tensor:
        """Ids ``[B, n]`` -> inputs ``[B, n + 1, D]`` at 0 (with the start), else ``[B, n, D]``."""
        x = self.embedding(tokens)
        if position == 0:
            x = torch.cat([self.start.expand(len(tokens), 1, -1), x], dim=1)
        return x + self.positions[position : position + x.shape[1]]

    def logits(self, tokens: Tensor, text_features: Tensor, text_mask: Tensor) -> Tensor:
        """Teacher-forced logits ``[B, n, V]`` of positions 0..n-1 given ids ``[B, n - 1]``."""
        text = self.text_projection(text_features)
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x, block.cross_attn.keys_values(text), text_mask)
        return self.head(self.norm(x))

    def forward(
        self, tokens: Tensor, text_features: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of ids ``[B, n]``, n <= num_tokens (a prefix trains the prefix).

        Args:
            text_features: ``[B, L, text_dim]``; an item trained without a prompt carries the
                features of the empty prompt.
            text_mask: bool ``[B, L]``, True = valid.
        """
        logits = self.logits(tokens[:, :-1], text_features, text_mask).float()
        each = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        each = each.view(tokens.shape)
        return each.mean(), {
            "nll": each.mean().detach(),
            "nll_first_8": each[:, :8].mean().detach(),
        }

    @torch.no_grad()
    def stream(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        generators: Sequence[torch.Generator],
        num_tokens: int | None = None,
        null_features: Tensor | None = None,
        null_mask: Tensor | None = None,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, 1]``, ``[B, 2]``, ... ``[B, num_tokens]`` as they are drawn.

        Args:
            text_features, text_mask: ``[B, L, text_dim]`` and bool ``[B, L]``.
            generators: one an item.
            null_features, null_mask: of the empty prompt, ``[1, L, text_dim]``; needed for guidance.
            guidance_scale: 1 runs no unconditional half.
            tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True.

        Raises:
            InputError: more tokens than the model has positions, or a meaningless setting.
        """
        count = num_tokens or self.config.num_tokens
        if not 1 <= count <= self.config.num_tokens:
            raise InputError(
                f"This model makes 1 to {self.config.num_tokens} tokens, got {count}. "
                f"Use {self.config.num_tokens}."
            )
        check_sampling(temperature, top_k, top_p)
        batch = len(text_features)
        guided = guidance_scale != 1
        if guided:
            text_features = torch.cat([text_features, null_features.expand(batch, -1, -1)])
            text_mask = torch.cat([text_mask, null_mask.expand(batch, -1)])

        text = self.text_projection(text_features)
        keys_values = [block.cross_attn.keys_values(text) for block in self.blocks]
        heads = self.config.heads
        cache = StaticCache(
            len(self.blocks),
            len(text),
            heads,
            count,
            self.config.dim // heads,
            text.dtype,
            text.device,
        )
        drawn = torch.empty(batch, 0, dtype=torch.int64, device=text.device)
        x = (self.start + self.positions[0]).expand(len(text), 1, -1)
        for position in range(count):
            for layer, block in enumerate(self.blocks):
                x = block(x, keys_values[layer], text_mask, cache, layer, position)
            logits = self.head(self.norm(x[:, -1])).float()
            if guided:
                logits = guide(*logits.chunk(2), guidance_scale)
            new = sample(logits, temperature, top_k, top_p, generators)
            if tokens is not None and position < tokens.shape[1]:
                new = torch.where(token_mask[:, position], tokens[:, position], new)
            drawn = torch.cat([drawn, new[:, None]], dim=1)
            yield drawn
            if position + 1 < count:
                x = self.embed(new[:, None].repeat(2 if guided else 1, 1), position + 1)

    @torch.no_grad()
    def generate(
        self, text_features: Tensor, text_mask: Tensor, generators: Sequence, **settings
    ) -> Tensor:
        """All of `stream`: ids int64 ``[B, num_tokens]``."""
        for drawn in self.stream(text_features, text_mask, generators, **settings):
            ids = drawn
        return ids
