"""FlexAR: autoregressive generation over FlexTok's ordered tokens (Bachmann et al., ICML 2025).

Paper: arXiv 2502.13967. Published checkpoints (Apache-2.0): EPFL-VILAB/FlexAR-113M-T2I, -382M-T2I,
-1B-T2I, -3B-T2I for text, EPFL-VILAB/FlexAR-1B-C2I for classes. The shipped sticker generator is the text
model at laptop size, trained by this project.

A causal transformer writes one id after the other. Text is looked at by cross-attention in every block;
a class is added to the start. Ordered tokens may stop early: the first k of them already decode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import ImageGenerator
from ..cache import StaticCache
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..layers.attention import causal_attention
from ..sampling import check_generators, check_given, check_sampling, guide
from ..schedules import check_guidance
from .decoding import autoregress, check_length


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.proj = Linear(dim, dim, bias=bias)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cache: StaticCache | None, layer: int, position: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            k, v = cache.update(layer, position, k, v)
        x = causal_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim, bias=bias)
        self.kv = Linear(dim, 2 * dim, bias=bias)
        self.proj = Linear(dim, dim, bias=bias)
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
        self.fc1_fc3 = Linear(dim, 2 * hidden, bias=bias)
        self.fc2 = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1_fc3(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    """Self-attention, cross-attention to a text if there is one, gated MLP."""

    def __init__(self, dim: int, heads: int, hidden: int, bias: bool, qk_norm: bool, text: bool):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, heads, bias, qk_norm)
        if text:
            self.norm_2 = nn.LayerNorm(dim)
            self.cross_attn = CrossAttention(dim, heads, bias, qk_norm)
        self.norm_3 = nn.LayerNorm(dim)
        self.mlp = GatedMLP(dim, hidden, bias)

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        x = x + self.self_attn(self.norm_1(x), cache, layer, position)
        if keys_values is not None:
            x = x + self.cross_attn(self.norm_2(x), keys_values, mask)
        return x + self.mlp(self.norm_3(x))


class TextProjection(nn.Module):
    """Features of a frozen text encoder -> width of the generator."""

    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.fc1 = Linear(text_dim, text_dim, bias=False)
        self.fc2 = Linear(text_dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class _FlexAR(ImageGenerator, ModelMixin, ConfigMixin):
    """What the models of text and of classes share."""

    unit = "token"

    def num_yields(self, num_tokens: int | None = None, num_steps: int | None = None) -> int:
        return self.num_tokens if num_tokens is None else num_tokens

    def build(
        self,
        vocab_size: int,
        num_tokens: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_hidden: int,
        bias: bool,
        qk_norm: bool,
        embedding_dropout: float,
        text: bool,
    ) -> None:
        self.embedding = nn.Embedding(vocab_size, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.zeros(num_tokens, dim))
        self.dropout = nn.Dropout(embedding_dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_hidden, bias, qk_norm, text) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = Linear(dim, vocab_size, bias=False)

    def init_weights(self) -> None:
        """Normal 0.02; projections into the residual stream are scaled by depth (GPT-2)."""
        depth = len(self.blocks)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2 or name in ("start",):
                residual = name.endswith(("proj.weight", "fc2.weight")) and "blocks" in name
                nn.init.normal_(parameter, std=0.02 / (3 * depth) ** 0.5 if residual else 0.02)

    def embed(self, tokens: Tensor, position: int = 0, start: Tensor | None = None) -> Tensor:
        """Ids ``[B, n]`` -> inputs ``[B, n + 1, D]`` at 0 (with the start), else ``[B, n, D]``.

        Args:
            start: of each item ``[B, D]``; default the learned one.
        """
        x = self.embedding(tokens)
        if position == 0:
            start = self.start if start is None else start
            x = torch.cat([start.expand(len(tokens), -1)[:, None], x], dim=1)
        return x + self.positions[position : position + x.shape[1]]

    def make_decoder(
        self,
        starts: Tensor,
        keys_values: list[tuple[Tensor, Tensor]] | None,
        mask: Tensor | None,
        batch: int,
        guidance_scale: float,
        num_tokens: int,
    ) -> FlexARDecoder:
        """Of rows of conditions: the items' and, with guidance, then the unconditional ones."""
        config = self.config
        cache = StaticCache(
            len(self.blocks),
            len(starts),
            config.heads,
            num_tokens,
            config.dim // config.heads,
            starts.dtype,
            starts.device,
        )
        return FlexARDecoder(self, starts, keys_values, mask, cache, batch, guidance_scale)

    def _autoregress(
        self,
        decoder: FlexARDecoder,
        generators: Sequence[torch.Generator],
        temperature: float,
        top_k: int | None,
        top_p: float,
        tokens: Tensor | None,
        token_mask: Tensor | None,
    ) -> Iterator[Tensor]:
        check_sampling(temperature, top_k, top_p)
        check_generators(generators, decoder.batch)
        check_given(tokens, token_mask, decoder.batch, self.config.num_tokens, decoder.vocab_size)
        yield from autoregress(
            decoder, generators, decoder.num_tokens, temperature, top_k, top_p, tokens, token_mask
        )

    def check_length(self, num_tokens: int | None) -> int:
        """How many tokens are wanted; None is all of them."""
        count = self.config.num_tokens if num_tokens is None else num_tokens
        check_length(count, self.config.num_tokens)
        return count


