"""MaskGen: Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware One-Dimensional
Tokens (Kim et al., ICCV 2025).

Paper: arXiv 2501.07730. Code: Apache-2.0 (bytedance/1d-tokenizer). Published checkpoints
(turkeyju/generator_maskgen_{vq,kl}_{l,xl}; tagged Apache-2.0, "research purposes only"): vq over the ids of
TA-TiTok-BL-128-VQ, kl over the continuous tokens of TA-TiTok-BL-32-VAE.

A joint transformer reads text and tokens, some of them hidden, as two streams with weights of their own
and common attention. VQ predicts ids, as MaskGIT does; KL makes features from which a diffusion head
draws tokens, as MAR does (arXiv 2406.11838).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ...modalities.errors import InputError
from ...tokenizers.image.tatitok import TEXT_TOWER
from ..base import ImageGenerator
from ..flow.diffusion import GaussianDiffusion, spaced_timesteps
from ..flow.diffusion_head import DiffusionHead
from ..layers.adaln import layer_norm, modulate
from ..layers.mlp import MLP
from ..orders import random_order
from ..sampling import (
    check_generators,
    check_given_latents,
    check_sampling,
    draw,
    guide,
    gumbel,
)
from ..schedules import (
    check_guidance,
    check_steps,
    guidance_weight,
    mask_ratio,
    masked_counts,
)
from .masking import (
    draw_uniforms,
    mask_lowest,
    masked_loss,
    random_mask,
    sample_masked,
    start,
)

if TYPE_CHECKING:
    from open_clip import CLIP

    from ..conditioning.clip import TextImageCLIP


@torch.no_grad()
def embed_text(clip: CLIP, texts: Sequence[str], tower: str = TEXT_TOWER) -> tuple[Tensor, Tensor]:
    """Prompts -> what the generator reads of them; "" is the condition of the unconditional half.

    (The tokenizer's decoder reads another tensor of the same text: ``tatitok.embed_text``.)

    Args:
        clip: ``open_clip.create_model(tower, pretrained="openai")``, or another CLIP of open_clip.
        tower: the name whose tokenizer is used; it pads with zeros, and the padding counts.

    Returns:
        every position's features after the last layer but one, without LayerNorm, ``[B, L, D]``; and
        the projected feature of the whole text ``[B, E]``.
    """
    import open_clip

    ids = open_clip.get_tokenizer(tower, context_length=clip.context_length)(list(texts))
    return embed_ids(clip, ids.to(clip.token_embedding.weight.device))


@torch.no_grad()
def embed_ids(clip: CLIP, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`embed_text` of text tokens ``[B, L]``."""
    found = clip.forward_intermediates(text=ids, text_indices=2, normalize=False)
    return found["text_intermediates"][0], found["text_features"]


def sinusoid(values: Tensor, dim: int, max_period: float, interleaved: bool) -> Tensor:
    """Values ``[B]`` -> sines and cosines ``[B, dim]``, all sines first or in turns."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values[:, None].float() * (-math.log(max_period) * steps / half).exp()
    waves = torch.stack([angles.sin(), angles.cos()], dim=2 if interleaved else 1)
    return waves.flatten(1)


class JointBlock(nn.Module):
    """MM-DiT block (Esser et al., arXiv 2403.03206): tokens and text, each with its own weights.

    The last block only reads the text: it makes no queries of it and does not pass it on.
    """

    def __init__(self, dim: int, heads: int, last: bool):
        super().__init__()
        self.heads, self.last = heads, last
        self.adaln = Linear(dim, 6 * dim)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.mlp = MLP(dim, 4 * dim, approximate="tanh")
        self.text_adaln = Linear(dim, (2 if last else 6) * dim)
        self.text_qkv = Linear(dim, (2 if last else 3) * dim)
        if not last:
            self.text_proj = Linear(dim, dim)
            self.text_mlp = MLP(dim, 4 * dim, approximate="tanh")

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU of the conditions ``[B, 1, D]`` -> of the tokens and of the text ``[B, 1, k D]``."""
        return self.adaln(condition), self.text_adaln(condition)

    def split_heads(self, x: Tensor) -> Tensor:
        """``[B, T, k D]`` -> ``[k, B, heads, T, head_dim]``."""
        parts = x.shape[-1] // self.proj.out_features
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, text: Tensor, modulations: tuple[Tensor, Tensor]) -> tuple:
        """Tokens ``[B, N, D]`` and text ``[B, L, D]`` -> both after the block; no text from the last."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations[0].chunk(6, dim=-1)
        q, k, v = self.split_heads(self.qkv(modulate(layer_norm(x), shift1, scale1)))
        if self.last:
            text_scale1, text_shift1 = modulations[1].chunk(2, dim=-1)
        else:
            text_shift1, text_scale1, *text_rest = modulations[1].chunk(6, dim=-1)
        of_text = self.split_heads(
            self.text_qkv(modulate(layer_norm(text), text_shift1, text_scale1))
        )
        k, v = torch.cat([k, of_text[-2]], dim=2), torch.cat([v, of_text[-1]], dim=2)
        if not self.last:
            q = torch.cat([q, of_text[0]], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        count = x.shape[1]
        x = torch.addcmul(x, gate1, self.proj(attended[:, :count]))
        x = torch.addcmul(x, gate2, self.mlp(modulate(layer_norm(x), shift2, scale2)))
        if self.last:
            return x, None
        text_gate1, text_shift2, text_scale2, text_gate2 = text_rest
        text = torch.addcmul(text, text_gate1, self.text_proj(attended[:, count:]))
        h = modulate(layer_norm(text), text_shift2, text_scale2)
        return x, torch.addcmul(text, text_gate2, self.text_mlp(h))


class JointTransformer(nn.Module):
    """Tokens beside a text, under a pooled text and an aesthetic score.

    Args:
        text_dim: width of the text's features and of its pooled feature.
        micro_dim: width of the score's sinusoid; 0 takes no score.
        micro_period, micro_interleaved: of the sinusoid.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        text_dim: int,
        micro_dim: int,
        micro_period: float,
        micro_interleaved: bool,
    ):
        super().__init__()
        self.micro = (micro_dim, micro_period, micro_interleaved)
        self.text_proj = Linear(text_dim, dim)
        self.pooled_proj = Linear(text_dim + micro_dim, dim)
        self.blocks = nn.ModuleList(
            JointBlock(dim, heads, last=i + 1 == depth) for i in range(depth)
        )
        self.final_adaln = Linear(dim, 2 * dim)

    def embed_score(self, score: Tensor) -> Tensor:
        """Aesthetic scores ``[B]``, about 0 to 10 -> ``[B, micro_dim]``."""
        return sinusoid(100 * score, *self.micro)

    def condition(self, text_features: Tensor, pooled: Tensor, score: Tensor | float) -> tuple:
        """What all passes over the same texts share: projected text, modulations of blocks and end."""
        dtype = self.text_proj.weight.dtype
        if self.micro[0]:
            score = torch.as_tensor(score, device=pooled.device).expand(len(pooled))
            pooled = torch.cat([pooled.to(dtype), self.embed_score(score).to(dtype)], dim=-1)
        condition = F.silu(self.pooled_proj(pooled.to(dtype)))[:, None]
        return (
            self.text_proj(text_features.to(dtype)),
            [block.modulation(condition) for block in self.blocks],
            self.final_adaln(condition),
        )

    def forward(self, x: Tensor, condition: tuple) -> Tensor:
        """Tokens ``[B, N, D]`` and `condition` -> ``[B, N, D]``."""
        text, modulations, final = condition
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x, text = block(x, text, modulation)
        scale, shift = final.chunk(2, dim=-1)
        return modulate(layer_norm(x), shift, scale)


