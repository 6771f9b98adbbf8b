"""MaskGIT over TiTok's tokens, of An Image is Worth 32 Tokens for Reconstruction and Generation (Yu et
al., NeurIPS 2024).

Papers: arXiv 2406.07550; MaskGIT: arXiv 2202.04200. Code: Apache-2.0 (bytedance/1d-tokenizer). Published
checkpoints (yucornetto/generator_titok_*_imagenet; tagged Apache-2.0, "research purposes only"): l32 and
b64 with BERT as the trunk, s128 with U-ViT.

A bidirectional transformer reads the class and the tokens, some of them hidden, and predicts all; a few
steps fill in a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import ImageGenerator
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..layers.attention import SelfAttention
from ..layers.mlp import MLP
from ..layers.vit import ViTBlock
from ..sampling import check_generators, check_sampling, guide, gumbel
from ..schedules import check_guidance, check_steps, guidance_weight
from .masking import (
    draw_uniforms,
    mask_lowest,
    masked_loss,
    random_mask,
    sample_masked,
    start,
)


class BERTBlock(nn.Module):
    """Post-norm block (Devlin et al., arXiv 1810.04805)."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, dropout: float):
        super().__init__()
        self.attn = SelfAttention(dim, heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = MLP(dim, mlp_hidden)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.dropout(self.mlp(x)))


class BERT(nn.Module):
    """Norm, then post-norm blocks."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            BERTBlock(dim, heads, mlp_hidden, dropout) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` -> the same shape."""
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class UViT(nn.Module):
    """Pre-norm blocks with long skips: half of them, a middle one, and the other half, each of which
    first joins the output of its counterpart (Bao et al., arXiv 2209.12152)."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_hidden: int):
        super().__init__()

        def block() -> ViTBlock:
            return ViTBlock(dim, heads, mlp_hidden, qkv_bias=False, eps=1e-5)

        half = depth // 2
        self.in_blocks = nn.ModuleList(block() for _ in range(half))
        self.mid_block = block()
        self.skips = nn.ModuleList(Linear(2 * dim, dim) for _ in range(half))
        self.out_blocks = nn.ModuleList(block() for _ in range(half))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` -> the same shape."""
        outputs = []
        for block in self.in_blocks:
            x = block(x)
            outputs.append(x)
        x = self.mid_block(x)
        for skip, block in zip(self.skips, self.out_blocks, strict=True):
            x = block(skip(torch.cat([x, outputs.pop()], dim=-1)))
        return self.norm(x)


