"""FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching (Ren et al., ICML 2025).

Paper: arXiv 2412.15205. Code and weights: no licence given. Published checkpoints (OliverRen/FlowAR):
FlowAR-S, FlowAR-L, FlowAR-H, over the latents of `KL16VAE`.

A picture is a plain pyramid of its latents. A causal transformer over scales reads the scale before,
resized, and makes a feature for every token of the next; from these a smaller transformer, the flow
head, draws all tokens of that scale by flow matching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import ImageGenerator
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..flow.samplers import (
    check_sampler,
    evaluation_times,
    hold,
    integrate,
    linspace,
    num_step_draws,
    shift_times,
)
from ..layers.adaln import modulate
from ..layers.mlp import GatedMLP
from ..layers.rope import Rope, RopeAttention, rope_tables, rotate
from ..layers.rope_adaln import RopeAdaLNBlock, RopeAdaLNTransformer, init_weights, rms_norm
from ..layers.time import TimeEmbedding
from ..sampling import check_generators, check_given_latents, draw, guide
from ..schedules import check_guidance, guidance_weight

HEAD_DIM = 64  # of the flow head


def sampling_times(num_steps: int) -> list[float]:
    """The published times: even for 50 steps; else dense between 0.25 and 0, where guidance acts most.

    An odd number loses one step.

    Raises:
        InputError: fewer than 2 steps.
    """
    if num_steps < 2:
        raise InputError(f"FlowAR takes 2 steps or more a scale, got {num_steps}.")
    if num_steps == 50:
        return linspace(1, 0, 51)
    half = num_steps // 2
    return linspace(1, 0.3, half) + linspace(0.25, 0, half + 1)


class CrossBlock(nn.Module):
    """Self-attention modulated by the time, attention to the features, and an MLP modulated by both."""

    def __init__(self, dim: int, condition_dim: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.heads = heads
        self.attn = RopeAttention(dim, heads, qkv_bias=False)
        self.attn_adaln = Linear(dim, 3 * dim)
        self.cross_norm = nn.RMSNorm(dim, eps=1e-6)
        self.condition_norm = nn.RMSNorm(condition_dim, eps=1e-6)
        self.q = Linear(dim, dim, bias=False)
        self.kv = Linear(condition_dim, 2 * dim, bias=False)
        self.proj = Linear(dim, dim)
        self.mlp = GatedMLP(dim, mlp_hidden)
        self.adaln = Linear(dim, 3 * dim)

    def keys_values(self, features: Tensor, rope: Rope) -> Tensor:
        """Features ``[B, n, D]`` -> ``[B, 2, heads, n, head_dim]``; they serve all steps of a scale."""
        k, v = self.kv(self.condition_norm(features)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return torch.stack([rotate(k, rope), v], dim=1).transpose(2, 3)

    def forward(
        self,
        x: Tensor,
        attn_modulation: Tensor,
        modulation: Tensor,
        keys_values: Tensor,
        rope: Rope,
    ) -> Tensor:
        gate, scale, shift = attn_modulation.chunk(3, dim=-1)
        x = torch.addcmul(x, gate, self.attn(modulate(rms_norm(x), shift, scale), rope))
        q = self.q(self.cross_norm(x)).unflatten(-1, (self.heads, -1))
        h = F.scaled_dot_product_attention(
            rotate(q, rope).transpose(1, 2), *keys_values.to(x.dtype).unbind(1)
        )
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        gate, scale, shift = modulation.chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(modulate(rms_norm(x), shift, scale)))


class FlowHead(nn.Module):
    """Noisy tokens of one scale, their time and a feature of each -> velocities.

    Args:
        latent_dim, condition_dim: width of a token and of a feature.
        dim, depth: of the transformer; heads are 64 wide.
        cross_attention: tokens also attend to the features of their scale (FlowAR-L and -H).
    """

    def __init__(
        self,
        latent_dim: int,
        condition_dim: int,
        dim: int,
        depth: int,
        mlp_ratio: float,
        cross_attention: bool,
    ):
        super().__init__()
        self.cross_attention = cross_attention
        heads, hidden = dim // HEAD_DIM, int(dim * mlp_ratio * 2 / 3)
        self.time = TimeEmbedding(dim)
        self.condition_proj = Linear(condition_dim, dim)
        self.input_proj = Linear(latent_dim, dim)
        self.blocks = nn.ModuleList(
            CrossBlock(dim, condition_dim, heads, hidden)
            if cross_attention
            else RopeAdaLNBlock(dim, heads, hidden, qkv_bias=False)
            for _ in range(depth)
        )
        self.final_adaln = Linear(dim, 2 * dim)
        self.output = Linear(dim, latent_dim)

    def embed_times(self, times: Tensor) -> list[Tensor]:
        """Times ``[T]`` -> what depends on them alone, each ``[T, 1, ...]``."""
        time = self.time(times)[:, None]
        if not self.cross_attention:
            return [time]
        active = F.silu(time)
        return [time, *(block.attn_adaln(active) for block in self.blocks)]

    def embed_features(self, features: Tensor, rope: Rope) -> list[Tensor]:
        """Features ``[B, n, D]`` -> what depends on them alone, each ``[B, ...]``."""
        condition = self.condition_proj(features)
        if not self.cross_attention:
            return [condition]
        return [condition, *(block.keys_values(features, rope) for block in self.blocks)]

    def forward(self, x: Tensor, times: list[Tensor], features: list[Tensor], rope: Rope) -> Tensor:
        """Tokens ``[B, n, C]`` -> velocities float32 ``[B, n, C]``.

        Args:
            times: `embed_times` of B times, or of one.
            features: `embed_features`.
            rope: of the scale.
        """
        (time, *attn_modulations), (condition, *keys_values) = times, features
        condition = F.silu(time + condition)
        x = self.input_proj(x.to(condition.dtype))
        for i, block in enumerate(self.blocks):
            modulation = block.adaln(condition)
            if self.cross_attention:
                x = block(x, attn_modulations[i], modulation, keys_values[i], rope)
            else:
                x = block(x, modulation, rope)
        shift, scale = self.final_adaln(condition).chunk(2, dim=-1)
        return self.output(modulate(rms_norm(x), shift, scale)).float()


class FlowAR(ImageGenerator, ModelMixin, ConfigMixin):
    """Class label -> continuous tokens ``[B, num_tokens, latent_dim]``. The defaults are FlowAR-S.

    Args:
        latent_dim: width of a token.
        patch_nums: tokens along the sides of the scales; the last is the picture's.
        flow_dim, flow_depth, cross_attention: of the flow head.
        dropout: in the attention of the transformer, in training.
        label_dropout: in training.
        guidance_scale, guidance_high, num_steps: of sampling, unless `stream` is told others.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 16,
        patch_nums: Sequence[int] = (1, 2, 4, 8, 16),
        num_classes: int = 1000,
        dim: int = 768,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        heads: int = 12,
        flow_dim: int = 1024,
        flow_depth: int = 2,
        cross_attention: bool = False,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        guidance_scale: float = 4.3,
        guidance_high: float = 0.9,
        num_steps: int = 25,
    ):
        super().__init__()
        # Every scale covers the same range of coordinates, that of the last one.
        axes = [torch.arange(p, dtype=torch.float32) / p * patch_nums[-1] for p in patch_nums]
        places = torch.cat([torch.cartesian_prod(axis, axis) for axis in axes])
        scales = [scale for scale, p in enumerate(patch_nums) for _ in range(p * p)]
        self.register_buffer("scales", torch.tensor(scales), persistent=False)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.input_proj = Linear(latent_dim, dim)
        hidden = int(dim * mlp_ratio * 2 / 3)
        self.transformer = RopeAdaLNTransformer(
            dim,
            encoder_depth,
            decoder_depth,
            heads,
            hidden,
            rope_tables(places, dim // heads),
            dropout,
        )
        self.output_positions = nn.Parameter(torch.zeros(len(places), dim))
        self.head = FlowHead(latent_dim, dim, flow_dim, flow_depth, mlp_ratio, cross_attention)
        cos, sin = rope_tables(places, HEAD_DIM)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def num_tokens(self) -> int:
        return self.config.patch_nums[-1] ** 2

    def num_yields(self, num_tokens: int | None = None, num_steps: int | None = None) -> int:
        steps = self.config.num_steps if num_steps is None else num_steps
        return (len(sampling_times(steps)) - 1) * len(self.config.patch_nums)

    @property
    def places(self) -> list[slice]:
        """Where the tokens of each scale stand in the sequence of all."""
        ends = list(accumulate(side * side for side in self.config.patch_nums))
        return [slice(*pair) for pair in zip([0, *ends], ends, strict=False)]

    def init_weights(self) -> None:
        """Xavier for matrices, normal 0.02 for tables and time, zero for biases and the output."""
        init_weights(self)
        nn.init.zeros_(self.head.output.weight)

    def pyramid(self, latents: Tensor) -> list[Tensor]:
        """Tokens ``[B, num_tokens, C]`` -> averages over areas, ``[B, C, p, p]`` of every scale."""
        side = self.config.patch_nums[-1]
        image = latents.transpose(1, 2).unflatten(2, (side, side))
        return [F.interpolate(image, size=(p, p), mode="area") for p in self.config.patch_nums]

    def enlarge(self, image: Tensor) -> Tensor:
        """A scale ``[B, C, p, p]`` -> the size of the last, ``[B, C, P, P]``."""
        size = (self.config.patch_nums[-1],) * 2
        return F.interpolate(image, size=size, mode="bicubic", align_corners=False)

    def next_input(self, image: Tensor, scale: int) -> Tensor:
        """The scale before, `enlarge`d -> what the transformer reads at this one, ``[B, n, C]``."""
        size = (self.config.patch_nums[scale],) * 2
        return F.interpolate(image, size=size, mode="area").flatten(2).transpose(1, 2)

    def next_inputs(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Inputs of all scales from the second on, ``[B, n, C]``."""
        return torch.cat(
            [self.next_input(self.enlarge(p), scale + 1) for scale, p in enumerate(pyramid[:-1])],
            dim=1,
        )

    def features(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced features ``[B, n, D]`` of all scales; each sees itself and the coarser ones.

        Args:
            inputs: `next_inputs`.
            labels: ``[B]``, ``num_classes`` = null.
        """
        classes = embed_labels(self.class_embedding.weight, labels)[:, None]
        x = torch.cat([classes, self.input_proj(inputs.to(classes.dtype))], dim=1)
        mask = self.scales[:, None] >= self.scales
        x = self.transformer(x, self.transformer.modulations(classes), mask=mask)
        return x + self.output_positions

    def rope(self, here: slice) -> Rope:
        return self.cos[here], self.sin[here]

    def velocity(self, x: Tensor, times: Tensor, features: Tensor, scale: int) -> Tensor:
        """Tokens ``[B, n, C]`` of one scale at times ``[B]`` -> velocities float32."""
        rope = self.rope(self.places[scale])
        embedded = self.head.embed_times(times), self.head.embed_features(features, rope)
        return self.head(x, *embedded, rope)

    def forward(
        self, latents: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared errors of the velocities, every scale weighted by its share of the last one's tokens.

        Args:
            latents: tokens ``[B, num_tokens, latent_dim]`` of the tokenizer.
            labels: classes ``[B]``; in training some are dropped.
            generator: of times, noise and dropped labels, on the model's device.
        """
        labels = self.drop_labels(labels, generator)
        random = {"generator": generator, "device": latents.device}
        pyramid = self.pyramid(latents)
        features = self.features(self.next_inputs(pyramid), labels)
        loss = 0.0
        for scale, (image, here) in enumerate(zip(pyramid, self.places, strict=True)):
            x0 = image.flatten(2).transpose(1, 2)
            times = torch.rand(len(x0), **random)
            noise = torch.randn(x0.shape, **random)
            x = torch.lerp(x0, noise, times[:, None, None])
            mse = F.mse_loss(self.velocity(x, times, features[:, here], scale), noise - x0)
            loss = loss + mse * x0.shape[1] / self.num_tokens
        return loss, {"loss": loss.detach(), "mse_last_scale": mse.detach()}

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "linear",
        guidance_high: float | None = None,
        sampler: str = "euler",
        time_shift: float = 1.0,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield tokens float32 ``[B, num_tokens, latent_dim]`` after every step of every scale.

        The present scale is enlarged, and noisy until its last step.

        Args:
            labels: classes ``[B]``.
            generators: one an item.
            num_steps: for each scale; see `sampling_times`.
            guidance_scale: at the last scale, 1 or more; 1 runs no unconditional half.
            guidance_schedule: over the scales; the published "linear" begins with 1.
            guidance_high: the time, 0 to 1, above which nothing is guided.
            sampler: "euler" (the published one), "heun", "midpoint" or "euler-maruyama".
            time_shift: above 1, more steps at high noise.
            tokens, token_mask: ``[B, num_tokens, latent_dim]`` kept where the mask
                ``[B, num_tokens]`` is True; a coarse token is kept where all it covers is.
            noise: of each scale its normal draws ``[1 + draws a scale, B, p * p, latent_dim]``, the
                start first, in place of the generators'.

        Raises:
            InputError: a label, token or setting that means nothing.
        """
        config = self.config
        cfg = config.guidance_scale if guidance_scale is None else guidance_scale
        high = config.guidance_high if guidance_high is None else guidance_high
        steps = config.num_steps if num_steps is None else num_steps
        batch, device = len(labels), labels.device
        times = shift_times(sampling_times(steps), time_shift)
        check_sampler(sampler)
        check_labels(labels, config.num_classes)
        check_generators(generators, batch)
        check_given_latents(tokens, token_mask, (batch, self.num_tokens, config.latent_dim))
        check_guidance(cfg, guidance_schedule, least=1)
        if not 0 <= high <= 1:
            raise InputError(f"guidance_high is a time of 0 to 1, got {high}.")

        # What depends on the class or the time alone, once for all scales.
        if cfg != 1:
            labels = torch.cat([labels, null_labels(labels, config.num_classes)])
        classes = embed_labels(self.class_embedding.weight, labels)[:, None]
        modulations = self.transformer.modulations(classes)
        moments = evaluation_times(sampler, times)
        tables = self.head.embed_times(torch.tensor(moments, device=device))
        embedded = {t: [table[i : i + 1] for table in tables] for i, t in enumerate(moments)}

        if tokens is not None:
            targets = self.pyramid(tokens)
            kept = self.pyramid(token_mask[..., None].float())
        cache = self.transformer.new_cache(len(labels))
        x = classes
        last = max(len(config.patch_nums) - 1, 1)
        for scale, (side, here) in enumerate(zip(config.patch_nums, self.places, strict=True)):
            features = self.transformer(x, modulations, cache=cache, position=here.start)
            features = features + self.output_positions[here]
            weight = guidance_weight(guidance_schedule, cfg, scale / last)
            velocity = self._velocity(features, batch, weight, high, embedded, self.rope(here))
            if tokens is not None:
                target, known = (a[scale].flatten(2).mT for a in (targets, kept))
                known = known > 1 - 1e-6
                velocity = _holding(velocity, target, known)
            if noise is None:
                shape = (1 + num_step_draws(sampler, times), side * side, config.latent_dim)
                draws = draw("normal", shape, generators, device).transpose(0, 1)
            else:
                draws = noise[scale]
            # The published sampler keeps its state in float64.
            for state in integrate(sampler, velocity, draws[0].double(), times, draws[1:]):
                if tokens is not None:
                    state = torch.where(known, target, state)
                image = self.enlarge(state.float().transpose(1, 2).unflatten(2, (side, side)))
                latents = image.flatten(2).transpose(1, 2)
                if tokens is not None:
                    latents = torch.where(token_mask[..., None], tokens, latents)
                yield latents
            if scale < last:
                x = self.input_proj(self.next_input(image, scale + 1).to(classes.dtype))
                x = x.repeat(len(labels) // batch, 1, 1)

    def _velocity(
        self,
        features: Tensor,
        batch: int,
        weight: float,
        high: float,
        embedded: dict[float, list[Tensor]],
        rope: Rope,
    ) -> Callable[[Tensor, float], Tensor]:
        """The guided velocity over one scale; unconditional rows run only where guidance acts."""
        guided = weight != 1
        rows = self.head.embed_features(features if guided else features[:batch], rope)
        conditional = [row[:batch] for row in rows]

        def velocity(x: Tensor, t: float) -> Tensor:
            if not guided or t > high:
                return self.head(x, embedded[t], conditional, rope)
            both = self.head(x.repeat(2, 1, 1), embedded[t], rows, rope)
            return guide(*both.chunk(2), weight)

        return velocity

    @torch.no_grad()
    def generate(self, labels: Tensor, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """The last of `stream`: tokens float32 ``[B, num_tokens, latent_dim]``."""
        for latents in self.stream(labels, generators, **settings):
            last = latents
        return last


def _holding(
    velocity: Callable[[Tensor, float], Tensor], target: Tensor, kept: Tensor
) -> Callable[[Tensor, float], Tensor]:
    return lambda x, t: hold(velocity(x, t), x, t, target, kept)