class _MaskGen(ImageGenerator, ModelMixin, ConfigMixin):
    """What both kinds ask of their texts."""

    condition = "text"

    def text_condition(
        self, tower: TextImageCLIP, texts: Sequence[str], null_texts: Sequence[str]
    ) -> dict[str, Tensor]:
        """What `stream` reads of texts and of their negatives."""
        features, pooled = embed_ids(tower.model, tower.tokenize([*texts, *null_texts]))
        n = len(texts)
        return {
            "text_features": features[:n],
            "pooled": pooled[:n],
            "null_features": features[n:],
            "null_pooled": pooled[n:],
        }

    def sampling_condition(
        self,
        text_features: Tensor,
        pooled: Tensor,
        null_features: Tensor | None,
        null_pooled: Tensor | None,
        score: Tensor | float,
        guided: bool,
    ) -> tuple:
        """`JointTransformer.condition` of the texts and, with guidance, then of the empty text."""
        batch, width = len(text_features), self.config.text_dim
        if text_features.ndim != 3 or text_features.shape[-1] != width:
            raise InputError(
                f"text_features must have the shape [batch, length, {width}], got "
                f"{list(text_features.shape)}: make them with embed_text."
            )
        if tuple(pooled.shape) != (batch, width):
            raise InputError(
                f"pooled must have the shape {[batch, width]}, got {list(pooled.shape)}: make it "
                "with embed_text."
            )
        if not guided:
            return self.transformer.condition(text_features, pooled, score)
        if null_features is None or null_pooled is None:
            raise InputError(
                'Guidance needs null_features and null_pooled: make them with embed_text(clip, [""]).'
            )
        text_features = torch.cat([text_features, null_features.expand(batch, -1, -1)])
        pooled = torch.cat([pooled, null_pooled.expand(batch, -1)])
        if isinstance(score, Tensor):
            score = score.expand(batch).repeat(2)
        return self.transformer.condition(text_features, pooled, score)


