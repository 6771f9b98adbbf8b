"""A causal transformer over the tokens of an audio codec, with a condition at every frame.

The condition runs beside the tokens, as the text does in the talker of Qwen2.5-Omni (arXiv
2503.20215): the input of a step is the embedding of the tokens before it plus that step's condition.
With several codebooks, codebook q runs q steps behind the first, so that what a step writes at once
belongs to different frames (MusicGen's delay pattern, arXiv 2306.05284, section 2.2; see
`tokenizers.audio.patterns`). Attention looks back a fixed number of steps, so that memory and time per
frame stay the same however long the sound is. Blocks: rotary positions, gated MLPs (LLaMA, arXiv
2302.13971).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...tokenizers.audio.patterns import delay
from ..layers.mlp import GatedMLP
from ..layers.rope import Rope, RopeAttention, rope_tables, rotate
from ..sampling import check_generators, check_sampling, guide, sample
from ..schedules import check_guidance


class Block(nn.Module):
    """Attention and gated MLP, each after a norm, with residuals."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.attn = RopeAttention(dim, heads, qkv_bias=False, dropout=dropout)
        self.norm_2 = nn.LayerNorm(dim)
        self.mlp = GatedMLP(dim, hidden, F.silu)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm_1(x), rope, mask)
        return x + self.dropout(self.mlp(self.norm_2(x)))

    def step(self, x: Tensor, rope: Rope, cache: RollingCache, layer: int) -> Tensor:
        """One frame ``[B, 1, D]``, which sees those in the cache."""
        attn = self.attn
        q, k, v = attn.qkv(self.norm_1(x)).unflatten(-1, (3, attn.heads, -1)).unbind(2)
        k, v = cache.update(layer, rotate(k, rope).transpose(1, 2), v.transpose(1, 2))
        h = F.scaled_dot_product_attention(rotate(q, rope).transpose(1, 2), k, v)
        x = x + attn.proj(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class RollingCache:
    """Keys and values of the last ``window`` frames of every layer, ``[layers, B, heads, ...]``.

    A new frame takes the place of the oldest one: softmax does not mind the order, and rotary
    positions are in the keys.
    """

    def __init__(self, shape: tuple[int, ...], window: int, like: Tensor):
        layers, batch, heads, head_dim = shape
        self.keys = like.new_zeros(layers, batch, heads, window, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.window = window
        self.position = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one frame's ``[B, heads, 1, head_dim]`` and return all that it sees."""
        place = self.position % self.window
        self.keys[layer, :, :, place : place + 1] = k
        self.values[layer, :, :, place : place + 1] = v
        end = min(self.position + 1, self.window)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class FrameTransformer(nn.Module):
    """Tokens ``[B, Q, T]`` in ``T + Q - 1`` steps, under conditions ``[B, T + Q - 1, dim]``.

    Args:
        vocab_size: of each codebook.
        window: steps that attention sees, the present one included.
        dropout: in training.
        token_dropout: share of the tokens before a step that training hides, so that the model
            leans on the condition and forgives its own mistakes.
        history_dropout: share of the items all of whose tokens it hides. A tone that goes on tells
            what it is by itself: only without it every frame must be told by its condition.
        num_codebooks: Q.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_hidden: int,
        window: int,
        dropout: float,
        token_dropout: float,
        history_dropout: float = 0.0,
        num_codebooks: int = 1,
    ):
        super().__init__()
        self.heads = heads
        self.window = window
        self.token_dropout = token_dropout
        self.history_dropout = history_dropout
        self.vocab_size = vocab_size
        self.num_codebooks = num_codebooks
        # Rows of each codebook in turn. The last two of each: no token, and a hidden one.
        self.embedding = nn.Embedding(num_codebooks * (vocab_size + 2), dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = Linear(dim, num_codebooks * vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids ``[..., Q]``, one of each codebook -> the sum of their embeddings ``[..., dim]``."""
        first = torch.arange(self.num_codebooks, device=ids.device) * (self.vocab_size + 2)
        return self.embedding(ids + first).sum(-2)

    def rope(self, first: int, count: int, device: torch.device) -> Rope:
        positions = torch.arange(first, first + count, device=device)[:, None]
        return rope_tables(positions, self.head.in_features // self.heads)

    def logits(self, tokens: Tensor, lengths: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits ``[B, Q, T, V]``.

        Args:
            tokens: ids ``[B, Q, T]``.
            lengths: frames of each item ``[B]``; what is behind them is not read.
            condition: ``[B, T + Q - 1, dim]``.
        """
        frames, none, hidden = tokens.shape[-1], self.vocab_size, self.vocab_size + 1
        inside = torch.arange(frames, device=tokens.device) < lengths[:, None]
        delayed = delay(tokens.masked_fill(~inside[:, None], none), none)
        before = F.pad(delayed[..., :-1], (1, 0), value=none).mT
        if self.training and (self.token_dropout or self.history_dropout):
            hide = torch.rand(before.shape, device=before.device) < self.token_dropout
            hide |= torch.rand(len(before), 1, 1, device=before.device) < self.history_dropout
            before = before.masked_fill(hide & (before != none), hidden)
        x = self.embed(before) + condition
        count = x.shape[1]
        ages = torch.arange(count, device=x.device)
        ages = ages[:, None] - ages
        mask = (ages >= 0) & (ages < self.window)
        rope = self.rope(0, count, x.device)
        for block in self.blocks:
            x = block(x, rope, mask)
        rows = self.head(self.norm(x)).unflatten(-1, (self.num_codebooks, -1)).unbind(2)
        return torch.stack([row[:, q : q + frames] for q, row in enumerate(rows)], dim=1)

    @torch.no_grad()
    def stream(
        self,
        condition: Tensor,
        lengths: Tensor,
        generators: Sequence[torch.Generator],
        guidance_scale: float = 1.0,
        null_condition: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Iterator[Tensor]:
        """Yield the ids ``[B, Q]`` of frame 0, 1, ... T - 1.

        Args:
            condition: ``[B, T + Q - 1, dim]``.
            lengths: frames of each item ``[B]``; behind them ``vocab_size`` is yielded.
            generators: one an item.
            null_condition: ``[B, T + Q - 1, dim]``, needed where ``guidance_scale`` is not 1.

        Raises:
            InputError: a setting that means nothing.
        """
        check_sampling(temperature, top_k, top_p)
        check_guidance(guidance_scale)
        check_generators(generators, len(condition))
        (batch, count, dim), rows = condition.shape, self.num_codebooks
        guided = guidance_scale != 1
        if guided:
            condition = torch.cat([condition, null_condition])
        shape = (len(self.blocks), len(condition), self.heads, dim // self.heads)
        cache = RollingCache(shape, self.window, condition)
        cos, sin = self.rope(0, count, condition.device)
        written = torch.full((batch, rows, count), self.vocab_size, device=condition.device)
        ids, codebooks = written[..., 0], torch.arange(rows, device=condition.device)
        for step in range(count):
            x = self.embed(ids.repeat(2, 1) if guided else ids)[:, None]
            x = x + condition[:, step : step + 1]
            rope = cos[step : step + 1], sin[step : step + 1]
            for layer, block in enumerate(self.blocks):
                x = block.step(x, rope, cache, layer)
            cache.position += 1
            logits = self.head(self.norm(x))[:, 0].unflatten(-1, (rows, -1)).float()
            if guided:
                logits = guide(*logits.chunk(2), guidance_scale)
            ids = sample(logits, temperature, top_k, top_p, generators)
            frame = step - codebooks
            there = (frame >= 0) & (frame < lengths[:, None])
            ids = ids.masked_fill(~there, self.vocab_size)
            written[..., step] = ids
            if step >= rows - 1:
                yield torch.stack([written[:, q, step - rows + 1 + q] for q in range(rows)], dim=1)