class FlexARDecoder:
    """A FlexAR bound to conditions; see `decoding.Decoder`. Made by ``decoder`` of the models."""

    def __init__(
        self,
        model: _FlexAR,
        starts: Tensor,
        keys_values: list[tuple[Tensor, Tensor]] | None,
        mask: Tensor | None,
        cache: StaticCache,
        batch: int,
        guidance_scale: float,
    ):
        self.model, self.starts, self.cache = model, starts, cache
        self.keys_values, self.mask = keys_values, mask
        self.batch, self.guidance_scale = batch, guidance_scale
        self.device = starts.device
        self.vocab_size = model.config.vocab_size
        self.num_tokens = cache.keys.shape[3]
        self.cached = 0

    @torch.no_grad()
    def __call__(self, ids: Tensor, cached: int, count: int) -> Tensor:
        model, guided = self.model, len(self.starts) > self.batch
        rows = ids.repeat(2, 1) if guided else ids
        x = model.embed(rows[:, max(cached - 1, 0) :], cached, self.starts)
        for layer, block in enumerate(model.blocks):
            keys_values = None if self.keys_values is None else self.keys_values[layer]
            x = block(x, keys_values, self.mask, self.cache, layer, cached)
        logits = model.head(model.norm(x[:, -count:])).float()
        return guide(*logits.chunk(2), self.guidance_scale) if guided else logits

    def repeat(self, batch: int) -> FlexARDecoder:
        rows = torch.arange(len(self.starts), device=self.device).repeat_interleave(batch)
        other = copy.copy(self)
        other.batch, other.starts = batch, self.starts[rows]
        other.cache = self.cache.select(rows)
        if self.keys_values is not None:
            other.keys_values = [(k[rows], v[rows]) for k, v in self.keys_values]
            other.mask = self.mask[rows]
        return other


class FlexAR(_FlexAR):
    """Text features -> ordered token ids.

    Args:
        vocab_size: ids of the tokenizer.
        num_tokens: longest sequence.
        text_dim: width of the text features.
        mlp_hidden: hidden width of the gated MLP.
        embedding_dropout: on the input embeddings, in training.
    """

    condition = "text"

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
        self.build(
            vocab_size,
            num_tokens,
            dim,
            depth,
            heads,
            mlp_hidden,
            bias,
            qk_norm,
            embedding_dropout,
            text=True,
        )

    def text_condition(
        self, tower: nn.Module, texts: Sequence[str], null_texts: Sequence[str]
    ) -> dict[str, Tensor]:
        """What `stream` reads of texts and of their negatives, by a tower with ``text_features``."""
        features, mask = tower.text_features([*texts, *null_texts])
        n = len(texts)
        return {
            "text_features": features[:n],
            "text_mask": mask[:n],
            "null_features": features[n:],
            "null_mask": mask[n:],
        }

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
        top_k: int | None = None,
        top_p: float = 1.0,
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
        decoder = self.decoder(
            text_features, text_mask, null_features, null_mask, guidance_scale, num_tokens
        )
        yield from self._autoregress(
            decoder, generators, temperature, top_k, top_p, tokens, token_mask
        )

    @torch.no_grad()
    def decoder(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        null_features: Tensor | None = None,
        null_mask: Tensor | None = None,
        guidance_scale: float = 3.0,
        num_tokens: int | None = None,
    ) -> FlexARDecoder:
        """The model bound to its texts, for the loops of `decoding` and `acceleration`.

        Raises:
            InputError: more tokens than the model has positions, or guidance without the empty prompt.
        """
        count, batch = self.check_length(num_tokens), len(text_features)
        check_guidance(guidance_scale)
        if guidance_scale != 1:
            if null_features is None or null_mask is None:
                raise InputError("Guidance needs null_features and null_mask, of the empty prompt.")
            text_features = torch.cat([text_features, null_features.expand(batch, -1, -1)])
            text_mask = torch.cat([text_mask, null_mask.expand(batch, -1)])
        text = self.text_projection(text_features)
        keys_values = [block.cross_attn.keys_values(text) for block in self.blocks]
        starts = self.start.to(text.dtype).expand(len(text), -1)
        return self.make_decoder(starts, keys_values, text_mask, batch, guidance_scale, count)

    @torch.no_grad()
    def generate(
        self, text_features: Tensor, text_mask: Tensor, generators: Sequence, **settings
    ) -> Tensor:
        """All of `stream`: ids int64 ``[B, num_tokens]``."""
        for drawn in self.stream(text_features, text_mask, generators, **settings):
            ids = drawn
        return ids


