"""RAR: Randomized Autoregressive Visual Generation (Yu et al., ICCV 2025).

Paper: arXiv 2411.00776. Code: Apache-2.0 (bytedance/1d-tokenizer). Published checkpoints
(yucornetto/RAR; tagged Apache-2.0, "research purposes only"): rar_b, rar_l, rar_xl, rar_xxl, over the
MaskGIT-VQGAN's 256 tokens.

A causal transformer that in training writes the tokens of a picture in random orders, more and more
often in raster order. A second table of positions tells every input which token comes next. Sampling is
plain raster order.
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
from ..base import ImageGenerator
from ..cache import StaticCache
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..layers.adaln import CausalAdaLNBlock, layer_norm, modulate
from ..orders import raster_order
from ..sampling import check_generators, check_given, check_sampling, guide
from ..schedules import check_guidance, guidance_weight
from .decoding import autoregress, check_length

# Modulations of so many (class, position) pairs are computed at a time: enough rows that reading the
# weights costs little beside the arithmetic, few enough to stay small in memory.
MODULATION_ROWS = 64


class RAR(ImageGenerator, ModelMixin, ConfigMixin):
    """Class label -> token ids in raster order. The defaults are the published rar_b.

    Ids 0 to ``vocab_size - 1`` are tokens, the next is unused, then follow the classes and the null
    class. A sequence is [cls, class, tokens].

    Args:
        dropout: in attention and MLP, in training.
        label_dropout: how often training replaces the class by the null class.
        guidance_scale, guidance_power, temperature: of sampling, unless `stream` is told others.
    """

    unit = "token"

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 1024,
        num_tokens: int = 256,
        num_classes: int = 1000,
        dim: int = 768,
        depth: int = 24,
        heads: int = 16,
        mlp_hidden: int = 3072,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        guidance_scale: float = 16.0,
        guidance_power: float = 2.75,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + num_classes + 2, dim)
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.zeros(num_tokens + 2, dim))
        self.target_positions = nn.Parameter(torch.zeros(num_tokens, dim))
        self.timesteps = nn.Parameter(torch.zeros(num_tokens + 2, dim))
        self.blocks = nn.ModuleList(
            CausalAdaLNBlock(dim, heads, mlp_hidden, dropout) for _ in range(depth)
        )
        self.head_adaln = Linear(dim, 2 * dim)
        self.head = Linear(dim, vocab_size)

    def num_yields(self, num_tokens: int | None = None, num_steps: int | None = None) -> int:
        return self.num_tokens if num_tokens is None else num_tokens

    def init_weights(self) -> None:
        """Truncated normal 0.02, biases zero; modulations zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("adaln.weight", ".bias")):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)

    def classes(self, labels: Tensor) -> Tensor:
        """Labels ``[B]`` (``num_classes`` = null) -> embeddings ``[B, D]``."""
        return embed_labels(self.embedding.weight[self.config.vocab_size + 1 :], labels)

    def modulations(self, classes: Tensor, positions: slice) -> tuple[list[Tensor], Tensor]:
        """Class embeddings ``[B, D]`` -> of each block ``[B, T, 6 D]``, of the head ``[B, T, 2 D]``.

        They depend on class and position in the sequence alone, not on any token.
        """
        condition = F.silu(classes[:, None] + self.timesteps[positions])
        return [b.modulation(condition) for b in self.blocks], self.head_adaln(condition)

    def to_logits(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=-1)
        return self.head(modulate(layer_norm(x), shift, scale))

    def logits(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            tokens: ids ``[B, n]``, n <= num_tokens, as they are written.
            labels: ``[B]``, ``num_classes`` = null.
            orders: ``[B, num_tokens]``: place in the raster of the i-th written token; default raster.

        Returns:
            ``[B, n + 1, V]``, entry i of the i-th written token (the last of a whole sequence: of none).
        """
        batch, count = tokens.shape
        if orders is None:
            orders = raster_order(batch, self.config.num_tokens, tokens.device)
        classes = self.classes(labels)
        written = self.positions[2:][orders[:, :count]]
        target = self.target_positions[orders[:, : count + 1]]
        x = torch.cat([classes[:, None] + self.positions[1], self.embedding(tokens) + written], 1)
        x = x + F.pad(target, (0, 0, 0, x.shape[1] - target.shape[1]))
        start = (self.cls_token + self.positions[0]).expand(batch, 1, -1)
        x = torch.cat([start, x], dim=1)
        blocks, head = self.modulations(classes, slice(count + 2))
        for block, modulation in zip(self.blocks, blocks, strict=True):
            x = block(x, modulation)
        return self.to_logits(x[:, 1:], head[:, 1:])

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        random_ratio: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of whole sequences, each in a random order or in raster order.

        Args:
            tokens: ids ``[B, num_tokens]`` in raster order.
            labels: classes ``[B]``; in training some are dropped.
            random_ratio: how often the order is random. The paper's recipe: 1 for the first half of
                training, linearly to 0 at three quarters, then 0.
            generator: of orders and dropped labels, on the model's device.
        """
        batch, count = tokens.shape
        random = {"generator": generator, "device": tokens.device}
        labels = self.drop_labels(labels, generator)
        shuffled = torch.rand(batch, count, **random).argsort(dim=1)
        chosen = torch.rand(batch, 1, **random) < random_ratio
        orders = torch.where(chosen, shuffled, raster_order(batch, count, tokens.device))
        tokens = tokens.gather(1, orders)
        logits = self.logits(tokens[:, :-1], labels, orders).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return loss, {"nll": loss.detach()}

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        num_tokens: int | None = None,
        guidance_scale: float | None = None,
        guidance_power: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, 1]``, ``[B, 2]``, ... ``[B, num_tokens]`` in raster order as they are drawn.

        Args:
            labels: classes ``[B]``.
            generators: one an item.
            guidance_scale: at the end of the power-cosine schedule, which starts at 1. A scale of 1
                runs no unconditional half (the published code writes 0 for that).
            guidance_power: of the schedule; 0 guides all tokens alike.
            tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True.
            noise: Exp(1) draws ``[num_tokens, B, V]`` in place of the generators'.

        Raises:
            InputError: a label, token or setting that means nothing.
        """
        config = self.config
        temperature = config.temperature if temperature is None else temperature
        decoder = self.decoder(labels, guidance_scale, guidance_power, num_tokens)
        check_sampling(temperature, top_k, top_p)
        check_generators(generators, decoder.batch)
        check_given(tokens, token_mask, decoder.batch, config.num_tokens, config.vocab_size)
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

    @torch.no_grad()
    def decoder(
        self,
        labels: Tensor,
        guidance_scale: float | None = None,
        guidance_power: float | None = None,
        num_tokens: int | None = None,
    ) -> RARDecoder:
        """The model bound to its classes, for the loops of `decoding` and `acceleration`.

        Raises:
            InputError: more tokens than the model has positions, or no such class.
        """
        config = self.config
        count = config.num_tokens if num_tokens is None else num_tokens
        check_length(count, config.num_tokens)
        check_labels(labels, config.num_classes)
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        power = config.guidance_power if guidance_power is None else guidance_power
        check_guidance(scale, "power-cosine", power)
        return RARDecoder(self, labels, scale, power, count)

    @torch.no_grad()
    def generate(self, labels: Tensor, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """All of `stream`: ids int64 ``[B, num_tokens]``."""
        for drawn in self.stream(labels, generators, **settings):
            ids = drawn
        return ids


class RARDecoder:
    """A RAR bound to class labels ``[B]``; see `decoding.Decoder`. Made by `RAR.decoder`."""

    def __init__(self, model: RAR, labels: Tensor, scale: float, power: float, num_tokens: int):
        config = model.config
        self.model, self.batch, self.device = model, len(labels), labels.device
        self.vocab_size, self.num_tokens, self.cached = config.vocab_size, num_tokens, 0
        # Conditional rows, then unconditional ones, which all share the modulations of the null class.
        self.guided = scale != 1
        self.rows = torch.arange(self.batch, device=self.device)
        if self.guided:
            labels = torch.cat([labels, null_labels(labels, config.num_classes, count=1)])
            self.rows = torch.cat([self.rows, self.rows.new_full((self.batch,), self.batch)])
        self.classes = model.classes(labels)
        weights = [
            guidance_weight("power-cosine", scale, step / config.num_tokens, power)
            for step in range(num_tokens)
        ]
        self.weights = torch.tensor(weights, device=self.device)[:, None]
        self.cache = StaticCache(
            len(model.blocks),
            len(self.rows),
            config.heads,
            num_tokens + 1,
            config.dim // config.heads,
            self.classes.dtype,
            self.device,
        )
        self.base = self.stop = 0

    def modulations(self, first: int, end: int) -> tuple[list[Tensor], Tensor]:
        """`RAR.modulations` from ``self.base`` on, made for many positions at a time."""
        if not self.base <= first < end <= self.stop:
            ahead = max(1, MODULATION_ROWS // len(self.classes))
            self.base, self.stop = first, max(end, first + ahead)
            self.made = self.model.modulations(self.classes, slice(self.base, self.stop))
        return self.made

    @torch.no_grad()
    def __call__(self, ids: Tensor, cached: int, count: int) -> Tensor:
        model = self.model
        # A sequence is [cls, class, tokens]: place j stands at position j + 1, place 0 at 0 and 1.
        first, end = cached + 1 if cached else 0, ids.shape[1] + 2
        # Of token i as an input: where it stands and what follows.
        at, after = slice(max(first, 2), end), slice(max(first - 1, 1), end - 1)
        x = model.embedding(ids[:, max(first - 2, 0) :])
        x = (x + model.positions[at] + model.target_positions[after]).repeat(
            2 if self.guided else 1, 1, 1
        )
        if first == 0:
            start = (model.cls_token + model.positions[0]).expand(len(x), 1, -1)
            classes = self.classes[self.rows] + model.positions[1] + model.target_positions[0]
            x = torch.cat([start, classes[:, None], x], dim=1)
        blocks, head = self.modulations(first, end)
        here = slice(first - self.base, end - self.base)
        for layer, block in enumerate(model.blocks):
            x = block(x, blocks[layer][self.rows, here], self.cache, layer, first)
        here = slice(here.stop - count, here.stop)
        logits = model.to_logits(x[:, -count:], head[self.rows, here]).float()
        if self.guided:
            weights = self.weights[end - 1 - count : end - 1]
            logits = guide(*logits.chunk(2), weights)
        return logits

    def repeat(self, batch: int) -> RARDecoder:
        other = copy.copy(self)
        rows = torch.arange(len(self.rows), device=self.device).repeat_interleave(batch)
        other.batch, other.rows, other.cache = batch, self.rows[rows], self.cache.select(rows)
        return other
