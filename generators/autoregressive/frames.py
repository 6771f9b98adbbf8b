"""A causal transformer over the single codebook of an audio codec, with a condition at every frame.

The condition runs beside the tokens, as the text does in the talker of Qwen2.5-Omni (arXiv
2503.20215): the input of a frame is the embedding of the token before it plus that frame's
condition. Attention looks back a fixed number of frames, so that memory and time per frame stay the
same however long the sound is. Blocks: rotary positions, gated MLPs (LLaMA, arXiv 2302.13971).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear
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
    """Tokens ``[B, T]`` under conditions ``[B, T, dim]``.

    Args:
        vocab_size: of the codec.
        window: frames that attention sees, the present one included.
        dropout: in training.
        token_dropout: share of the tokens before a frame that training hides, so that the model
            leans on the condition and forgives its own mistakes.
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
    ):
        super().__init__()
        self.heads = heads
        self.window = window
        self.token_dropout = token_dropout
        self.vocab_size = vocab_size
        # The last two rows: the start of a sequence, and a hidden token.
        self.embedding = nn.Embedding(vocab_size + 2, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = Linear(dim, vocab_size, bias=False)

    def rope(self, first: int, count: int, device: torch.device) -> Rope:
        positions = torch.arange(first, first + count, device=device)[:, None]
        return rope_tables(positions, self.head.in_features // self.heads)

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits ``[B, T, V]`` of tokens ``[B, T]`` under ``[B, T, dim]``."""
        before = F.pad(tokens[:, :-1], (1, 0), value=self.vocab_size)
        if self.training and self.token_dropout:
            hidden = torch.rand(before.shape, device=before.device) < self.token_dropout
            hidden[:, 0] = False
            before = before.masked_fill(hidden, self.vocab_size + 1)
        x = self.embedding(before) + condition
        count = x.shape[1]
        ages = torch.arange(count, device=x.device)
        ages = ages[:, None] - ages
        mask = (ages >= 0) & (ages < self.window)
        rope = self.rope(0, count, x.device)
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.head(self.norm(x))

    @torch.no_grad()
    def stream(
        self,
        condition: Tensor,
        generators: Sequence[torch.Generator],
        guidance_scale: float = 1.0,
        null_condition: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Iterator[Tensor]:
        """Yield the ids ``[B]`` of frame 0, 1, ... T - 1.

        Args:
            condition: ``[B, T, dim]``.
            generators: one an item.
            null_condition: ``[B, T, dim]``, needed where ``guidance_scale`` is not 1.

        Raises:
            InputError: a setting that means nothing.
        """
        check_sampling(temperature, top_k, top_p)
        check_guidance(guidance_scale)
        check_generators(generators, len(condition))
        batch, count, dim = condition.shape
        guided = guidance_scale != 1
        if guided:
            condition = torch.cat([condition, null_condition])
        shape = (len(self.blocks), len(condition), self.heads, dim // self.heads)
        cache = RollingCache(shape, self.window, condition)
        cos, sin = self.rope(0, count, condition.device)
        ids = torch.full((batch,), self.vocab_size, device=condition.device)
        for position in range(count):
            x = self.embedding(ids.repeat(2) if guided else ids)[:, None]
            x = x + condition[:, position : position + 1]
            rope = cos[position : position + 1], sin[position : position + 1]
            for layer, block in enumerate(self.blocks):
                x = block.step(x, rope, cache, layer)
            cache.position += 1
            logits = self.head(self.norm(x))[:, 0].float()
            if guided:
                logits = guide(*logits.chunk(2), guidance_scale)
            ids = sample(logits, temperature, top_k, top_p, generators)
            yield ids