class FlexARClass(_FlexAR):
    """Class label -> ordered token ids. The defaults are the published 1B-C2I.

    The published configuration was not at hand; its blocks are taken to have no cross-attention.

    Args:
        num_classes: the null class of guidance comes after the last one and adds nothing.
        mlp_hidden: hidden width of the gated MLP.
        embedding_dropout, label_dropout: in training.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 64000,
        num_tokens: int = 256,
        num_classes: int = 1000,
        dim: int = 1664,
        depth: int = 26,
        heads: int = 26,
        mlp_hidden: int = 4437,
        bias: bool = False,
        qk_norm: bool = True,
        embedding_dropout: float = 0.0,
        label_dropout: float = 0.1,
    ):
        super().__init__()
        self.class_embedding = nn.Embedding(num_classes, dim)
        self.build(
            vocab_size,
            num_tokens,
            dim,
            depth,
            heads,
            mlp_hidden,
            bias,
            qk_norm,
            embedding_dropout,
            text=False,
        )

    def starts(self, labels: Tensor) -> Tensor:
        """Labels ``[B]`` (``num_classes`` = null) -> the start of each sequence ``[B, D]``."""
        return self.start + embed_labels(F.pad(self.class_embedding.weight, (0, 0, 0, 1)), labels)

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits ``[B, n, V]`` of positions 0..n-1 given ids ``[B, n - 1]``."""
        x = self.dropout(self.embed(tokens, start=self.starts(labels)))
        for block in self.blocks:
            x = block(x, None, None)
        return self.head(self.norm(x))

    def forward(
        self, tokens: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of ids ``[B, n]``, n <= num_tokens (a prefix trains the prefix).

        Args:
            labels: classes ``[B]``; in training some are dropped.
            generator: of the dropped labels, on the model's device.
        """
        labels = self.drop_labels(labels, generator)
        logits = self.logits(tokens[:, :-1], labels).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return loss, {"nll": loss.detach()}

    @torch.no_grad()
    def decoder(
        self, labels: Tensor, guidance_scale: float = 1.5, num_tokens: int | None = None
    ) -> FlexARDecoder:
        """The model bound to its classes, for the loops of `decoding` and `acceleration`.

        Raises:
            InputError: more tokens than the model has positions, or no such class.
        """
        count, batch = self.check_length(num_tokens), len(labels)
        check_guidance(guidance_scale)
        check_labels(labels, self.config.num_classes)
        if guidance_scale != 1:
            labels = torch.cat([labels, null_labels(labels, self.config.num_classes)])
        return self.make_decoder(self.starts(labels), None, None, batch, guidance_scale, count)

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        num_tokens: int | None = None,
        guidance_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, 1]``, ``[B, 2]``, ... ``[B, num_tokens]`` as they are drawn.

        Args:
            labels: classes ``[B]``.
            generators: one an item.
            guidance_scale: 1 runs no unconditional half.
            tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True.

        Raises:
            InputError: a label, token or setting that means nothing.
        """
        decoder = self.decoder(labels, guidance_scale, num_tokens)
        yield from self._autoregress(
            decoder, generators, temperature, top_k, top_p, tokens, token_mask
        )

    @torch.no_grad()
    def generate(self, labels: Tensor, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """All of `stream`: ids int64 ``[B, num_tokens]``."""
        for drawn in self.stream(labels, generators, **settings):
            ids = drawn
        return ids