class MaskGenVQ(_MaskGen):
    """Text -> token ids in any order. The defaults are the published VQ-L.

    Args:
        vocab_size: ids of the tokenizer; the next one hides a token.
        unused_ids: further rows of the published embedding table.
        text_dim: width of the text's features.
        micro_dim: width of the aesthetic score's sinusoid; 0 takes no score.
        weight_tying: predict ids by the rows of the embedding table.
        num_steps, guidance_scale, guidance_schedule, guidance_power, temperature: of sampling, unless
            `stream` is told others.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8192,
        num_tokens: int = 128,
        dim: int = 1024,
        depth: int = 16,
        heads: int = 16,
        text_dim: int = 768,
        micro_dim: int = 256,
        unused_ids: int = 1001,
        weight_tying: bool = True,
        num_steps: int = 16,
        guidance_scale: float = 13.0,
        guidance_schedule: str = "power-cosine",
        guidance_power: float = 1.0,
        temperature: float = 2.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + 1 + unused_ids, dim)
        self.positions = nn.Parameter(torch.zeros(num_tokens, dim))
        self.transformer = JointTransformer(dim, depth, heads, text_dim, micro_dim, 1000, False)
        self.head = None if weight_tying else Linear(dim, vocab_size)

    def init_weights(self) -> None:
        """Truncated normal 0.02, biases zero; the last modulation zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias") or "final_adaln" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    def logits(self, tokens: Tensor, condition: tuple) -> Tensor:
        """Ids ``[B, num_tokens]`` (``vocab_size`` hides one) and `JointTransformer.condition` ->
        ``[B, num_tokens, V]``."""
        x = self.transformer(self.embedding(tokens) + self.positions, condition)
        if self.head is None:
            return linear(x, self.embedding.weight[: self.config.vocab_size])
        return self.head(x)

    def forward(
        self,
        tokens: Tensor,
        text_features: Tensor,
        pooled: Tensor,
        aesthetic_score: Tensor | float = 6.5,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of whole sequences with a random part hidden.

        Args:
            tokens: ids ``[B, num_tokens]``.
            text_features, pooled: ``[B, L, text_dim]`` and ``[B, text_dim]`` of `embed_text`; one item
                in ten should carry those of the empty text, which guidance needs.
            aesthetic_score: of the pictures, ``[B]`` or one for all.
            generator: of the masks, on the model's device.
        """
        masked = random_mask(tokens, generator)
        condition = self.transformer.condition(text_features, pooled, aesthetic_score)
        logits = self.logits(tokens.masked_fill(masked, self.config.vocab_size), condition)
        return masked_loss(logits, tokens, masked)

    @torch.no_grad()
    def stream(
        self,
        text_features: Tensor,
        pooled: Tensor,
        generators: Sequence[torch.Generator],
        null_features: Tensor | None = None,
        null_pooled: Tensor | None = None,
        aesthetic_score: Tensor | float = 6.5,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        temperature: float | None = None,
        softmax_annealing: bool = True,
        confidence_noise: bool = True,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, num_tokens]`` after each step: all there, the uncertain ones yet to change.

        Args:
            text_features, pooled: ``[B, L, text_dim]`` and ``[B, text_dim]`` of `embed_text`.
            generators: one an item.
            null_features, null_pooled: of the empty text, ``[1, L, text_dim]`` and ``[1, text_dim]``;
                needed for guidance.
            aesthetic_score: wanted, ``[B]`` or one for all.
            guidance_scale: at the last step; 1 runs no unconditional half. (The published code adds
                one: its 12 is 13 here, and its schedules start at 2.)
            guidance_schedule, guidance_power: see `guidance_weight`.
            temperature: of the noise on logits and confidences, falling to 0 at the last step.
            softmax_annealing: divide the logits by a number that falls from 1.3 to 0.5.
            confidence_noise: whether chance has a say in which tokens are hidden again.
            tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True.
            noise: draws from U(0, 1) in place of the generators': ``[num_steps, B, N, V]`` for the ids
                and ``[num_steps, B, N]`` for their confidences.

        Raises:
            InputError: a text, token or setting that means nothing.
        """
        config = self.config
        steps = config.num_steps if num_steps is None else num_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        schedule = guidance_schedule or config.guidance_schedule
        power = config.guidance_power if guidance_power is None else guidance_power
        heat = config.temperature if temperature is None else temperature
        batch, length, vocab = len(text_features), config.num_tokens, config.vocab_size
        device = text_features.device
        check_sampling(heat)
        check_steps(steps)
        check_guidance(scale, schedule, power)
        check_generators(generators, batch)

        guided = scale != 1
        condition = self.sampling_condition(
            text_features, pooled, null_features, null_pooled, aesthetic_score, guided
        )
        ids, masked, counts = start(batch, length, vocab, steps, device, tokens, token_mask)
        for step in range(steps):
            if noise is None:
                u_token, u_confidence = draw_uniforms(length, vocab, generators, device)
            else:
                u_token, u_confidence = (u[step] for u in noise)
            done = (step + 1) / steps
            inputs = ids.masked_fill(masked, vocab)
            if guided:
                logits = self.logits(inputs.repeat(2, 1), condition).float()
                weight = 1 + guidance_weight(schedule, scale - 1, done, power)
                logits = guide(*logits.chunk(2), weight)
            else:
                logits = self.logits(inputs, condition).float()
            if softmax_annealing:
                logits = logits / (0.5 + 0.8 * (1 - done))
            ids, score = sample_masked(logits, ids, masked, heat * (1 - done), u_token)
            yield ids
            if confidence_noise:
                score = score + heat * (1 - done) * gumbel(u_confidence)
            masked = mask_lowest(score, masked, counts[step])

    @torch.no_grad()
    def generate(
        self,
        text_features: Tensor,
        pooled: Tensor,
        generators: Sequence[torch.Generator],
        **settings,
    ) -> Tensor:
        """The last of `stream`: ids int64 ``[B, num_tokens]``."""
        for ids in self.stream(text_features, pooled, generators, **settings):
            last = ids
        return last


class MaskGenKL(_MaskGen):
    """Text -> continuous tokens in random order. The defaults are the published KL-L.

    Args:
        latent_dim: width of a token.
        scale_factor: tokens are multiplied by it, so that their variance is about 1.
        head_dim, head_depth: of the diffusion head.
        text_dim: width of the text's features.
        micro_dim: width of the aesthetic score's sinusoid; 0 takes no score.
        num_steps, guidance_scale, diffusion_steps: of sampling, unless `stream` is told others.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 16,
        num_tokens: int = 32,
        scale_factor: float = 0.7525,
        dim: int = 1024,
        depth: int = 16,
        heads: int = 16,
        head_dim: int = 1024,
        head_depth: int = 8,
        text_dim: int = 768,
        micro_dim: int = 256,
        num_steps: int = 32,
        guidance_scale: float = 3.0,
        diffusion_steps: int = 100,
    ):
        super().__init__()
        self.input_proj = Linear(latent_dim, dim)
        self.input_norm = nn.LayerNorm(dim, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.zeros(num_tokens, dim))
        self.transformer = JointTransformer(dim, depth, heads, text_dim, micro_dim, 10000, True)
        self.head_positions = nn.Parameter(torch.zeros(num_tokens, dim))
        self.head = DiffusionHead(latent_dim, dim, head_dim, head_depth)

    def init_weights(self) -> None:
        """Xavier uniform, biases zero; positions and mask token normal 0.02; see `DiffusionHead`."""
        for name, parameter in self.named_parameters():
            if name in ("mask_token", "positions", "head_positions"):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.xavier_uniform_(parameter)
        self.head.init_weights()

    @cached_property
    def process(self) -> GaussianDiffusion:
        """All 1000 steps, for training."""
        return GaussianDiffusion()

    def features(self, latents: Tensor, masked: Tensor, condition: tuple) -> Tensor:
        """What the head reads.

        Args:
            latents: scaled tokens ``[B, num_tokens, latent_dim]``; hidden ones are not read.
            masked: bool ``[B, num_tokens]``, True = hidden.
            condition: `JointTransformer.condition`.

        Returns:
            ``[B, num_tokens, D]``.
        """
        x = self.input_norm(self.input_proj(latents.to(self.dtype)))
        x = torch.where(masked[..., None], self.mask_token, x) + self.positions
        return self.transformer(x, condition) + self.head_positions

    def forward(
        self,
        latents: Tensor,
        text_features: Tensor,
        pooled: Tensor,
        aesthetic_score: Tensor | float = 6.5,
        generator: torch.Generator | None = None,
        repeats: int = 4,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Diffusion loss of hidden tokens.

        Args:
            latents: tokens ``[B, num_tokens, latent_dim]`` of the tokenizer.
            text_features, pooled: ``[B, L, text_dim]`` and ``[B, text_dim]`` of `embed_text`; one item
                in ten should carry those of the empty text, which guidance needs.
            aesthetic_score: of the pictures, ``[B]`` or one for all.
            generator: of masks, timesteps and noise, on the model's device.
            repeats: timesteps drawn for each token.
        """
        batch, length, _ = latents.shape
        random = {"generator": generator, "device": latents.device}
        latents = latents * self.config.scale_factor
        # One share for the batch, so that all rows hide the same number.
        ratio = mask_ratio("arccos", float(torch.rand(1, **random)))
        count = max(1, math.ceil(length * ratio))
        hidden = torch.rand(batch, length, **random).argsort(dim=1)[:, :count]
        masked = torch.zeros(batch, length, dtype=torch.bool, device=latents.device)
        masked.scatter_(1, hidden, True)
        condition = self.transformer.condition(text_features, pooled, aesthetic_score)
        features = _pick(self.features(latents, masked, condition), hidden)
        mse, bound = self.head.loss(
            _pick(latents, hidden).repeat(repeats, 1),
            features.repeat(repeats, 1),
            self.process,
            generator,
        )
        loss = (mse + bound).mean()
        return loss, {"mse": mse.mean().detach(), "bound": bound.mean().detach()}

    @torch.no_grad()
    def stream(
        self,
        text_features: Tensor,
        pooled: Tensor,
        generators: Sequence[torch.Generator],
        null_features: Tensor | None = None,
        null_pooled: Tensor | None = None,
        aesthetic_score: Tensor | float = 6.5,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
        diffusion_steps: int | Sequence[int] | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        orders: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield tokens ``[B, num_tokens, latent_dim]`` after each step; what is still hidden is 0.

        Args:
            text_features, pooled: ``[B, L, text_dim]`` and ``[B, text_dim]`` of `embed_text`.
            generators: one an item.
            null_features, null_pooled: of the empty text, ``[1, L, text_dim]`` and ``[1, text_dim]``;
                needed for guidance.
            aesthetic_score: wanted, ``[B]`` or one for all.
            num_steps: 1 to num_tokens; each step draws more tokens than the one before (cosine).
            guidance_scale: of the noise that the head predicts; 1 runs no unconditional half.
            guidance_schedule: over the share of tokens that are there; see `guidance_weight`.
            temperature: of the noise of the head's steps.
            diffusion_steps: of the head, 2 to 1000, or the kept timesteps themselves, ascending.
            tokens, token_mask: ``[B, num_tokens, latent_dim]`` kept where the mask
                ``[B, num_tokens]`` is True.
            orders: ``[B, num_tokens]``, the last places first, in place of random ones.
            noise: of each step the draws of `DiffusionHead.sample`, ``[T + 1, B n, latent_dim]``, rows
                by item, then place; in place of the generators'.

        Raises:
            InputError: a text, token or setting that means nothing.
        """
        config = self.config
        steps = config.num_steps if num_steps is None else num_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        kept = config.diffusion_steps if diffusion_steps is None else diffusion_steps
        process = GaussianDiffusion(spaced_timesteps(kept) if isinstance(kept, int) else kept)
        batch, length, width = len(text_features), config.num_tokens, config.latent_dim
        device = text_features.device
        check_sampling(temperature)
        check_steps(steps, length)
        check_guidance(scale, guidance_schedule)
        check_generators(generators, batch)
        latents = torch.zeros(batch, length, width, device=device)
        known = torch.zeros(batch, length, dtype=torch.bool, device=device)
        if tokens is not None or token_mask is not None:
            check_given_latents(tokens, token_mask, (batch, length, width))
            known = token_mask
            latents = torch.where(known[..., None], tokens * config.scale_factor, latents)

        guided = scale != 1
        condition = self.sampling_condition(
            text_features, pooled, null_features, null_pooled, aesthetic_score, guided
        )
        if orders is None:
            orders = random_order(length, generators, device)
        # Known tokens go to the end of the order: their turn comes first, and changes nothing.
        orders = orders.gather(1, known.gather(1, orders).long().argsort(dim=1, stable=True))
        all_know = int(known.sum(1).min())
        masked, left, rows = ~known, length, 2 if guided else 1
        for step, next_left in enumerate(masked_counts("cosine", length, steps)):
            new = orders[:, (next_left if step + 1 < steps else 0) : left].sort(dim=1).values
            left = next_left
            if noise is None:
                shape = (len(process.timesteps) + 1, new.shape[1], width)
                draws = draw("normal", shape, generators, device).transpose(0, 1).flatten(1, 2)
            else:
                draws = noise[step]
            if length - left > all_know or step + 1 == steps:
                features = self.features(
                    latents.repeat(rows, 1, 1), masked.repeat(rows, 1), condition
                )
                weight = guidance_weight(guidance_schedule, scale, (length - left) / length)
                features = _pick(features, new.repeat(rows, 1))
                drawn = self.head.sample(features, process, draws, weight, temperature)
                written = torch.zeros_like(masked).scatter(1, new, True) & masked
                places = new[..., None].expand(-1, -1, width)
                drawn = latents.scatter(1, places, drawn.view(batch, -1, width))
                latents = torch.where(written[..., None], drawn, latents)
                masked = masked & ~written
            result = latents / config.scale_factor
            yield result if tokens is None else torch.where(known[..., None], tokens, result)

    @torch.no_grad()
    def generate(
        self,
        text_features: Tensor,
        pooled: Tensor,
        generators: Sequence[torch.Generator],
        **settings,
    ) -> Tensor:
        """The last of `stream`: tokens float32 ``[B, num_tokens, latent_dim]``."""
        for latents in self.stream(text_features, pooled, generators, **settings):
            last = latents
        return last


def _pick(x: Tensor, places: Tensor) -> Tensor:
    """``[B, N, C]`` at int64 ``[B, n]`` -> ``[B n, C]``."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1)
