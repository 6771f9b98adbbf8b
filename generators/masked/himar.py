"""Hi-MAR: Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots (Zheng et al., ICML 2025).

Paper: arXiv 2505.20288. Code (HiDream-ai/himar) and weights: no licence given. Published checkpoints
(HiDream-ai/Hi-MAR): Hi-MAR-B, Hi-MAR-L, Hi-MAR-H, over the latents of KL-16.

Masked generation of continuous tokens in two phases by one transformer. The first writes the few tokens of
a picture of half the size, the pivots, each drawn by MAR's diffusion head. The second writes the tokens
of the picture and looks at the features of the pivots; there a small diffusion transformer draws all
tokens together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...tokenizers.base import Tokenizer
from ..base import ImageGenerator
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..flow.diffusion import GaussianDiffusion, spaced_timesteps
from ..flow.diffusion_head import TIME_FEATURES, DiffusionHead
from ..layers.adaln import layer_norm, modulate
from ..layers.attention import SelfAttention
from ..layers.mlp import MLP
from ..orders import random_order
from ..sampling import check_generators, check_given_latents, check_sampling, draw, guide
from ..schedules import check_guidance, check_steps, guidance_weight, masked_counts
from .masking import normal_mask_ratio

PIVOTS, PICTURE = 0, 1  # The two phases, as the tables of the transformer are indexed.


class PhaseBlock(nn.Module):
    """Pre-norm block whose scales and gates depend on the phase alone."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_hidden)
        self.adaln_scale = nn.Parameter(torch.zeros(2, 4 * dim))
        self.adaln_shift = nn.Parameter(torch.zeros(2, 4 * dim))

    def modulation(self, condition: Tensor, phase: int) -> Tensor:
        """``[4 D]`` of all blocks -> scale, gate of the attention and of the MLP ``[4 D]``."""
        return condition * self.adaln_scale[phase] + self.adaln_shift[phase]

    def forward(self, x: Tensor, modulation: Tensor, rows: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` -> the same shape, or of the places ``rows`` ``[B, n]`` alone: ``[B, n, D]``."""
        scale1, gate1, scale2, gate2 = modulation.chunk(4)
        x = torch.addcmul(x, gate1, self.attn(self.norm1(x) * (1 + scale1)))
        if rows is not None:
            x = _pick(x, rows)
        return torch.addcmul(x, gate2, self.mlp(self.norm2(x) * (1 + scale2)))


class PhaseTransformer(nn.Module):
    """Blocks with the vector that tells them the phase."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.phase_embedding = nn.Parameter(torch.zeros(2, dim))
        self.phase_proj = Linear(dim, 4 * dim)
        self.blocks = nn.ModuleList(PhaseBlock(dim, heads, mlp_hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def modulations(self, phase: int) -> list[Tensor]:
        """Of each block ``[4 D]``: no input changes them."""
        condition = self.phase_proj(F.silu(self.phase_embedding[phase]))
        return [block.modulation(condition, phase) for block in self.blocks]

    def forward(self, x: Tensor, modulations: list[Tensor], rows: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` -> the same shape, or of the places ``rows`` ``[B, n]`` alone: ``[B, n, D]``."""
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation, rows if block is self.blocks[-1] else None)
        return self.norm(x)


class DiTBlock(nn.Module):
    """Transformer block whose every token is modulated by a vector of its own (arXiv 2212.09748)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.adaln = Linear(dim, 6 * dim)
        self.attn = SelfAttention(dim, heads)
        self.mlp = MLP(dim, 4 * dim, approximate="tanh")

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens and SiLU of their conditions, both ``[B, N, D]`` -> ``[B, N, D]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(layer_norm(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(layer_norm(x), shift2, scale2)))


class DiTHead(nn.Module):
    """All tokens of a picture as they are at a timestep, and a feature of each -> their noise.

    Args:
        latent_dim: width of a token.
        condition_dim: width of a feature.
        side: tokens along the picture's side.
        dim, depth, heads: of the transformer.
    """

    def __init__(
        self, latent_dim: int, condition_dim: int, side: int, dim: int, depth: int, heads: int
    ):
        super().__init__()
        self.input_proj = Linear(latent_dim, dim)
        self.condition_proj = Linear(condition_dim, dim)
        self.time_fc1 = Linear(TIME_FEATURES, dim)
        self.time_fc2 = Linear(dim, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(depth))
        self.final_adaln = Linear(dim, 2 * dim)
        self.output = Linear(dim, latent_dim)
        self.register_buffer("positions", sincos_positions(side, dim), persistent=False)

    def init_weights(self) -> None:
        """Xavier uniform, time normal 0.02, biases zero; modulations and output zero."""
        for name, parameter in self.named_parameters():
            if "adaln" in name or name.startswith("output") or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("time"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Timesteps ``[T]`` of 0 to 999 -> ``[T, dim]``."""
        features = get_timestep_embedding(
            timesteps, TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.time_fc2(F.silu(self.time_fc1(features.to(self.time_fc1.weight.dtype))))

    def run(self, x: Tensor, condition: Tensor) -> Tensor:
        """Noisy tokens ``[B, N, C]``, time and feature of each ``[B, N, dim]`` -> noise, float32."""
        condition = F.silu(condition)
        x = self.input_proj(x.to(condition.dtype)) + self.positions.to(condition.dtype)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_adaln(condition).chunk(2, dim=-1)
        return self.output(modulate(layer_norm(x), shift, scale)).float()

    def forward(self, x: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """Noisy tokens ``[B, N, C]``, timesteps ``[B]``, features ``[B, N, D]`` -> noise ``[B, N, C]``."""
        return self.run(x, self.embed_time(timesteps)[:, None] + self.condition_proj(features))

    @torch.no_grad()
    def sample(
        self,
        features: Tensor,
        process: GaussianDiffusion,
        noise: Tensor,
        tokens: Tensor,
        known: Tensor,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw tokens by ancestral sampling, those that are there held as in in-painting.

        Args:
            features: ``[B, N, D]``, or ``[2 B, N, D]`` for guidance, the unconditional ones second.
            noise: normal ``[T + 1, B, N, C]``: the start, then of each of the T steps (the last of them
                is not read).
            tokens, known: ``[B, N, C]`` and bool ``[B, N]``: before every step the known ones stand as
                they are at that step under the noise of the start.
            guidance_scale: of the predicted noise.
            temperature: of the noise of the steps.

        Returns:
            ``[B, N, C]``, float32; the known ones are not put back.
        """
        guided = len(features) == 2 * len(tokens)
        condition = self.condition_proj(features)
        times = self.embed_time(process.timesteps.to(features.device))
        # The variance of a step is its beta: 1 in the terms of a learned range.
        largest = torch.ones_like(tokens)
        known = known[..., None]
        x, noise = noise[0], [noise[0], *(temperature * noise[1:])]
        for i, step in enumerate(reversed(range(len(times))), start=1):
            c = process.at(step, x.device)
            x = torch.where(known, c["signal"] * tokens + c["noise"] * noise[0], x)
            output = self.run(x.repeat(2, 1, 1) if guided else x, times[step] + condition)
            if guided:
                output = guide(*output.chunk(2), guidance_scale)
            x = process.step(torch.cat([output, largest], dim=-1), x, step, noise[i])
        return x


class HiMAR(ImageGenerator, ModelMixin, ConfigMixin):
    """Class label -> pivots, then continuous tokens, in random order. The defaults are Hi-MAR-B.

    A sequence has a slot for each pivot, then one for each token.

    Args:
        latent_dim: width of a token.
        num_pivots, num_tokens: of the half-sized picture and of the picture, both square.
        scale_factor: tokens are multiplied by it, so that their variance is about 1.
        encoder_dim, encoder_depth, encoder_heads: of the transformer over the tokens that are there.
        decoder_dim, decoder_depth, decoder_heads: of the transformer over all slots.
        buffer_size: copies of the class in front of the tokens.
        head_dim, head_depth: of the head that draws the pivots.
        dit_dim, dit_depth, dit_heads: of the head that draws the tokens.
        label_dropout: how often training replaces the class by the null class.
        pivot_steps, num_steps, pivot_guidance_scale, guidance_scale, pivot_diffusion_steps,
            diffusion_steps: of sampling, unless `stream` is told others.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 16,
        num_pivots: int = 64,
        num_tokens: int = 256,
        num_classes: int = 1000,
        scale_factor: float = 0.2325,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        buffer_size: int = 64,
        head_dim: int = 1024,
        head_depth: int = 6,
        dit_dim: int = 512,
        dit_depth: int = 6,
        dit_heads: int = 8,
        label_dropout: float = 0.1,
        pivot_steps: int = 32,
        num_steps: int = 4,
        pivot_guidance_scale: float = 2.7,
        guidance_scale: float = 2.5,
        pivot_diffusion_steps: int = 100,
        diffusion_steps: int = 250,
    ):
        super().__init__()
        slots = num_pivots + num_tokens
        self.class_embedding = nn.Embedding(num_classes, encoder_dim)
        self.null_class = nn.Parameter(torch.zeros(1, encoder_dim))
        self.pivot_proj = Linear(latent_dim, encoder_dim)
        self.pivot_feature_proj = Linear(decoder_dim, encoder_dim)
        self.pivot_placeholder = nn.Parameter(torch.zeros(num_pivots, latent_dim))
        self.token_proj = Linear(latent_dim, encoder_dim)
        self.encoder_positions = nn.Parameter(torch.zeros(2, buffer_size + slots, encoder_dim))
        self.input_norm = nn.LayerNorm(encoder_dim, eps=1e-6)
        self.encoder = PhaseTransformer(
            encoder_dim, encoder_depth, encoder_heads, round(encoder_dim * mlp_ratio)
        )
        self.decoder_embed = Linear(encoder_dim, decoder_dim)
        self.mask_tokens = nn.Parameter(torch.zeros(2, slots, decoder_dim))
        self.decoder_positions = nn.Parameter(torch.zeros(2, buffer_size + slots, decoder_dim))
        self.decoder = PhaseTransformer(
            decoder_dim, decoder_depth, decoder_heads, round(decoder_dim * mlp_ratio)
        )
        self.output_positions = nn.Parameter(torch.zeros(slots, decoder_dim))
        self.head = DiffusionHead(latent_dim, decoder_dim, head_dim, head_depth)
        side = math.isqrt(num_tokens)
        self.dit_head = DiTHead(latent_dim, decoder_dim, side, dit_dim, dit_depth, dit_heads)

    def init_weights(self) -> None:
        """Xavier uniform, tables normal 0.02, biases zero; gates one, scales zero; see the heads."""
        tables = ("positions", "tokens", "placeholder", "class", "embedding", "embedding.weight")
        for name, parameter in self.named_parameters():
            if name.endswith("adaln_scale"):
                nn.init.zeros_(parameter)
            elif name.endswith("adaln_shift"):
                ones = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(parameter.shape[1] // 4)
                parameter.data.copy_(ones.expand_as(parameter))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(tables):
                nn.init.normal_(parameter, std=0.02)
            elif "norm" not in name:
                nn.init.xavier_uniform_(parameter)
        self.head.init_weights()
        self.dit_head.init_weights()

    def num_yields(self, num_tokens: int | None = None, num_steps: int | None = None) -> int:
        return self.config.pivot_steps + super().num_yields(num_tokens, num_steps)

    def edit_arguments(
        self, tokenizer: Tokenizer, picture: Tensor, kept: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """The pivots of the known pixels; a pivot is kept where all tokens under it are."""
        side = math.isqrt(self.config.num_pivots)
        size = [length * side // mask.shape[-1] for length in picture.shape[-2:]]
        half = F.interpolate(picture.masked_fill(~kept, 0.0), size=size, mode="area")
        pivots = tokenizer.encode_latents(half).flatten(2).transpose(1, 2)
        lost = F.adaptive_max_pool2d((~mask)[:, None].float(), side) > 0
        return {"pivots": pivots, "pivot_mask": ~lost.flatten(1)}

    @cached_property
    def process(self) -> GaussianDiffusion:
        """All 1000 steps, for training."""
        return GaussianDiffusion()

    def classes(self, labels: Tensor) -> Tensor:
        """Labels ``[B]`` (``num_classes`` = null) -> embeddings ``[B, D]``."""
        return embed_labels(torch.cat([self.class_embedding.weight, self.null_class]), labels)

    def modulations(self, phase: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of encoder and decoder; the same for every pass of a phase."""
        return self.encoder.modulations(phase), self.decoder.modulations(phase)

    def features(
        self,
        phase: int,
        x: Tensor,
        places: Tensor,
        wanted: Tensor,
        classes: Tensor,
        modulations: tuple[list[Tensor], list[Tensor]],
    ) -> Tensor:
        """The masked transformer.

        Args:
            phase: `PIVOTS` or `PICTURE`.
            x: projected tokens that are there, ``[B, n, D]``.
            places: their slots, int64 ``[B, n]``.
            wanted: slots asked for, int64 ``[B, m]``.
            classes: ``[B, D]``.

        Returns:
            ``[B, m, D']``.
        """
        buffer = self.config.buffer_size
        x = torch.cat([classes[:, None].expand(-1, buffer, -1), x], dim=1)
        start = torch.arange(buffer, device=places.device).expand(len(places), -1)
        places = torch.cat([start, places + buffer], dim=1)
        x = self.input_norm(x + self.encoder_positions[phase][places])
        x = self.decoder_embed(self.encoder(x, modulations[0]))

        masked = F.pad(self.mask_tokens[phase], (0, 0, buffer, 0)).expand(len(x), -1, -1)
        x = masked.scatter(1, places[..., None].expand_as(x), x) + self.decoder_positions[phase]
        return self.decoder(x, modulations[1], wanted + buffer) + self.output_positions[wanted]

    def pivot_features(
        self, pivots: Tensor, visible: Tensor, wanted: Tensor, classes: Tensor, modulations: tuple
    ) -> Tensor:
        """First phase.

        Args:
            pivots: scaled tokens of the half-sized picture ``[B, num_pivots, latent_dim]``.
            visible, wanted: pivots that are there, and those asked for, int64 ``[B, n]``, ``[B, m]``.

        Returns:
            ``[B, m, D']``.
        """
        x = self.pivot_proj(_pick(pivots, visible).to(self.dtype))
        return self.features(PIVOTS, x, visible, wanted, classes, modulations)

    def token_features(
        self, pivots: Tensor, tokens: Tensor, visible: Tensor, classes: Tensor, modulations: tuple
    ) -> Tensor:
        """Second phase.

        Args:
            pivots: their projected features or placeholders ``[B, num_pivots, D]``.
            tokens: scaled ``[B, num_tokens, latent_dim]``.
            visible: tokens that are there, int64 ``[B, n]``.

        Returns:
            of every token ``[B, num_tokens, D']``.
        """
        count, total = self.config.num_pivots, len(self.output_positions)
        x = torch.cat([pivots, self.token_proj(_pick(tokens, visible).to(self.dtype))], dim=1)
        slots = torch.arange(total, device=visible.device).expand(len(visible), -1)
        places = torch.cat([slots[:, :count], visible + count], dim=1)
        return self.features(PICTURE, x, places, slots[:, count:], classes, modulations)

    def forward(
        self,
        tokens: Tensor,
        pivots: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        pivot_rate: float = 0.25,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Diffusion losses of both phases.

        Args:
            tokens, pivots: of the tokenizer, of a picture ``[B, num_tokens, latent_dim]`` and of the
                same at half the size ``[B, num_pivots, latent_dim]``.
            labels: classes ``[B]``; in training some are dropped.
            generator: of masks, dropped labels, timesteps and noise, on the model's device.
            pivot_rate: how often the second phase sees pivots; it rises from 0 to 0.25 over the first
                100 epochs of the published recipe.
        """
        config, device = self.config, tokens.device
        random = {"generator": generator, "device": device}
        batch, count, length = len(tokens), config.num_pivots, config.num_tokens
        labels = self.drop_labels(labels, generator)
        classes = self.classes(labels)
        tokens, pivots = tokens * config.scale_factor, pivots * config.scale_factor

        hide = math.ceil(count * normal_mask_ratio(generator, device))
        order = torch.rand(batch, count, **random).argsort(dim=1)
        hidden, visible = order[:, :hide], order[:, hide:]
        features = self.pivot_features(pivots, visible, hidden, classes, self.modulations(PIVOTS))
        mse, bound = self.head.loss(
            _pick(pivots, hidden).flatten(0, 1), features.flatten(0, 1), self.process, generator
        )
        pivot_loss = 2 * (mse + bound).mean()

        # What the second phase sees of the pivots: the features of those that were hidden, or nothing.
        context = self.pivot_proj(self.pivot_placeholder).expand(batch, -1, -1)
        found = self.pivot_feature_proj(features.detach())
        found = context.scatter(1, hidden[..., None].expand_as(found), found)
        seen = torch.rand(batch, 1, 1, **random) < pivot_rate
        context = torch.where(seen, found, context)
        ratio = math.cos(math.pi / 2 * float(torch.rand(1, **random)))
        order = torch.rand(batch, length, **random).argsort(dim=1)
        visible = order[:, math.ceil(length * ratio) :]
        features = self.token_features(context, tokens, visible, classes, self.modulations(PICTURE))
        step = torch.randint(len(self.process.timesteps), (batch,), **random)
        noise = torch.randn(tokens.shape, **random)
        x = self.process.add_noise(tokens.flatten(1), step, noise.flatten(1)).view_as(tokens)
        predicted = self.dit_head(x, self.process.timesteps.to(device)[step], features)
        token_loss = 0.75 * F.mse_loss(predicted, noise)

        loss = (count * pivot_loss + length * token_loss) / (count + length)
        return loss, {"pivot_loss": pivot_loss.detach(), "token_loss": token_loss.detach()}

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        pivot_steps: int | None = None,
        num_steps: int | None = None,
        pivot_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
        pivot_diffusion_steps: int | Sequence[int] | None = None,
        diffusion_steps: int | Sequence[int] | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        pivots: Tensor | None = None,
        pivot_mask: Tensor | None = None,
        orders: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield pivots ``[B, num_pivots, latent_dim]``, then tokens ``[B, num_tokens, latent_dim]``.

        One yield a step. The pivots decode to a picture of half the size; those still hidden are 0. The
        tokens are all there from their first step on.

        Args:
            labels: classes ``[B]``.
            generators: one an item.
            pivot_steps, num_steps: of the phases, 1 to num_pivots and 1 to num_tokens; each step writes
                more tokens than the one before (cosine).
            pivot_guidance_scale, guidance_scale: of the noise that the heads predict; 1 runs no
                unconditional half.
            guidance_schedule: over the share of tokens that are there; see `guidance_weight`.
            temperature: of the noise of the heads' steps.
            pivot_diffusion_steps, diffusion_steps: of the heads, 2 to 1000, or the kept timesteps
                themselves, ascending.
            tokens, token_mask: ``[B, num_tokens, latent_dim]`` kept where ``[B, num_tokens]`` is True.
            pivots, pivot_mask: likewise of the half-sized picture; without them the pivots know nothing
                of the tokens that are kept.
            orders: ``[B, num_pivots + num_tokens]``, the slots of the pivots, then those of the tokens,
                the last ones first, in place of random ones.
            noise: of each step of both phases the draws of the head, ``[T + 1, B n, latent_dim]`` of n
                pivots (rows by item, then place), ``[T + 1, B, num_tokens, latent_dim]`` of the tokens;
                in place of the generators'.

        Raises:
            InputError: a label, token or setting that means nothing.
        """
        config = self.config

        def given(value, default):
            return getattr(config, default) if value is None else value

        steps = (given(pivot_steps, "pivot_steps"), given(num_steps, "num_steps"))
        scales = (
            given(pivot_guidance_scale, "pivot_guidance_scale"),
            given(guidance_scale, "guidance_scale"),
        )
        kept = (
            given(pivot_diffusion_steps, "pivot_diffusion_steps"),
            given(diffusion_steps, "diffusion_steps"),
        )
        processes = [
            GaussianDiffusion(spaced_timesteps(k) if isinstance(k, int) else k) for k in kept
        ]
        batch, device = len(labels), labels.device
        count, length, width = config.num_pivots, config.num_tokens, config.latent_dim
        check_steps(steps[0], count)
        check_steps(steps[1], length)
        check_sampling(temperature)
        for scale in scales:
            check_guidance(scale, guidance_schedule)
        check_labels(labels, config.num_classes)
        check_generators(generators, batch)
        check_given_latents(pivots, pivot_mask, (batch, count, width))
        check_given_latents(tokens, token_mask, (batch, length, width))

        null = null_labels(labels, config.num_classes)
        classes = self.classes(torch.cat([labels, null]))
        if orders is None:
            pivot_order = random_order(count, generators, device)
            token_order = random_order(length, generators, device)
        else:
            pivot_order, token_order = orders[:, :count], orders[:, count:] - count

        # First phase: the pivots, and the features from which each was drawn.
        state, known, order = self._start(pivots, pivot_mask, count, pivot_order)
        found = torch.zeros(batch, count, config.decoder_dim, dtype=classes.dtype, device=device)
        modulations = self.modulations(PIVOTS)
        rows = 1 if scales[0] == 1 else 2
        left = count
        for step, next_left in enumerate(masked_counts("cosine", count, steps[0])):
            last = step + 1 == steps[0]
            new = order[:, (0 if last else next_left) : left].sort(dim=1).values
            visible = order[:, left:]
            left = next_left
            if noise is None:
                shape = (len(processes[0].timesteps) + 1, new.shape[1], width)
                draws = draw("normal", shape, generators, device).transpose(0, 1).flatten(1, 2)
            else:
                draws = noise[step]
            features = self.pivot_features(
                state.repeat(rows, 1, 1),
                visible.repeat(rows, 1),
                new.repeat(rows, 1),
                classes[: rows * batch],
                modulations,
            )
            weight = guidance_weight(guidance_schedule, scales[0], (count - left) / count)
            drawn = self.head.sample(
                features.flatten(0, 1), processes[0], draws, weight, temperature
            )
            places = new[..., None]
            found = found.scatter(1, places.expand(-1, -1, found.shape[2]), features[:batch])
            drawn = state.scatter(1, places.expand(-1, -1, width), drawn.view(batch, -1, width))
            state = torch.where(known, state, drawn)
            yield _unscale(state, config.scale_factor, known, pivots)

        # Second phase: every step draws all tokens and keeps more of them.
        context = self.pivot_feature_proj(found)
        state, known, order = self._start(tokens, token_mask, length, token_order)
        modulations = self.modulations(PICTURE)
        rows = 1 if scales[1] == 1 else 2
        left = length
        written = known[..., 0]
        for step, next_left in enumerate(masked_counts("cosine", length, steps[1])):
            if noise is None:
                shape = (len(processes[1].timesteps) + 1, length, width)
                draws = draw("normal", shape, generators, device).transpose(0, 1)
            else:
                draws = noise[steps[0] + step]
            features = self.token_features(
                context.repeat(rows, 1, 1),
                state.repeat(rows, 1, 1),
                order[:, left:].repeat(rows, 1),
                classes[: rows * batch],
                modulations,
            )
            left = next_left
            weight = guidance_weight(guidance_schedule, scales[1], (length - left) / length)
            drawn = self.dit_head.sample(
                features, processes[1], draws, state, written, weight, temperature
            )
            state = torch.where(written[..., None], state, drawn)
            written = written.scatter(1, order[:, left:], True)
            yield _unscale(state, config.scale_factor, known, tokens)

    def _start(
        self, given: Tensor | None, mask: Tensor | None, length: int, order: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled tokens ``[B, N, C]``, which are known ``[B, N, 1]``, and the order with those last.

        The last places of an order come first.
        """
        shape = (len(order), length, self.config.latent_dim)
        if given is None:
            known = torch.zeros(*shape[:2], 1, dtype=torch.bool, device=order.device)
            return torch.zeros(shape, device=order.device), known, order
        order = order.gather(1, mask.gather(1, order).long().argsort(dim=1, stable=True))
        known = mask[..., None]
        return torch.where(known, given.float() * self.config.scale_factor, 0.0), known, order

    @torch.no_grad()
    def generate(self, labels: Tensor, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """The last of `stream`: tokens float32 ``[B, num_tokens, latent_dim]``."""
        for latents in self.stream(labels, generators, **settings):
            last = latents
        return last


def sincos_positions(side: int, dim: int) -> Tensor:
    """Sines and cosines of column and row, float32 ``[side * side, dim]`` (as MAE's tables)."""
    steps = torch.arange(dim // 4, dtype=torch.float64)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * 10000 ** (-steps / (dim // 4))
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = table.expand(side, -1, -1), table[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def _pick(x: Tensor, places: Tensor) -> Tensor:
    """``[B, N, D]`` at int64 ``[B, n]`` -> ``[B, n, D]``."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _unscale(state: Tensor, factor: float, known: Tensor, given: Tensor | None) -> Tensor:
    """Tokens as the tokenizer has them; the given ones exactly."""
    result = state / factor
    return result if given is None else torch.where(known, given.to(result.dtype), result)
