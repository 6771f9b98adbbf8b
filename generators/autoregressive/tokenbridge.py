"""TokenBridge: Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation (Wang et
al., 2025).

Paper: arXiv 2503.16430. Code: MIT. Published checkpoints (Epiphqny/TokenBridge): tokenbridge_large,
tokenbridge_huge, over the ids of `TokenBridgeTokenizer`.

A masked transformer (MAR, arXiv 2406.11838) reads the tokens that are there and makes a feature for
those to come; for each of them a small causal transformer writes its channels one after the other, the
low frequencies first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ...tokenizers.base import Tokenizer
from ...tokenizers.quantizers.dimension_wise import DimensionWiseQuantizer
from ..base import ImageGenerator
from ..cache import StaticCache
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..layers.adaln import CausalAdaLNBlock, layer_norm, modulate
from ..layers.vit import ViTBlock
from ..masked.masking import normal_mask_ratio
from ..orders import random_order
from ..sampling import check_generators, check_given, check_sampling, draw, guide, sample
from ..schedules import check_guidance, check_steps, guidance_weight, masked_counts

# Modulations of so many (token, channel) pairs are computed at a time: enough rows that reading the
# weights costs little beside the arithmetic, few enough to stay small in memory.
MODULATION_ROWS = 64


class DimensionHead(nn.Module):
    """A token's feature -> its channels, each conditioned on those before (section 3.3).

    Args:
        dim, head_dim: width of the feature and of the head.
        channels, levels: channels a token, ids a channel.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        depth: int,
        heads: int,
        channels: int,
        levels: int,
        ratio: float,
    ):
        super().__init__()
        self.heads = heads
        self.condition = Linear(dim, head_dim)
        self.positions = nn.Parameter(torch.zeros(channels, head_dim))
        self.timesteps = nn.Parameter(torch.zeros(channels, head_dim))
        self.embeddings = nn.ModuleList(nn.Embedding(levels, head_dim) for _ in range(channels - 1))
        self.blocks = nn.ModuleList(
            CausalAdaLNBlock(head_dim, heads, round(head_dim * ratio)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.final_adaln = Linear(head_dim, 2 * head_dim)
        self.outputs = nn.ModuleList(Linear(head_dim, levels) for _ in range(channels))

    def modulations(self, conditions: Tensor) -> tuple[list[Tensor], Tensor]:
        """``[N, n, E]`` -> of each block ``[N, n, 6 E]``, of the end ``[N, n, 2 E]``."""
        conditions = F.silu(conditions)
        return [b.modulation(conditions) for b in self.blocks], self.final_adaln(conditions)

    def final(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=-1)
        return modulate(layer_norm(self.norm(x)), shift, scale)

    def logits(self, features: Tensor, ids: Tensor) -> Tensor:
        """Teacher-forced: features ``[N, D]``, ids ``[N, C]`` in the order of writing -> ``[N, C, V]``.

        The first input is the condition without its timestep here, and with it in `sample`: the
        published weights are trained and evaluated so.
        """
        condition = self.condition(features)[:, None]
        before = [table(ids[:, j : j + 1]) for j, table in enumerate(self.embeddings)]
        x = torch.cat([condition, *before], dim=1) + self.positions
        blocks, end = self.modulations(condition + self.timesteps)
        for block, modulation in zip(self.blocks, blocks, strict=True):
            x = block(x, modulation)
        x = self.final(x, end)
        return torch.stack([output(x[:, j]) for j, output in enumerate(self.outputs)], dim=1)

    def sample(self, features: Tensor, temperature: float, noise: Tensor) -> Tensor:
        """Features ``[N, D]``, Exp(1) draws ``[N, C, V]`` -> ids int64 ``[N, C]`` in the order of writing."""
        count, channels = noise.shape[:2]
        conditions = self.condition(features)[:, None] + self.timesteps
        width = conditions.shape[-1]
        cache = StaticCache(
            len(self.blocks),
            count,
            self.heads,
            channels,
            width // self.heads,
            conditions.dtype,
            conditions.device,
        )
        ahead = max(1, MODULATION_ROWS // count)
        x = conditions[:, :1]
        ids = []
        for j in range(channels):
            here = slice(j % ahead, j % ahead + 1)
            if here.start == 0:
                blocks, end = self.modulations(conditions[:, j : j + ahead])
            x = x + self.positions[j]
            for layer, block in enumerate(self.blocks):
                x = block(x, blocks[layer][:, here], cache, layer, j)
            logits = self.outputs[j](self.final(x, end[:, here])[:, 0]).float()
            ids.append(sample(logits, temperature, None, 1.0, (), noise[:, j]))
            if j + 1 < channels:
                x = self.embeddings[j](ids[-1])[:, None]
        return torch.stack(ids, dim=1)


class TokenBridge(ImageGenerator, ModelMixin, ConfigMixin):
    """Class label -> ids of every channel of every token. The defaults are the published large model.

    Args:
        num_tokens, channels: of the continuous tokenizer; a picture has ``num_tokens * channels`` ids.
        levels, value_range, std_range: of its `DimensionWiseQuantizer`.
        channel_order: in which order the channels of a token are written.
        encoder_dim, encoder_depth, encoder_heads: of the transformer over the tokens that are there.
        decoder_dim, decoder_depth, decoder_heads: of the transformer over all places.
        head_dim, head_depth, head_heads: of the dimension-wise head.
        buffer_size: copies of the class in front of the tokens.
        dropout, label_dropout: in training.
        guidance_scale, guidance_schedule, temperature, num_steps: of sampling, unless `stream` is told
            others.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantizer"]
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 256,
        channels: int = 16,
        levels: int = 64,
        value_range: Sequence[float] = (-5.0, 5.0),
        std_range: float = 3.0,
        channel_order: Sequence[int] = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5),
        num_classes: int = 1000,
        encoder_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_heads: int = 16,
        decoder_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_heads: int = 16,
        head_dim: int = 1024,
        head_depth: int = 4,
        head_heads: int = 8,
        mlp_ratio: float = 4.0,
        buffer_size: int = 64,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        guidance_scale: float = 3.1,
        guidance_schedule: str = "linear",
        temperature: float = 0.96,
        num_steps: int = 256,
    ):
        super().__init__()
        if sorted(channel_order) != list(range(channels)):
            raise InputError(
                f"channel_order must name each of the {channels} channels once, got "
                f"{list(channel_order)}."
            )
        self.quantizer = DimensionWiseQuantizer(levels, tuple(value_range), std_range)
        self.class_embedding = nn.Embedding(num_classes, encoder_dim)
        self.null_class = nn.Parameter(torch.zeros(1, encoder_dim))
        self.token_embed = Linear(channels, encoder_dim)
        self.encoder_positions = nn.Parameter(torch.zeros(buffer_size + num_tokens, encoder_dim))
        self.token_norm = nn.LayerNorm(encoder_dim, eps=1e-6)
        self.encoder_blocks = nn.ModuleList(
            ViTBlock(encoder_dim, encoder_heads, round(encoder_dim * mlp_ratio), dropout)
            for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_dim, eps=1e-6)
        self.decoder_embed = Linear(encoder_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(decoder_dim))
        self.decoder_positions = nn.Parameter(torch.zeros(buffer_size + num_tokens, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            ViTBlock(decoder_dim, decoder_heads, round(decoder_dim * mlp_ratio), dropout)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.output_positions = nn.Parameter(torch.zeros(num_tokens, decoder_dim))
        self.head = DimensionHead(
            decoder_dim, head_dim, head_depth, head_heads, channels, levels, mlp_ratio
        )

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens * self.config.channels

    @property
    def vocab_size(self) -> int:
        return self.config.levels

    def token_mask(self, mask: Tensor) -> Tensor:
        return mask.flatten(1).repeat_interleave(self.config.channels, dim=1)

    def init_weights(self) -> None:
        """Xavier for matrices, normal 0.02 for tables, zero for biases and modulations (as MAR)."""
        tables = ("embedding.weight", "positions", "token", "class", "timesteps")
        for name, parameter in self.named_parameters():
            if "adaln" in name or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(tables) or ".embeddings." in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        super().check_tokenizer(tokenizer)
        theirs, ours = getattr(tokenizer, "quantizer", None), self.quantizer
        if not isinstance(theirs, DimensionWiseQuantizer) or (
            (theirs.low, theirs.high, theirs.std_range) != (ours.low, ours.high, ours.std_range)
        ):
            raise InputError(
                f"TokenBridge writes levels between {ours.low} and {ours.high}; "
                f"{type(tokenizer).__name__} has others: choose the tokenizer that it was trained on."
            )

    def classes(self, labels: Tensor) -> Tensor:
        """Labels ``[B]`` (``num_classes`` = null) -> embeddings ``[B, D]``."""
        return embed_labels(torch.cat([self.class_embedding.weight, self.null_class]), labels)

    def features(self, values: Tensor, visible: Tensor, wanted: Tensor, classes: Tensor) -> Tensor:
        """The masked transformer.

        Args:
            values: dequantized tokens ``[B, num_tokens, channels]``.
            visible: places whose tokens are there, int64 ``[B, n]``.
            wanted: places asked for, int64 ``[B, m]``.
            classes: ``[B, D]``.

        Returns:
            ``[B, m, D']``.
        """
        buffer = self.config.buffer_size
        x = self.token_embed(_pick(values, visible).to(classes.dtype))
        x = torch.cat([classes[:, None].expand(-1, buffer, -1), x], dim=1)
        start = torch.arange(buffer, device=visible.device).expand(len(visible), -1)
        places = torch.cat([start, visible + buffer], dim=1)
        x = self.token_norm(x + self.encoder_positions[places])
        for block in self.encoder_blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder_norm(x))

        batch, width = len(x), x.shape[-1]
        masked = self.mask_token.to(x.dtype).expand(batch, len(self.decoder_positions), -1)
        x = masked.scatter(1, places[..., None].expand(-1, -1, width), x) + self.decoder_positions
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, wanted + buffer)
        return self.decoder_norm(x) + self.output_positions[wanted]

    def forward(
        self, tokens: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the channels of masked tokens; 70 to 100 % of them are masked.

        Args:
            tokens: ids ``[B, num_tokens * channels]`` of `TokenBridgeTokenizer`.
            labels: classes ``[B]``; in training some are dropped.
            generator: of masks and dropped labels, on the model's device.
        """
        config, device = self.config, tokens.device
        labels = self.drop_labels(labels, generator)
        ids = tokens.unflatten(1, (config.num_tokens, config.channels))
        ratio = normal_mask_ratio(generator, device)
        order = torch.rand(ids.shape[:2], generator=generator, device=device).argsort(dim=1)
        count = math.ceil(config.num_tokens * ratio)
        masked, visible = order[:, :count], order[:, count:]
        values = self.quantizer.ids_to_codes(ids)
        features = self.features(values, visible, masked, self.classes(labels)).flatten(0, 1)
        targets = _pick(ids, masked).flatten(0, 1)[:, list(config.channel_order)]
        logits = self.head.logits(features, targets).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, {"nll": loss.detach()}

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        orders: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, num_tokens * channels]`` after every step.

        What is still masked holds the level nearest to 0, so that every yield decodes.

        Args:
            labels: classes ``[B]``.
            generators: one an item.
            num_steps: 1 to num_tokens; each step writes more tokens than the one before (cosine).
            guidance_scale: of the features, not the logits; 1 runs no unconditional half.
            guidance_schedule: "linear" (from 1 up to the scale) or "constant".
            tokens, token_mask: ids ``[B, num_tokens * channels]`` kept where the mask is True; tokens
                of which all channels are kept are read from the start on.
            orders: ``[B, num_tokens]``, the last places first, in place of random ones.

        Raises:
            InputError: a label, token or setting that means nothing.
        """
        config = self.config
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        schedule = config.guidance_schedule if guidance_schedule is None else guidance_schedule
        temperature = config.temperature if temperature is None else temperature
        batch, length, device = len(labels), config.num_tokens, labels.device
        check_sampling(temperature)
        check_guidance(scale, schedule)
        check_labels(labels, config.num_classes)
        check_generators(generators, batch)
        check_given(tokens, token_mask, batch, length * config.channels, config.levels)
        steps = config.num_steps if num_steps is None else num_steps
        check_steps(steps, length)

        guided = scale != 1
        if guided:
            labels = torch.cat([labels, null_labels(labels, config.num_classes)])
        classes = self.classes(labels)
        if orders is None:
            orders = random_order(length, generators, device)
        shape = (length, config.channels)
        ids = self.quantizer(torch.zeros(batch, *shape, device=device))[1]
        if tokens is not None:
            missing = (0, length * config.channels - tokens.shape[1])
            given = F.pad(tokens, missing).unflatten(1, shape)
            keep = F.pad(token_mask, missing).unflatten(1, shape)
            ids = torch.where(keep, given, ids)
            # The places of tokens that are known go to the end: they come first.
            known = keep.all(-1).gather(1, orders)
            orders = orders.gather(1, known.long().argsort(dim=1, stable=True))
        masked = length
        for step, left in enumerate(masked_counts("cosine", length, steps)):
            visible = orders[:, masked:]
            new = orders[:, (left if step + 1 < steps else 0) : masked]
            values = self.quantizer.ids_to_codes(ids)
            if guided:
                features = self.features(
                    values.repeat(2, 1, 1), visible.repeat(2, 1), new.repeat(2, 1), classes
                )
                weight = guidance_weight(schedule, scale, (length - left) / length)
                features = guide(*features.chunk(2), weight)
            else:
                features = self.features(values, visible, new, classes)
            draws = (new.shape[1], config.channels, config.levels)
            noise = draw("exponential", draws, generators, device).flatten(0, 1)
            written = self.head.sample(features.flatten(0, 1), temperature, noise)
            written = written.view(batch, -1, config.channels)
            channels = torch.empty_like(written)
            channels[:, :, list(config.channel_order)] = written
            ids = ids.scatter(1, new[..., None].expand_as(channels), channels)
            if tokens is not None:
                ids = torch.where(keep, given, ids)
            yield ids.flatten(1)
            masked = left

    @torch.no_grad()
    def generate(self, labels: Tensor, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """All of `stream`: ids int64 ``[B, num_tokens * channels]``."""
        for ids in self.stream(labels, generators, **settings):
            written = ids
        return written


def _pick(x: Tensor, places: Tensor) -> Tensor:
    """``[B, T, C]`` at int64 ``[B, n]`` -> ``[B, n, C]``."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
