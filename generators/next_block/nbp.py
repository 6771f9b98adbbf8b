"""Next Block Prediction: Video Generation via Semi-Autoregressive Modeling (Ren et al., 2025).

Paper: arXiv 2502.07737. Code: MIT (RenShuhuai-Andy/NBP). Published checkpoints (no licence text of the
weights was seen): ShuhuaiRen/NBP-ucf-base, NBP-ucf-3b (UCF-101 by the name of the class), NBP-k600-base,
NBP-k600-3b (Kinetics-600, the frames after five given ones).

A transformer over the ids of a video tokenizer in raster order that writes a block of P ids, say a row of
the grid, at each step: the output at position p predicts the id at p + P. Positions see their own block
and earlier ones. Behind a text the first block is written id by id, and then repeated, filled up with
P - 1 fixed ids, as a first block (the hybrid start):

    text | begin z_0 .. z_{P-2} | z_{P-1} m_1 .. m_{P-1} | z_P .. z_{2P-1} | ...
      ->    z_0 z_1 .. z_{P-1}  |     z_P .. z_{2P-1}    | z_2P ..
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ...weights.registry import PUBLISHED
from ..cache import StaticCache
from ..sampling import (
    check_generators,
    check_given,
    check_ids,
    check_sampling,
    draw,
    guide,
    sample,
)
from ..schedules import check_guidance


def ucf_text(classes: Sequence[str]) -> Tensor:
    """Text ids int64 ``[B, 8]`` of UCF-101 class names ("ApplyEyeMakeup") for the published models.

    Raises:
        InputError: no such class.
    """
    path = PUBLISHED / "nbp_ucf_text_ids.json"
    rows = json.loads(path.read_text(encoding="utf8"))["classes"]
    for name in classes:
        if name not in rows:
            raise InputError(f'"{name}" is no class of UCF-101: write it as in "ApplyEyeMakeup".')
    return torch.tensor([rows[name][1] for name in classes])


class Block(nn.Module):
    """Pre-norm attention and MLP (exact GELU); LayerNorm eps 1e-5."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = nn.Sequential(Linear(dim, 4 * dim), nn.GELU(), Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        """``[B, T, D]`` -> the same. With a cache ``x`` holds the positions from ``position`` on; without
        a mask these see all cached ones and each other."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(layer, position, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.proj(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class NBP(ModelMixin, ConfigMixin):
    """Text ids, or the first ids of a clip -> ids in raster order. The defaults are NBP-ucf-base.

    The vocabulary is [begin, P - 1 middle ids, text ids, video ids]; a model without text has video ids
    alone.

    Args:
        vocab_size: video ids.
        num_tokens: of a clip (the longest: sequences go on to ``max_positions``).
        block_size: P.
        text_vocab_size, text_length: text ids, and how many of them stand before a clip; 0 for a
            model that continues a clip.
        max_positions: of the learned table.
        text_pad: text id that fills up short texts, and alone makes the null text of guidance.
        dropout: of embeddings and both branches of a block, in training.
        text_dropout: how often training replaces the text by the null text.
        text_dim: width of a text tower's features, which then stand before a clip in place of ids
            (``text_vocab_size`` 0; see `conditioning.text.text_prefix`). The null text is zeros.
        temperature, top_k, top_p, guidance_scale: of sampling, unless `stream` is told others.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 64000,
        num_tokens: int = 1280,
        block_size: int = 16,
        text_vocab_size: int = 32000,
        text_length: int = 8,
        max_positions: int = 5120,
        dim: int = 1536,
        depth: int = 24,
        heads: int = 16,
        text_pad: int = 2,
        dropout: float = 0.1,
        text_dropout: float = 0.0,
        temperature: float = 1.0,
        top_k: int | None = 16000,
        top_p: float = 0.9,
        guidance_scale: float = 1.0,
        text_dim: int | None = None,
    ):
        super().__init__()
        # First of the joint ids of texts, and of clips.
        self.first_text = block_size if text_length else 0
        self.first_video = self.first_text + text_vocab_size if text_length else 0
        joint = self.first_video + vocab_size
        self.embedding = nn.Embedding(joint, dim)
        if text_dim is not None:
            self.text_proj = Linear(text_dim, dim)
        self.positions = nn.Parameter(torch.zeros(max_positions, dim))
        self.input_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = Linear(dim, joint, bias=False)

    def init_weights(self) -> None:
        """Normal 0.02, biases and positions zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias") or name == "positions":
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def hybrid(self) -> bool:
        """Whether a text stands in front."""
        return self.config.text_length > 0

    def steps(self, length: int) -> Tensor:
        """The step that each of ``length`` positions belongs to, int64 ``[length]``: text 0, then each
        of the first P its own, then one a block. A position sees those of its own step and before."""
        position = torch.arange(length, device=self.positions.device)
        size = self.config.block_size
        if not self.hybrid:
            return position // size
        after = position - self.config.text_length
        single = (after + 1).clamp(min=0)
        return torch.where(after < size, single, size + after // size)

    def mask(self, length: int) -> Tensor:
        """True where the row's position sees the column's, bool ``[length, length]``."""
        steps = self.steps(length)
        return steps[None] <= steps[:, None]

    def start(self, condition: Tensor) -> Tensor:
        """The first positions' joint ids: of text ids ``[B, text_length]`` these and the begin of the
        video (of features that alone), of a clip's first ids ``[B, k P]`` these."""
        if not self.hybrid:
            return condition
        if self.config.text_dim is not None:
            return torch.zeros(len(condition), 1, dtype=torch.int64, device=condition.device)
        return F.pad(condition + self.first_text, (0, 1), value=0)

    def null_text(self, condition: Tensor) -> Tensor:
        """Conditions of the same shape that say nothing."""
        fill = self.config.text_pad if self.config.text_dim is None else 0
        return torch.full_like(condition, fill)

    def repeat(self, last: Tensor) -> Tensor:
        """The first block again as an input, joint ids ``[B, P]``: z_{P-1}, m_1, ... m_{P-1}."""
        middle = torch.arange(1, self.config.block_size, device=last.device)
        return torch.cat([last[:, None], middle.expand(len(last), -1)], dim=1)

    def check_condition(self, condition: Tensor) -> None:
        """Raise InputError unless this is text ids ``[B, text_length]``, features of a text ``[B,
        text_length, text_dim]``, or whole blocks of ids."""
        c = self.config
        if c.text_dim is not None:
            if tuple(condition.shape[1:]) != (c.text_length, c.text_dim):
                raise InputError(
                    f"The condition of this model is text features [batch, {c.text_length}, "
                    f"{c.text_dim}], got {list(condition.shape)}."
                )
            return
        whole = not condition.dtype.is_floating_point and condition.ndim == 2
        if self.hybrid:
            wanted = f"{c.text_length} text ids"
            fits = whole and condition.shape[1] == c.text_length
        else:
            wanted = f"{c.block_size} k ids that a clip begins with"
            fits = whole and condition.shape[1] > 0 and condition.shape[1] % c.block_size == 0
        if not fits:
            raise InputError(
                f"The condition of this model is {wanted}, [batch, count], got "
                f"{str(condition.dtype).removeprefix('torch.')} {list(condition.shape)}."
            )
        check_ids(condition, c.text_vocab_size if self.hybrid else c.vocab_size)

    def embed(self, ids: Tensor, position: int = 0, features: Tensor | None = None) -> Tensor:
        """Joint ids ``[B, T]`` at the positions from ``position`` on, behind a text's features if these
        are given -> ``[B, T, D]``."""
        x = self.embedding(ids)
        if features is not None:
            x = torch.cat([self.text_proj(features.to(x.dtype)), x], dim=1)
        return self.input_dropout(x + self.positions[position : position + x.shape[1]])

    def logits(self, tokens: Tensor, text: Tensor | None = None) -> Tensor:
        """Teacher-forced logits over the joint vocabulary.

        Args:
            tokens: video ids ``[B, L]``, L a multiple of P.
            text: text ids ``[B, text_length]`` of a hybrid model, or features.

        Returns:
            ``[B, L, V]``, entry i of token i; without a text ``[B, L - P, V]``, entry i of token i + P.
        """
        size, ids = self.config.block_size, tokens + self.first_video
        if self.hybrid:
            first = [self.start(text), ids[:, : size - 1]]
            if tokens.shape[1] > size:
                first += [self.repeat(ids[:, size - 1]), ids[:, size:-size]]
            ids = torch.cat(first, dim=1)
        else:
            ids = ids[:, :-size]
        x = self.embed(ids, features=text if self.config.text_dim is not None else None)
        mask = self.mask(x.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, self.config.text_length :]))

    def forward(
        self, tokens: Tensor, text: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of whole clips; without a text the first block is given.

        Args:
            tokens: video ids ``[B, L]``, L a multiple of P.
            text: text ids ``[B, text_length]`` of a hybrid model, or features; training drops some.
            generator: of dropped texts, on the model's device.
        """
        if text is not None and self.training:
            drawn = torch.rand(len(text), generator=generator, device=text.device)
            drop = (drawn < self.config.text_dropout).view(-1, *[1] * (text.ndim - 1))
            text = torch.where(drop, self.null_text(text), text)
        logits = self.logits(tokens, text).float()
        target = tokens[:, -logits.shape[1] :] + self.first_video
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        return loss, {"nll": loss.detach()}

    @torch.no_grad()
    def stream(
        self,
        condition: Tensor,
        generators: Sequence[torch.Generator],
        num_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield video ids ``[B, n]``, n growing, after each step (of a hybrid model ids, then blocks).

        Args: see `stream_joint`, which draws them. Drawn ids that are none of video become the
            nearest that are (logits are not restricted to them).
        """
        settings = (
            num_tokens,
            temperature,
            top_k,
            top_p,
            guidance_scale,
            tokens,
            token_mask,
            noise,
        )
        for ids in self.stream_joint(condition, generators, *settings):
            yield (ids - self.first_video).clamp(0, self.vocab_size - 1)

    @torch.no_grad()
    def stream_joint(
        self,
        condition: Tensor,
        generators: Sequence[torch.Generator],
        num_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """`stream` in ids of the joint vocabulary.

        Args:
            condition: text ids ``[B, text_length]``, text features, or the ids ``[B, k P]`` that a clip begins with,
                which are not yielded.
            generators: one an item.
            num_tokens: to write; default: of a clip, less those given.
            top_k: None takes the configuration's; all ids where that is None.
            guidance_scale: of texts; 1 runs no unconditional half. Both halves are one batch.
            tokens, token_mask: video ids ``[B, n]`` kept where the mask ``[B, n]`` is True.
            noise: Exp(1) draws ``[num_tokens, B, V]`` in place of the generators'.

        Raises:
            InputError: a condition, token or setting that means nothing.
        """
        c = self.config
        self.check_condition(condition)
        batch, size, given = len(condition), c.block_size, condition.shape[1]
        if num_tokens is None:
            num_tokens = c.num_tokens - (0 if self.hybrid else given)
        longest = c.max_positions - (c.text_length if self.hybrid else given - size)
        longest -= longest % size
        if not 1 <= num_tokens <= longest:
            raise InputError(f"This model makes 1 to {longest} tokens, got {num_tokens}.")
        temperature = c.temperature if temperature is None else temperature
        top_k, top_p = top_k or c.top_k, c.top_p if top_p is None else top_p
        scale = c.guidance_scale if guidance_scale is None else guidance_scale
        check_sampling(temperature, top_k, top_p)
        check_guidance(scale)
        check_generators(generators, batch)
        check_given(tokens, token_mask, batch, num_tokens, c.vocab_size)
        guided = scale != 1 and self.hybrid
        if guided:  # Conditional rows, then those of the null text.
            condition = torch.cat([condition, self.null_text(condition)])

        inputs = self.start(condition)
        features = condition if c.text_dim is not None else None
        width = inputs.shape[1] + (0 if features is None else c.text_length)
        length = width + num_tokens + size
        cache = StaticCache(
            c.depth, len(inputs), c.heads, length, c.dim // c.heads, self.dtype, inputs.device
        )
        joint = torch.empty(batch, 0, dtype=torch.int64, device=inputs.device)
        mask, position = self.mask(width), 0
        while joint.shape[1] < num_tokens:
            at = joint.shape[1]
            count = 1 if self.hybrid and at < size else size
            x = self.embed(inputs, position, features)
            width = x.shape[1]
            for layer, block in enumerate(self.blocks):
                x = block(x, mask, cache, layer, position)
            logits = self.head(self.norm(x[:, -count:])).float()
            if guided:
                logits = guide(*logits.chunk(2), scale)
            mask, features, position = None, None, position + width

            if noise is None:
                draws = draw("exponential", logits.shape[1:], generators, logits.device)
            else:
                draws = noise[at : at + count].transpose(0, 1)
            logits = logits[:, : draws.shape[1]]
            flat = (logits.flatten(0, 1), temperature, top_k, top_p, generators)
            new = sample(*flat, draws.flatten(0, 1)).view(batch, -1)
            if tokens is not None and at < tokens.shape[1]:
                kept = tokens[:, at : at + count] + self.first_video
                keep = token_mask[:, at : at + count]
                ahead = slice(kept.shape[1])
                new[:, ahead] = torch.where(keep, kept, new[:, ahead])
            joint = torch.cat([joint, new], dim=1)
            yield joint[:, :num_tokens]
            inputs = new
            if self.hybrid and at + 1 == size:  # The first block is there.
                inputs = self.repeat(new[:, -1])
            if guided:
                inputs = inputs.repeat(2, 1)

    @torch.no_grad()
    def generate(
        self, condition: Tensor, generators: Sequence[torch.Generator], **settings
    ) -> Tensor:
        """The last of `stream`: video ids int64 ``[B, num_tokens]``."""
        for ids in self.stream(condition, generators, **settings):
            last = ids
        return last
