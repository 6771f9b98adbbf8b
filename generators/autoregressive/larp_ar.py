"""The autoregressive generator of LARP (Wang et al., ICLR 2025).

Paper: arXiv 2410.21264. Code: MIT (hywang66/LARP). Published checkpoints (no licence text of the weights
was seen): hywang66/LARP-L-long-AR (UCF-101 by class), hywang66/LARP-L-long-AR-FP (Kinetics-600, the frames
after five given ones).

A LLaMA without rotary positions: learned absolute ones are added to the inputs. It writes the tokens of
`LARP` one after the other, after a class or after the tokens of a clip that begins as wanted and then
stands still.
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
from ..cache import StaticCache
from ..conditioning.classes import check_labels, drop_labels, embed_labels, null_labels
from ..layers.attention import causal_attention
from ..sampling import check_generators, check_given, check_ids, check_sampling, guide
from ..schedules import check_guidance
from .decoding import autoregress, check_length


class Block(nn.Module):
    """RMSNorm, causal attention, RMSNorm, SwiGLU; no biases."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.gate_value = Linear(dim, 2 * mlp_hidden, bias=False)
        self.down = Linear(mlp_hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, cache: StaticCache | None = None, layer: int = 0, position: int = 0
    ) -> Tensor:
        """``[B, T, D]`` -> the same; with a cache ``x`` holds the positions from ``position`` on."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(layer, position, k, v)
        attended = causal_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(attended))
        gate, value = self.gate_value(self.norm2(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * value))


class LARPGenerator(ModelMixin, ConfigMixin):
    """Class label, or the tokens of a condition clip -> token ids. The defaults are LARP-L-long-AR.

    Args:
        num_tokens: of a clip.
        num_classes: of labels; the next one is the null class.
        frame_prediction: the condition is ``num_tokens`` tokens (and a separator, id ``vocab_size``)
            in place of a class.
        dropout: of input embeddings and both branches of a block, in training.
        label_dropout: how often training replaces the class by the null class.
        guidance_scale, temperature: of sampling, unless `stream` is told others.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8192,
        num_tokens: int = 1024,
        num_classes: int = 101,
        frame_prediction: bool = False,
        dim: int = 1280,
        depth: int = 30,
        heads: int = 20,
        mlp_hidden: int = 3584,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        guidance_scale: float = 1.25,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + frame_prediction, dim)
        self.classes = None if frame_prediction else nn.Embedding(num_classes + 1, dim)
        # Positions of the condition; its last one predicts the first token.
        self.start_length = num_tokens + 1 if frame_prediction else 1
        self.positions = nn.Parameter(torch.zeros(self.start_length + num_tokens - 1, dim))
        self.input_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_hidden, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = Linear(dim, vocab_size, bias=False)

    def init_weights(self) -> None:
        """Normal 0.02; an output of zeros."""
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.head.weight)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    def check_condition(self, condition: Tensor) -> None:
        """Raise InputError unless these are labels, or of a frame predictor ids ``[B, num_tokens]``."""
        if self.classes is not None:
            check_labels(condition, self.config.num_classes)
            return
        wanted = (len(condition), self.num_tokens)
        if condition.dtype.is_floating_point or tuple(condition.shape) != wanted:
            raise InputError(
                f"The condition of this model is the tokens of a clip, [batch, {self.num_tokens}], "
                f"got {str(condition.dtype).removeprefix('torch.')} {list(condition.shape)}."
            )
        check_ids(condition, self.vocab_size)

    def start(self, condition: Tensor) -> Tensor:
        """Labels, or ids ``[B, num_tokens]`` -> embeddings ``[B, start_length, D]``."""
        if self.classes is not None:
            return embed_labels(self.classes.weight, condition)[:, None]
        return self.embedding(F.pad(condition, (0, 1), value=self.vocab_size))

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits ``[B, n + 1, V]`` of ids ``[B, n]``, n < num_tokens, and the next.

        Args:
            condition: labels ``[B]`` (``num_classes`` = null), or ids ``[B, num_tokens]``.
        """
        x = torch.cat([self.start(condition), self.embedding(tokens)], dim=1)
        x = self.input_dropout(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, self.start_length - 1 :]))

    def forward(
        self, tokens: Tensor, condition: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of whole clips.

        Args:
            tokens: ids ``[B, num_tokens]``.
            condition: classes ``[B]``, of which training drops some, or ids ``[B, num_tokens]``.
            generator: of dropped labels, on the model's device.
        """
        if self.training and self.classes is not None:
            chance = self.config.label_dropout
            condition = drop_labels(condition, self.config.num_classes, chance, generator)
        logits = self.logits(tokens[:, :-1], condition).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return loss, {"nll": loss.detach()}

    @torch.no_grad()
    def stream(
        self,
        condition: Tensor,
        generators: Sequence[torch.Generator],
        num_tokens: int | None = None,
        guidance_scale: float | None = None,
        guided_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, 1]``, ``[B, 2]``, ... ``[B, num_tokens]`` as they are drawn.

        Args:
            condition: labels ``[B]``, or ids ``[B, num_tokens]`` of the clip to continue (`LARP.pad`
                makes one of its first frames).
            generators: one an item.
            guidance_scale: of classes; 1 runs no unconditional half.
            guided_tokens: only the first so many are guided (``cfg_interval + 2`` of the published
                code); default all.
            tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True.
            noise: Exp(1) draws ``[num_tokens, B, V]`` in place of the generators'.

        Raises:
            InputError: a condition, token or setting that means nothing.
        """
        temperature = self.config.temperature if temperature is None else temperature
        decoder = self.decoder(condition, guidance_scale, guided_tokens, num_tokens)
        check_sampling(temperature, top_k, top_p)
        check_generators(generators, decoder.batch)
        check_given(tokens, token_mask, decoder.batch, self.num_tokens, self.vocab_size)
        yield from autoregress(
            decoder,
            generators,
            decoder.num_tokens,
            temperature,
            top_k,
            top_p,
            tokens,
            token_mask,
            noise,
        )

    def decoder(
        self,
        condition: Tensor,
        guidance_scale: float | None = None,
        guided_tokens: int | None = None,
        num_tokens: int | None = None,
    ) -> LARPDecoder:
        """The model bound to its condition, for the loops of `decoding` and `acceleration`.

        Raises:
            InputError: more tokens than the model has positions, or no such condition.
        """
        count = self.num_tokens if num_tokens is None else num_tokens
        check_length(count, self.num_tokens)
        self.check_condition(condition)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        check_guidance(scale)
        guided = count if guided_tokens is None else guided_tokens
        if scale == 1 or self.classes is None:
            guided = 0
        return LARPDecoder(self, condition, scale, guided, count)

    @torch.no_grad()
    def generate(
        self, condition: Tensor, generators: Sequence[torch.Generator], **settings
    ) -> Tensor:
        """All of `stream`: ids int64 ``[B, num_tokens]``."""
        for drawn in self.stream(condition, generators, **settings):
            ids = drawn
        return ids


class LARPDecoder:
    """A LARPGenerator bound to its conditions; see `decoding.Decoder`. Made by its ``decoder``."""

    def __init__(
        self, model: LARPGenerator, condition: Tensor, scale: float, guided: int, num_tokens: int
    ):
        config = model.config
        self.model, self.batch, self.device = model, len(condition), condition.device
        self.vocab_size, self.num_tokens, self.cached = config.vocab_size, num_tokens, 0
        self.scale, self.guided = scale, guided
        if guided:  # Conditional rows, then unconditional ones.
            condition = torch.cat([condition, null_labels(condition, config.num_classes)])
        self.start = model.start(condition)
        self.cache = StaticCache(
            len(model.blocks),
            len(self.start),
            config.heads,
            model.start_length + num_tokens - 1,
            config.dim // config.heads,
            self.start.dtype,
            self.device,
        )

    @torch.no_grad()
    def __call__(self, ids: Tensor, cached: int, count: int) -> Tensor:
        model, end = self.model, ids.shape[1] + 1
        # Place j > 0 stands at position start_length - 1 + j; place 0 is the whole condition.
        first = cached + model.start_length - 1 if cached else 0
        x = model.embedding(ids[:, max(cached - 1, 0) :])
        guide_from = end - count
        guided = guide_from < self.guided or cached < self.guided
        cache = self.cache
        if guided:
            x = x.repeat(2, 1, 1)
        elif self.guided:  # The unconditional half is not read any more.
            cache = cache.select(slice(self.batch))
        if cached == 0:
            x = torch.cat([self.start, x], dim=1)
        x = x + model.positions[first : first + x.shape[1]]
        for layer, block in enumerate(model.blocks):
            x = block(x, cache, layer, first)
        logits = model.head(model.norm(x[:, -count:])).float()
        if not guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        places = torch.arange(guide_from, end, device=self.device)[:, None]
        both = guide(conditional, unconditional, self.scale)
        return torch.where(places < self.guided, both, conditional)

    def repeat(self, batch: int) -> LARPDecoder:
        other = copy.copy(self)
        rows = torch.arange(len(self.start), device=self.device).repeat_interleave(batch)
        other.batch, other.start, other.cache = batch, self.start[rows], self.cache.select(rows)
        return other
