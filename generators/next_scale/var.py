"""VAR: Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction (Tian et
al., NeurIPS 2024).

Paper: arXiv 2404.02905. Code and weights: MIT. Published checkpoints (FoundationVision/var): var_d16,
var_d20, var_d24, var_d30 (256 pixels), var_d36 (512 pixels), over the ids of `MultiScaleVQVAE`.

A transformer writes all ids of a scale at once, coarse to fine. What it reads at a scale is the picture
so far, the sum of all coarser scales, shrunk to the size of that scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ...kernels.linear import Linear, linear
from ...modalities.errors import InputError
from ...tokenizers.base import Tokenizer
from ...tokenizers.quantizers.residual import MultiScaleResidualVQ
from ..base import ImageGenerator
from ..cache import StaticCache
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..layers.adaln import layer_norm, modulate
from ..layers.mlp import MLP
from ..sampling import check_generators, check_given, check_sampling, draw, guide, sample
from ..schedules import check_guidance, guidance_weight


class Attention(nn.Module):
    """Attention over directions: queries and keys have length 1, each head learns its temperature.

    Args:
        l2_norm: False is plain attention with the scale ``0.25 * head_dim ** -0.5``.
    """

    def __init__(self, dim: int, heads: int, l2_norm: bool):
        super().__init__()
        self.heads = heads
        self.l2_norm = l2_norm
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        if l2_norm:
            self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4)))
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        """``[B, n, D]`` -> the same shape; with a cache, n positions from ``position`` on, which see
        each other and all before them."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = 0.25 * q.shape[-1] ** -0.5
        if self.l2_norm:
            q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=math.log(100)).exp()
            k = F.normalize(k, dim=-1)
            scale = 1.0
        if cache is not None:
            k, v = cache.update(layer, position, k, v)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, both modulated by the class.

    Args:
        shared_adaln: the model computes one modulation for all blocks; a block adds its own constant.
        drop_path: chance that training skips each half for an item (stochastic depth).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_hidden: int,
        l2_norm: bool,
        shared_adaln: bool,
        drop_path: float,
    ):
        super().__init__()
        self.attn = Attention(dim, heads, l2_norm)
        self.mlp = MLP(dim, mlp_hidden, approximate="tanh")
        self.drop_path = StochasticDepth(drop_path, "row")
        if shared_adaln:
            self.modulation = nn.Parameter(torch.zeros(6 * dim))
        else:
            self.adaln = Linear(dim, 6 * dim)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        mask: Tensor | None = None,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        """``[B, n, D]`` and ``[B, 1, 6 D]`` -> ``[B, n, D]``; mask and cache are those of attention."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        h = self.attn(modulate(layer_norm(x), shift1, scale1), mask, cache, layer, position)
        x = x + self.drop_path(gate1 * h)
        h = self.mlp(modulate(layer_norm(x), shift2, scale2))
        return x + self.drop_path(gate2 * h)


class VAR(ImageGenerator, ModelMixin, ConfigMixin):
    """Class label -> ids of all scales. The defaults are the published var_d16.

    Args:
        vocab_size, code_dim, patch_nums: of the tokenizer.
        l2_norm: normalised queries and keys.
        shared_adaln: one modulation for all blocks.
        label_dropout, drop_path: in training.
        guidance_scale, top_k, top_p: of sampling, unless `stream` is told others.
    """

    unit = "scale"
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        code_dim: int = 32,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        num_classes: int = 1000,
        dim: int = 1024,
        depth: int = 16,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        l2_norm: bool = True,
        shared_adaln: bool = False,
        label_dropout: float = 0.1,
        drop_path: float = 0.1 * 16 / 24,
        guidance_scale: float = 2.5,
        top_k: int | None = 900,
        top_p: float = 0.96,
    ):
        super().__init__()
        levels = [level for level, side in enumerate(patch_nums) for _ in range(side * side)]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.zeros(len(levels), dim))
        self.level_embedding = nn.Embedding(len(patch_nums), dim)
        self.code_embed = Linear(code_dim, dim)
        if shared_adaln:
            self.adaln = Linear(dim, 6 * dim)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(dim, heads, round(dim * mlp_ratio), l2_norm, shared_adaln, rate) for rate in rates
        )
        self.head_adaln = Linear(dim, 2 * dim)
        self.head = Linear(dim, vocab_size)

    @property
    def num_tokens(self) -> int:
        return len(self.levels)

    def num_yields(self, num_tokens: int | None = None, num_steps: int | None = None) -> int:
        return len(self.config.patch_nums)

    def tokenizer_arguments(self, tokenizer: Tokenizer) -> dict[str, Any]:
        return {"quantizer": tokenizer.quantizer}

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        super().check_tokenizer(tokenizer)
        if not isinstance(getattr(tokenizer, "quantizer", None), MultiScaleResidualVQ):
            raise InputError(
                f"VAR writes the ids of a multi-scale tokenizer; {type(tokenizer).__name__} is none."
            )
        self._check_quantizer(tokenizer.quantizer)

    def init_weights(self, gate: float = 1e-3) -> None:
        """As published: truncated normal, small modulations and head.

        Args:
            gate: factor of the gates (published: 1e-3 for d16 and d20, 1e-4 d24, 1e-5 d30, 5e-6 d36).
        """
        dim, depth = self.config.dim, len(self.blocks)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not name.endswith("log_scale"):
                nn.init.trunc_normal_(parameter, std=(1 / (3 * dim)) ** 0.5)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_adaln.weight.mul_(0.5)
            for block in self.blocks:
                block.attn.proj.weight.div_((2 * depth) ** 0.5)
                block.mlp.fc2.weight.div_((2 * depth) ** 0.5)
                table = block.modulation if self.config.shared_adaln else block.adaln.weight
                table[: 2 * dim].mul_(gate)
                table[2 * dim :].mul_(0.5)

    def modulations(self, classes: Tensor) -> tuple[list[Tensor], Tensor]:
        """Class embeddings ``[B, D]`` -> of each block ``[B, 1, 6 D]``, of the head ``[B, 1, 2 D]``.

        They depend on the class alone: sampling computes them once for all scales.
        """
        condition = F.silu(classes[:, None])
        if self.config.shared_adaln:
            shared = self.adaln(condition)
            return [shared + b.modulation for b in self.blocks], self.head_adaln(condition)
        return [b.adaln(condition) for b in self.blocks], self.head_adaln(condition)

    def embed(self, inputs: Tensor | None, classes: Tensor) -> Tensor:
        """Inputs ``[B, n, code_dim]`` of the scales from the second on (None: none yet) -> ``[B, 1 + n,
        D]`` with the class as the start."""
        x = (classes + self.start)[:, None]
        if inputs is not None:
            x = torch.cat([x, self.code_embed(inputs.to(x.dtype))], dim=1)
        count = x.shape[1]
        return x + self.positions[:count] + self.level_embedding(self.levels[:count])

    def to_logits(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=-1)
        return self.head(modulate(layer_norm(x), shift, scale)).float()

    def logits(self, inputs: Tensor | None, labels: Tensor) -> Tensor:
        """Teacher-forced logits float32 ``[B, 1 + n, V]``; each scale sees itself and the coarser ones.

        Args:
            inputs: ``MultiScaleResidualVQ.next_inputs`` of the ids, ``[B, n, code_dim]``.
            labels: ``[B]``, ``num_classes`` = null.
        """
        classes = embed_labels(self.class_embedding.weight, labels)
        modulations, head = self.modulations(classes)
        x = self.embed(inputs, classes)
        levels = self.levels[: x.shape[1]]
        mask = levels[:, None] >= levels
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation, mask)
        return self.to_logits(x, head)

    def forward(
        self,
        tokens: Tensor,
        inputs: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over the ids of all scales (section 3.2).

        Args:
            tokens: ids ``[B, num_tokens]``.
            inputs: ``MultiScaleResidualVQ.next_inputs(tokens)``.
            labels: classes ``[B]``; in training some are dropped.
            generator: of dropped labels.
        """
        labels = self.drop_labels(labels, generator)
        logits = self.logits(inputs, labels)
        each = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        last = self.config.patch_nums[-1] ** 2
        return each.mean(), {
            "nll": each.mean().detach(),
            "nll_last_scale": each.view(tokens.shape)[:, -last:].mean().detach(),
        }

    def token_mask(self, mask: Tensor) -> Tensor:
        """A map ``[B, p, p]`` over the last scale, True = keep -> bool ``[B, num_tokens]`` over all."""
        mask = mask[:, None].float()
        maps = [
            F.interpolate(mask, size=(side, side), mode="bilinear", align_corners=False).flatten(1)
            for side in self.config.patch_nums
        ]
        return torch.cat(maps, dim=1) > 0.5

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        quantizer: MultiScaleResidualVQ,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the ids so far after every scale: ``[B, 1]``, ``[B, 5]``, ... ``[B, num_tokens]``.

        Args:
            labels: classes ``[B]``; ``num_classes`` = none, for in-painting.
            generators: one an item.
            quantizer: of the tokenizer; it turns ids into the next scale's input.
            guidance_scale: at the last scale; it grows linearly from 1 at the first. 1 runs no
                unconditional half. (The published code's ``cfg`` is this minus 1.)
            top_k, top_p: ``vocab_size`` and 1 keep all ids.
            tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True; see `token_mask`.

        Raises:
            InputError: a label, token or setting that means nothing, or a quantizer of another kind.
        """
        config = self.config
        weight = config.guidance_scale if guidance_scale is None else guidance_scale
        top_k = config.top_k if top_k is None else top_k
        top_p = config.top_p if top_p is None else top_p
        batch, device = len(labels), labels.device
        check_sampling(temperature, top_k, top_p)
        check_guidance(weight)
        check_labels(labels, config.num_classes)
        check_generators(generators, batch)
        check_given(tokens, token_mask, batch, self.num_tokens, config.vocab_size)
        self._check_quantizer(quantizer)

        guided = weight != 1
        if guided:
            labels = torch.cat([labels, null_labels(labels, config.num_classes)])
        classes = embed_labels(self.class_embedding.weight, labels)
        modulations, head = self.modulations(classes)
        places = self.positions + self.level_embedding(self.levels)
        cache = StaticCache(
            len(self.blocks),
            len(labels),
            config.heads,
            self.num_tokens,
            config.dim // config.heads,
            classes.dtype,
            device,
        )
        new = drawn = torch.empty(batch, 0, dtype=torch.int64, device=device)
        if tokens is not None:
            missing = (0, self.num_tokens - tokens.shape[1])
            tokens, token_mask = F.pad(tokens, missing), F.pad(token_mask, missing)
        latents = 0
        last = max(len(config.patch_nums) - 1, 1)
        for scale, side in enumerate(config.patch_nums):
            begin, end = drawn.shape[1], drawn.shape[1] + side * side
            if scale == 0:
                x = self.embed(None, classes)
            else:
                latents = latents + quantizer.residual(new, scale - 1)
                inputs = quantizer.shrink(latents, scale).flatten(2).transpose(1, 2)
                x = self.code_embed(inputs.to(classes.dtype)) + places[begin:end]
                x = x.repeat(2 if guided else 1, 1, 1)
            for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
                x = block(x, modulation, None, cache, layer, begin)
            logits = self.to_logits(x, head)
            if guided:
                logits = guide(*logits.chunk(2), guidance_weight("linear", weight, scale / last))
            noise = draw("exponential", logits.shape[1:], generators, device).flatten(0, 1)
            new = sample(logits.flatten(0, 1), temperature, top_k, top_p, generators, noise)
            new = new.view(batch, side * side)
            if tokens is not None:
                new = torch.where(token_mask[:, begin:end], tokens[:, begin:end], new)
            drawn = torch.cat([drawn, new], dim=1)
            yield drawn

    def _check_quantizer(self, quantizer: MultiScaleResidualVQ) -> None:
        ours = (self.config.vocab_size, self.config.code_dim, tuple(self.config.patch_nums))
        theirs = (quantizer.vocab_size, quantizer.codebook.dim, quantizer.patch_nums)
        if ours != theirs:
            raise InputError(
                f"This generator writes {ours[0]} ids of width {ours[1]} over the scales {ours[2]}, "
                f"the tokenizer has {theirs[0]} of width {theirs[1]} over {theirs[2]}: they do not fit."
            )

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        quantizer: MultiScaleResidualVQ,
        **settings,
    ) -> Tensor:
        """All of `stream`: ids int64 ``[B, num_tokens]``."""
        for drawn in self.stream(labels, generators, quantizer, **settings):
            ids = drawn
        return ids
