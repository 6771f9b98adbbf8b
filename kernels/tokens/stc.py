"""Accelerating Streaming Video LLMs via Hierarchical Token Compression (STC).

Paper: arXiv 2512.00891. Published code: lern-to-write/STC, without a licence (written here from the
paper's algorithm). No weights.

The cacher runs an encoder layer in full on every second chunk of frames and, in between, only on the
tokens whose keys moved. The pruner keeps the tokens of each frame that are novel to the frame and to
all that was seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modalities.errors import InputError

BANDWIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


def delta_select(k_new: Tensor, k_ref: Tensor, count: int) -> Tensor:
    """The tokens of each frame whose keys are least similar to the reference's.

    Args:
        k_new: ``[F, T, C]``.
        k_ref: ``[T, C]``.

    Returns:
        int64 ``[F, count]``, the least similar first.
    """
    similarity = F.cosine_similarity(k_new.float(), k_ref.float(), dim=-1)
    return similarity.sort(dim=1, stable=True).indices[:, :count]


class TokenCacher:
    """An encoder layer over chunks of frames, of which only every ``interval``-th runs in full.

    The residual stream stays the current frame's; only outputs of the branches are taken over from
    the last frame of the last full chunk.

    Args:
        layer: a pre-norm layer with ``layer_norm1``, ``self_attn`` (``q_proj``, ``k_proj``,
            ``v_proj``, ``out_proj``, ``num_heads``), ``layer_norm2`` and ``mlp``, as transformers'
            SigLIP and CLIP layers.
        ratio: share of the tokens that a partial chunk recomputes.
    """

    def __init__(self, layer: nn.Module, ratio: float = 0.25, interval: int = 2):
        if not 0 < ratio <= 1 or interval < 1:
            raise InputError(
                f"The ratio must be in (0, 1], the interval >= 1: {ratio}, {interval}."
            )
        self.layer, self.ratio, self.interval = layer, ratio, interval
        self.chunk = 0

    def __call__(self, x: Tensor) -> Tensor:
        """A chunk of frames, ``[F, T, C]`` -> ``[F, T, C]``."""
        full = self.chunk % self.interval == 0
        self.chunk += 1
        return self._full(x) if full else self._partial(x)

    def _full(self, x: Tensor) -> Tensor:
        layer, h = self.layer, self.layer.layer_norm1(x)
        keys, values = layer.self_attn.k_proj(h), layer.self_attn.v_proj(h)
        attended = self._attend(layer.self_attn.q_proj(h), keys, values)
        x = x + attended
        outputs = layer.mlp(layer.layer_norm2(x))
        self.keys, self.values = keys[-1], values[-1]
        self.attended, self.outputs = attended[-1], outputs[-1]
        return x + outputs

    def _partial(self, x: Tensor) -> Tensor:
        layer, h = self.layer, self.layer.layer_norm1(x)
        if h.shape[1:] != self.keys.shape:
            raise InputError(
                f"A frame of {list(h.shape[1:])} does not fit the reference {list(self.keys.shape)}."
            )
        frames, tokens, width = h.shape
        count = min(max(int(tokens * self.ratio), 1), tokens)
        keys = layer.self_attn.k_proj(h)
        chosen = delta_select(keys, self.keys, count)[..., None].expand(-1, -1, width)
        fresh = h.gather(1, chosen)
        values = self.values.expand(frames, -1, -1)
        values = values.scatter(1, chosen, layer.self_attn.v_proj(fresh))
        attended = self._attend(layer.self_attn.q_proj(fresh), keys, values)
        x = x + self.attended.expand(frames, -1, -1).scatter(1, chosen, attended)
        outputs = layer.mlp(layer.layer_norm2(x.gather(1, chosen)))
        return x + self.outputs.expand(frames, -1, -1).scatter(1, chosen, outputs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = self.layer.self_attn
        q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return attention.out_proj(out.transpose(1, 2).flatten(2))


@dataclass
class NoveltyScores:
    """Similarity of each token to an anchor, float32 ``[frames, t]``; ``memory``: ``[1, channels]``."""

    frame: Tensor
    video: Tensor
    memory: Tensor
    chunk_mean: Tensor


class NoveltyPruner:
    """Keeps the most novel tokens of each frame; carries the mean of all chunks so far.

    Args:
        tokens: of a frame.
        keep: tokens of each frame that stay.
        channel_fraction: share of the channels, those of the lowest variance, that are compared.
    """

    def __init__(self, tokens: int, keep: int, channel_fraction: float = 0.5):
        if not 1 <= keep <= tokens:
            raise InputError(f"A frame of {tokens} tokens cannot keep {keep}.")
        self.tokens, self.keep, self.channel_fraction = tokens, keep, channel_fraction
        self.total: Tensor | float = 0.0
        self.chunks = 0

    def scores(self, x: Tensor) -> NoveltyScores:
        """Score a chunk ``[frames * t, D]`` and add it to the memory.

        The channels of a chunk stand by ascending variance, and the memory mixes them by place, as
        published.
        """
        if x.ndim != 2 or not len(x) or len(x) % self.tokens:
            raise InputError(f"A chunk must be [frames * {self.tokens}, D], got {list(x.shape)}.")
        x = x.float()
        count = int(x.shape[1] * self.channel_fraction)
        channels = x.var(dim=0, correction=0).sort(stable=True).indices[:count]
        x = x[:, channels]
        mean = x.mean(dim=0, keepdim=True)
        self.total, self.chunks = self.total + mean, self.chunks + 1
        u = F.normalize(x, dim=-1)
        frames = u.view(-1, self.tokens, count)
        memory = F.normalize(self.total / self.chunks, dim=-1)
        return NoveltyScores(
            self._similarity(frames, frames.mean(dim=1, keepdim=True)),
            self._similarity(frames, u.mean(dim=0)),
            self._similarity(frames, memory),
            mean,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``[frames * t, D]`` -> rows that stay, int64 ``[frames, keep]``, ascending."""
        scores = self.scores(x)
        similar = scores.frame + scores.memory
        kept = similar.sort(dim=1, stable=True).indices[:, : self.keep].sort(dim=1).values
        return kept + torch.arange(len(kept), device=x.device)[:, None] * self.tokens

    @staticmethod
    def _similarity(u: Tensor, anchor: Tensor) -> Tensor:
        distance = (u - anchor).square().sum(dim=-1)
        return sum((-distance / (2 * a)).exp() for a in BANDWIDTHS)
