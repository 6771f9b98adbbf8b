"""ENAT: Rethinking Spatial-temporal Interactions in Token-based Image Synthesis (Ni et al., NeurIPS 2024).

Paper: arXiv 2411.06959. Code (LeapLabTHU/ENAT) and weights: no licence given. Published checkpoints:
nnet_ema.pth (ENAT-L, 256 px), nnet_ema_512.pth (ENAT-L, 512 px), over MaskGIT's VQGAN.

Masked generation in which visible and hidden tokens take different ways: a deep encoder reads the visible
ones, a shallow decoder the hidden ones, which look at the encoder's result. A step encodes the newly
revealed tokens alone and reuses the features of the older ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ..base import ImageGenerator
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..layers.adaln import layer_norm, modulate
from ..layers.mlp import MLP
from ..sampling import check_generators, check_given, check_sampling, draw, guide, gumbel
from ..schedules import check_guidance, check_steps, guidance_weight

# The temperature never falls below this, except to 0 for greedy sampling.
MIN_TEMPERATURE = 1e-3


class ENATBlock(nn.Module):
    """adaLN block whose tokens attend to each other and to a context with a projection of its own."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.heads = heads
        self.adaln = Linear(dim, 8 * dim)
        self.qkv = Linear(dim, 3 * dim)
        self.context_kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.mlp = MLP(dim, mlp_hidden, approximate="tanh")

    def split_heads(self, x: Tensor) -> Tensor:
        """``[B, T, k D]`` -> ``[k, B, heads, T, head_dim]``."""
        parts = x.shape[-1] // self.proj.out_features
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, context: Tensor | None, modulation: Tensor) -> Tensor:
        """Tokens ``[B, T, D]``, normalised context ``[B, C, D]``, ``[B, 1, 8 D]`` -> ``[B, T, D]``."""
        shift1, scale1, shift_c, scale_c, gate1, shift2, scale2, gate2 = modulation.chunk(8, dim=-1)
        q, k, v = self.split_heads(self.qkv(modulate(layer_norm(x), shift1, scale1)))
        if context is not None:
            kv = self.split_heads(self.context_kv(modulate(context, shift_c, scale_c)))
            k, v = torch.cat([kv[0], k], dim=2), torch.cat([kv[1], v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.proj(attended))
        return torch.addcmul(x, gate2, self.mlp(modulate(layer_norm(x), shift2, scale2)))


class ENAT(ImageGenerator, ModelMixin, ConfigMixin):
    """Class label -> token ids in any order. The defaults are the published ENAT-L at 256 px.

    Ids 0 to ``vocab_size - 1`` are tokens, the next hides one.

    Args:
        encoder_depth, decoder_depth: blocks over the visible and over the hidden tokens.
        dropout: on the embedded tokens, in training.
        label_dropout: how often training replaces the class by the null class.
        num_steps, guidance_scale, temperature, mask_temperature: of sampling, unless `stream` is told
            others.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 1024,
        num_tokens: int = 256,
        num_classes: int = 1000,
        dim: int = 1024,
        encoder_depth: int = 22,
        decoder_depth: int = 2,
        heads: int = 16,
        mlp_hidden: int = 4096,
        dropout: float = 0.1,
        label_dropout: float = 0.15,
        num_steps: int = 8,
        guidance_scale: float = 3.5,
        temperature: float = 6.0,
        mask_temperature: float = 1.5,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + 1, dim)
        self.positions = nn.Parameter(torch.zeros(num_tokens, dim))
        self.input_norm = nn.LayerNorm(dim, eps=1e-6)
        self.input_dropout = nn.Dropout(dropout)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.reuse_norm = nn.LayerNorm(dim, eps=1e-6)
        self.reuse_mlp = MLP(dim, mlp_hidden, approximate="tanh")
        self.encoder = nn.ModuleList(
            ENATBlock(dim, heads, mlp_hidden) for _ in range(encoder_depth)
        )
        self.decoder = nn.ModuleList(
            ENATBlock(dim, heads, mlp_hidden) for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = Linear(dim, dim)
        self.head_norm = nn.LayerNorm(dim)
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))

    def init_weights(self) -> None:
        """Xavier uniform, tables normal 0.02, biases zero; modulations zero."""
        for name, parameter in self.named_parameters():
            if "adaln" in name or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "embedding" in name or name == "positions":
                nn.init.normal_(parameter, std=0.02)
            elif "norm" not in name:
                nn.init.xavier_uniform_(parameter)

    def modulations(self, labels: Tensor) -> list[Tensor]:
        """Labels ``[B]`` (``num_classes`` = null) -> of every block ``[B, 1, 8 D]``: one set a picture."""
        condition = F.silu(embed_labels(self.class_embedding.weight, labels))[:, None]
        return [block.adaln(condition) for block in (*self.encoder, *self.decoder)]

    def features(
        self,
        tokens: Tensor,
        new: Tensor,
        masked: Tensor,
        modulations: list[Tensor],
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            tokens: ids ``[B, num_tokens]``; masked ones are not read.
            new: places that became visible since the pass that made ``before``, int64 ``[B, n]``.
            masked: hidden places, int64 ``[B, m]``.
            modulations: of `modulations`.
            before: features of the tokens that were visible then, ``[B, k, D]``.

        Returns:
            features of the visible tokens ``[B, k + n, D]``, the older ones first (the next pass's
            ``before``), and of the masked ones ``[B, m, D]``.
        """
        depth = len(self.encoder)
        tokens = tokens.scatter(1, masked, self.config.vocab_size)
        x = self.input_dropout(self.input_norm(self.embedding(tokens) + self.positions))
        if before is not None:
            before = before + self.reuse_mlp(self.reuse_norm(before))
        visible = _run(self.encoder, _pick(x, new), before, modulations[:depth])
        if before is not None:
            visible = torch.cat([before, visible], dim=1)
        return visible, _run(self.decoder, _pick(x, masked), visible, modulations[depth:])

    def to_logits(self, features: Tensor) -> Tensor:
        """``[B, n, D]`` -> ``[B, n, V]``, by the detached rows of the embedding table."""
        x = self.head_norm(F.gelu(self.head(self.norm(features))))
        return linear(x, self.embedding.weight[: self.config.vocab_size].detach(), self.head_bias)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        teacher: ENAT | None = None,
        reuse: float = 0.5,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of hidden tokens, half of the time with features of an earlier step at hand.

        Args:
            tokens: ids ``[B, num_tokens]``.
            labels: classes ``[B]``; in training some are dropped.
            generator: of masks and dropped labels, on the model's device.
            teacher: makes the earlier features; in the paper the averaged model, by default this one.
            reuse: how often there are earlier features.
        """
        batch, length = tokens.shape
        random = {"generator": generator, "device": tokens.device}
        labels = self.drop_labels(labels, generator)
        # The share of hidden tokens is Beta(12, 3): the 12th smallest of 14 uniform draws. One share
        # for the batch, so that all rows hide the same number.
        share = float(torch.rand(14, **random).sort().values[11])
        count = min(max(round(share * length), 1), length - 1)
        order = torch.rand(batch, length, **random).argsort(dim=1)
        masked, visible = order[:, :count], order[:, count:]
        reused, rest = torch.rand(2, **random).tolist()
        before, new = None, visible
        old = math.floor(rest * visible.shape[1]) if reused < reuse else 0
        if old:
            teacher = self if teacher is None else teacher
            new = visible[:, old:]
            with torch.no_grad():
                before, _ = teacher.features(
                    tokens,
                    visible[:, :old],
                    torch.cat([masked, new], dim=1),
                    teacher.modulations(labels),
                )
        _, hidden = self.features(tokens, new, masked, self.modulations(labels), before)
        logits, targets = self.to_logits(hidden).float(), tokens.gather(1, masked)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
        hit = (logits.argmax(-1) == targets).float().mean()
        return loss, {"loss": loss.detach(), "masked_accuracy": hit}

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        mask_temperature: float | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, num_tokens]`` after each step: all there, the uncertain ones yet to change.

        Args:
            labels: classes ``[B]``.
            generators: one an item.
            guidance_scale: at the end of the linear schedule, which starts at 1; 1 runs no
                unconditional half. (The published code adds one: its 2.5 is 3.5 here.)
            temperature: of the draws, falling to 0 at the last step; 0 takes the likeliest.
            mask_temperature: of the noise on confidences, falling to 0 at the last step.
            tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True.

        Raises:
            InputError: a label, token or setting that means nothing.
        """
        config = self.config
        steps = config.num_steps if num_steps is None else num_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        heat = config.temperature if temperature is None else temperature
        mask_heat = config.mask_temperature if mask_temperature is None else mask_temperature
        batch, length = len(labels), config.num_tokens
        check_sampling(heat)
        check_sampling(mask_heat)
        check_steps(steps)
        check_guidance(scale)
        check_labels(labels, config.num_classes)
        check_generators(generators, batch)
        check_given(tokens, token_mask, batch, length, config.vocab_size)

        ids = torch.zeros(batch, length, dtype=torch.int64, device=labels.device)
        known = torch.zeros_like(ids, dtype=torch.bool)
        if tokens is not None:
            known[:, : tokens.shape[1]] = token_mask
            ids[:, : tokens.shape[1]] = tokens.masked_fill(~token_mask, 0)
        # Items that keep equally many tokens run together, since all of a batch hide the same number.
        counts = known.sum(1).tolist()
        groups = [[i for i in range(batch) if counts[i] == n] for n in sorted(set(counts))]
        parts = [
            self._steps(
                ids[rows],
                known[rows],
                labels[rows],
                [generators[i] for i in rows],
                (steps, scale, heat, mask_heat),
            )
            for rows in groups
        ]
        for results in zip(*parts, strict=True):
            for rows, result in zip(groups, results, strict=True):
                ids[rows] = result
            yield ids.clone()

    def _steps(
        self,
        ids: Tensor,
        known: Tensor,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        settings: tuple[int, float, float, float],
    ) -> Iterator[Tensor]:
        """`stream` of items of which equally many tokens are known, bool ``[B, num_tokens]``."""
        steps, scale, heat, mask_heat = settings
        vocab = self.config.vocab_size
        given = int(known[0].sum())
        hidden = ids.shape[1] - given
        # Places in raster order, the masked ones first.
        places = known.long().argsort(dim=1, stable=True)
        masked, new = places[:, :hidden], places[:, hidden:]
        modulations = self.modulations(labels)
        if scale != 1:
            null = self.modulations(null_labels(labels, self.config.num_classes, count=1))
            pairs = zip(modulations, null, strict=True)
            both = [torch.cat([m, n.expand_as(m)]) for m, n in pairs]
        before = None
        for step in range(1, steps + 1):
            if not masked.shape[1]:
                yield ids
                continue
            left = 1 - step / steps
            weight = guidance_weight("linear", scale, (step - 1) / steps)
            # The null half of the first step makes no logits, and features only of given tokens.
            if scale != 1 and (step > 1 or given):
                visible, features = self.features(
                    ids.repeat(2, 1), new.repeat(2, 1), masked.repeat(2, 1), both, before
                )
                logits = guide(*self.to_logits(features).float().chunk(2), weight)
            else:
                visible, features = self.features(ids, new, masked, modulations, before)
                logits = self.to_logits(features).float()
            before = visible if visible.shape[1] else None
            log_p = logits.log_softmax(-1)

            # Of every hidden token: for each id, and in the last column for its confidence.
            uniform = draw("uniform", (masked.shape[1], vocab + 1), generators, ids.device)
            noise = gumbel(uniform)
            now = max(heat * left, MIN_TEMPERATURE) if heat else 0.0
            drawn = (log_p + now * noise[..., :vocab]).argmax(-1)
            ids = ids.scatter(1, masked, drawn)
            yield ids
            score = log_p.gather(-1, drawn[..., None])[..., 0] + mask_heat * left * noise[..., -1]
            order = score.argsort(dim=1, stable=True)
            count = math.floor(hidden * math.cos(math.pi / 2 * step / steps))
            keep, revealed = order[:, :count], order[:, count:]
            new = masked.gather(1, revealed)
            masked = masked.gather(1, keep.sort(dim=1).values)

    @torch.no_grad()
    def generate(self, labels: Tensor, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """The last of `stream`: ids int64 ``[B, num_tokens]``."""
        for ids in self.stream(labels, generators, **settings):
            last = ids
        return last


def _run(
    blocks: nn.ModuleList, x: Tensor, context: Tensor | None, modulations: list[Tensor]
) -> Tensor:
    """Blocks over ``x`` and a context that is the same for all of them; either may be empty."""
    if not x.shape[1]:
        return x
    context = layer_norm(context) if context is not None and context.shape[1] else None
    for block, modulation in zip(blocks, modulations, strict=True):
        x = block(x, context, modulation)
    return x


def _pick(x: Tensor, places: Tensor) -> Tensor:
    """``[B, N, D]`` at int64 ``[B, n]`` -> ``[B, n, D]``."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