class MaskGIT(ImageGenerator, ModelMixin, ConfigMixin):
    """Class label -> token ids in any order. The defaults are the published model over TiTok-L-32.

    Ids 0 to ``vocab_size - 1`` are tokens, the next hides one, then follow the classes and the null
    class.

    Args:
        trunk: "bert" or "uvit".
        depth: number of blocks; a U-ViT has one more in the middle.
        dropout: of BERT, in training.
        label_dropout: how often training replaces the class by the null class.
        num_steps, guidance_scale, guidance_schedule, guidance_power, temperature, softmax_annealing: of
            sampling, unless `stream` is told others.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        num_tokens: int = 32,
        num_classes: int = 1000,
        trunk: str = "bert",
        dim: int = 768,
        depth: int = 24,
        heads: int = 16,
        mlp_hidden: int = 3072,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        num_steps: int = 8,
        guidance_scale: float = 5.5,
        guidance_schedule: str = "linear",
        guidance_power: float = 3.0,
        temperature: float = 9.5,
        softmax_annealing: bool = True,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + num_classes + 2, dim)
        self.positions = nn.Parameter(torch.zeros(num_tokens + 1, dim))
        if trunk == "bert":
            self.transformer = BERT(dim, depth, heads, mlp_hidden, dropout)
        elif trunk == "uvit":
            self.transformer = UViT(dim, depth, heads, mlp_hidden)
        else:
            raise InputError(f'The trunk of a MaskGIT is "bert" or "uvit", got "{trunk}".')
        self.head = Linear(dim, vocab_size)

    def init_weights(self) -> None:
        """Truncated normal 0.02, biases zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Predictions for all positions.

        Args:
            tokens: ids ``[B, num_tokens]``; ``vocab_size`` hides one.
            labels: ``[B]``, ``num_classes`` = null.

        Returns:
            ``[B, num_tokens, V]``.
        """
        classes = embed_labels(self.embedding.weight[self.config.vocab_size + 1 :], labels)
        x = torch.cat([classes[:, None], self.embedding(tokens)], dim=1) + self.positions
        return self.head(self.transformer(x)[:, 1:])

    def forward(
        self, tokens: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of whole sequences with a random part hidden.

        Args:
            tokens: ids ``[B, num_tokens]``.
            labels: classes ``[B]``; in training some are dropped.
            generator: of masks and dropped labels, on the model's device.
        """
        labels = self.drop_labels(labels, generator)
        masked = random_mask(tokens, generator)
        logits = self.logits(tokens.masked_fill(masked, self.config.vocab_size), labels)
        return masked_loss(logits, tokens, masked)

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        temperature: float | None = None,
        softmax_annealing: bool | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, num_tokens]`` after each step: all there, the uncertain ones yet to change.

        Args:
            labels: classes ``[B]``.
            generators: one an item.
            guidance_scale: at the end of the schedule. 1 runs no unconditional half, nor does a step
                where the schedule stands at 1. (The published code adds one under "constant" and
                "linear": its 4.5 is 5.5 here.)
            guidance_schedule, guidance_power: see `guidance_weight`.
            temperature: of the noise on logits and confidences, falling to 0 at the last step.
            softmax_annealing: divide the logits by a number that falls from 1.3 to 0.5.
            tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True.
            noise: draws from U(0, 1) in place of the generators': ``[num_steps, B, N, V]`` for the ids
                and ``[num_steps, B, N]`` for their confidences.

        Raises:
            InputError: a label, token or setting that means nothing.
        """
        config = self.config
        steps = config.num_steps if num_steps is None else num_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        schedule = guidance_schedule or config.guidance_schedule
        power = config.guidance_power if guidance_power is None else guidance_power
        heat = config.temperature if temperature is None else temperature
        annealing = config.softmax_annealing if softmax_annealing is None else softmax_annealing
        batch, length, vocab = len(labels), config.num_tokens, config.vocab_size
        check_sampling(heat)
        check_steps(steps)
        check_guidance(scale, schedule, power)
        check_labels(labels, config.num_classes)
        check_generators(generators, batch)

        ids, masked, counts = start(batch, length, vocab, steps, labels.device, tokens, token_mask)
        both = torch.cat([labels, null_labels(labels, config.num_classes)])
        for step in range(steps):
            if noise is None:
                u_token, u_confidence = draw_uniforms(length, vocab, generators, labels.device)
            else:
                u_token, u_confidence = (u[step] for u in noise)
            left = 1 - (step + 1) / steps
            weight = guidance_weight(schedule, scale, step / steps, power)
            inputs = ids.masked_fill(masked, vocab)
            if weight == 1:
                logits = self.logits(inputs, labels).float()
            else:
                logits = guide(*self.logits(inputs.repeat(2, 1), both).float().chunk(2), weight)
            if annealing:
                logits = logits / (0.5 + 0.8 * left)
            ids, score = sample_masked(logits, ids, masked, heat * left, u_token)
            yield ids
            score = score + heat * left * gumbel(u_confidence)
            masked = mask_lowest(score, masked, counts[step])

    @torch.no_grad()
    def generate(self, labels: Tensor, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """The last of `stream`: ids int64 ``[B, num_tokens]``."""
        for ids in self.stream(labels, generators, **settings):
            last = ids
        return last
