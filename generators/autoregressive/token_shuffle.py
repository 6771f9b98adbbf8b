"""Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models (Ma et al., 2025).

Paper: arXiv 2504.17789. No code or weights are published; what the paper leaves open is marked so.

Token vectors carry far less than a language model's width holds. So the s x s tokens of a window share
one position of the transformer: each is compressed to 1 / s^2 of the width, and the window is laid along
the channels. On the output side a position is taken apart again, and all its ids are drawn at once.
`TokenShuffle` and `TokenUnshuffle` go around any autoregressive transformer, over lines, pictures or
clips; `TokenShuffleAR` is the paper's model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import ImageGenerator
from ..cache import StaticCache
from ..layers.mlp import GatedMLP
from ..layers.rope import Rope, RopeAttention, rope_tables
from ..sampling import check_generators, check_given, check_sampling, draw, guide, sample
from ..schedules import check_guidance, guidance_weight


def window_places(grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """Which tokens share a window; windows, and the tokens in each, in raster order.

    Args:
        grid: sides of the grid, e.g. (h, w) or (t, h, w).
        window: sides of a window; those at the end of an axis may stick out.

    Returns:
        int64 ``[windows, size]``: places in the raster, ``prod(grid)`` outside of the grid.

    Raises:
        InputError: different numbers of axes, or a side below 1.
    """
    if len(grid) != len(window) or min(*grid, *window) < 1:
        raise InputError(
            f"A window has one side of 1 or more for each axis of the grid {tuple(grid)}, got "
            f"{tuple(window)}."
        )
    count, axes = prod(grid), len(grid)
    beyond = [p for side, w in zip(grid, window, strict=True) for p in (-side % w, 0)]
    places = F.pad(torch.arange(count).view(*grid), beyond[::-1], value=count)
    for axis, side in enumerate(window):
        places = places.unflatten(2 * axis, (-1, side))
    places = places.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2))
    return places.flatten(axes).flatten(0, axes - 1)


def group(x: Tensor, places: Tensor) -> Tensor:
    """``[B, N, ...]`` -> windows ``[B, windows, size, ...]``; zeros outside of the grid."""
    return torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)[:, places]


def ungroup(x: Tensor, places: Tensor, count: int) -> Tensor:
    """The inverse of `group`: the ``count`` tokens of the grid."""
    return x.flatten(1, 2)[:, places.flatten().argsort(stable=True)[:count]]


class ResidualMLP(nn.Module):
    """``x + MLP(LayerNorm(x))``; the norm in front and the hidden width D are our choice."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, dim)
        self.fc2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class _Windows(nn.Module):
    """A window of one token changes nothing and has no weights."""

    def __init__(self, dim: int, window: Sequence[int], num_blocks: int):
        super().__init__()
        self.window, self.size = tuple(window), prod(window)
        if dim % self.size:
            raise InputError(
                f"A width of {dim} cannot be shared by the {self.size} tokens of a window "
                f"{self.window}: choose a multiple."
            )
        count = num_blocks if self.size > 1 else 0
        self.blocks = nn.Sequential(*(ResidualMLP(dim) for _ in range(count)))


class TokenShuffle(_Windows):
    """Windows of tokens -> one vector each (section 3.2).

    Args:
        dim: width of a token and of a fused one; a multiple of the window's size.
        window: its sides along the axes of the grid.
        num_blocks: of MLPs behind the shuffle.
    """

    def __init__(self, dim: int, window: Sequence[int] = (2, 2), num_blocks: int = 2):
        super().__init__(dim, window, num_blocks)
        self.compress = Linear(dim, dim // self.size) if self.size > 1 else nn.Identity()

    def fuse(self, x: Tensor) -> Tensor:
        """Windows ``[B, n, size, D]`` -> ``[B, n, D]``."""
        return self.blocks(self.compress(x).flatten(2))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens of a grid in raster order ``[B, N, D]`` -> ``[B, windows, D]``."""
        return self.fuse(group(x, window_places(grid, self.window).to(x.device)))


class TokenUnshuffle(_Windows):
    """One vector a window -> its tokens: the mirror of `TokenShuffle`."""

    def __init__(self, dim: int, window: Sequence[int] = (2, 2), num_blocks: int = 2):
        super().__init__(dim, window, num_blocks)
        self.expand = Linear(dim // self.size, dim) if self.size > 1 else nn.Identity()

    def split(self, x: Tensor) -> Tensor:
        """``[B, n, D]`` -> windows ``[B, n, size, D]``."""
        return self.expand(self.blocks(x).unflatten(2, (self.size, -1)))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``[B, windows, D]`` -> tokens of the grid in raster order ``[B, N, D]``."""
        places = window_places(grid, self.window).to(x.device)
        return ungroup(self.split(x), places, prod(grid))


class Block(nn.Module):
    """As in LLaMA (arXiv 2302.13971): RMSNorm, rotary attention, SwiGLU."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.attn = RopeAttention(dim, heads, qkv_bias=False)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = GatedMLP(dim, mlp_hidden, F.silu)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, mask, cache, layer, position)
        return x + self.mlp(self.norm2(x))


class TokenShuffleAR(ImageGenerator, ModelMixin, ConfigMixin):
    """Text ids -> image ids. The defaults are the paper's 2.7B model at 1024 pixels.

    A sequence is [text, begin of image, fused image tokens]; a position predicts all ids of the next
    fused token. Texts are sequences of ids of any text tokenizer; a class label is a text of one id.

    Args:
        vocab_size: ids of the image tokenizer.
        grid: its tokens along the axes, e.g. (h, w).
        window: tokens that share a position, along the same axes; all 1 is a plain model.
        text_vocab_size: ids of the text tokenizer.
        num_mlp_blocks: on either side of the transformer.
        prompt_dropout: how often training replaces the text by the empty one.
        z_loss: weight of the squared log-sum-exp of the logits (the paper's third stage uses one).
        guidance_scale: of sampling, unless `stream` is told another.
    """

    condition = "text"
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        grid: Sequence[int] = (64, 64),
        window: Sequence[int] = (2, 2),
        text_vocab_size: int = 32000,
        dim: int = 3072,
        depth: int = 20,
        heads: int = 24,
        mlp_hidden: int = 8192,
        num_mlp_blocks: int = 2,
        prompt_dropout: float = 0.1,
        z_loss: float = 0.0,
        guidance_scale: float = 7.5,
    ):
        super().__init__()
        self.register_buffer("places", window_places(grid, window), persistent=False)
        # Text ids, begin of image, image ids.
        self.embedding = nn.Embedding(text_vocab_size + 1 + vocab_size, dim)
        self.shuffle = TokenShuffle(dim, window, num_mlp_blocks)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.unshuffle = TokenUnshuffle(dim, window, num_mlp_blocks)
        self.head = Linear(dim, vocab_size, bias=False)

    @property
    def num_tokens(self) -> int:
        return prod(self.config.grid)

    def num_yields(self, num_tokens: int | None = None, num_steps: int | None = None) -> int:
        return len(self.places)

    def text_condition(
        self, tower: nn.Module, texts: Sequence[str], null_texts: Sequence[str]
    ) -> dict[str, list[list[int]]]:
        """Ids of a tower's tokenizer. The null text is always the empty one."""
        ids = tower.tokenize(texts)
        # The end of a text has the highest id; zeros follow.
        ends = ids.argmax(1).tolist()
        return {"prompts": [row[: end + 1] for row, end in zip(ids.tolist(), ends, strict=True)]}

    def init_weights(self) -> None:
        """Normal 0.02, biases zero; the windows' MLPs begin as nothing, close to a plain model."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)
        for block in (*self.shuffle.blocks, *self.unshuffle.blocks):
            nn.init.zeros_(block.fc2.weight)

    def embed_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Texts -> inputs ``[B, L + 1, D]`` and bool ``[B, L + 1]``, True = there.

        Short texts stand at the end, right before the begin of the image.

        Raises:
            InputError: an id that is none.
        """
        start = self.config.text_vocab_size
        wrong = [i for prompt in prompts for i in prompt if not 0 <= i < start]
        if wrong:
            raise InputError(f"Text ids must lie in 0 to {start - 1}, got {wrong[0]}.")
        longest = max(map(len, prompts))
        rows = [[start] * (longest - len(prompt)) + [*prompt, start] for prompt in prompts]
        missing = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=self.device)
        valid = torch.arange(longest + 1, device=self.device) >= missing
        return self.embedding(torch.tensor(rows, device=self.device)), valid

    def embed_windows(self, ids: Tensor, places: Tensor) -> Tensor:
        """Ids ``[B, n, size]`` of windows at ``[n, size]`` -> ``[B, n, D]``."""
        x = self.embedding(self.config.text_vocab_size + 1 + ids)
        return self.shuffle.fuse(x * (places < self.num_tokens)[..., None])

    def to_logits(self, x: Tensor) -> Tensor:
        """``[B, n, D]`` -> float32 ``[B, n, size, V]`` of the ids of the windows that follow."""
        return self.head(self.unshuffle.split(self.norm(x))).float()

    def rope(self, length: int) -> Rope:
        positions = torch.arange(length, device=self.device)[:, None]
        return rope_tables(positions, self.config.dim // self.config.heads)

    def logits(self, tokens: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Teacher-forced logits float32 ``[B, windows, size, V]`` of ids ``[B, num_tokens]``."""
        text, valid = self.embed_prompts(prompts)
        image = self.embed_windows(group(tokens, self.places), self.places)
        x = torch.cat([text, image[:, :-1]], dim=1)
        mask = causal_mask(F.pad(valid, (0, image.shape[1] - 1), value=True))
        rope = self.rope(x.shape[1])
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.to_logits(x[:, text.shape[1] - 1 :])

    def forward(
        self,
        tokens: Tensor,
        prompts: Sequence[Sequence[int]],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the image ids.

        Args:
            tokens: ids ``[B, num_tokens]`` in raster order.
            prompts: text ids of each item; in training some are dropped.
            generator: of dropped prompts, on the CPU.
        """
        if self.training:
            kept = torch.rand(len(prompts), generator=generator) >= self.config.prompt_dropout
            prompts = [p if keep else [] for p, keep in zip(prompts, kept.tolist(), strict=True)]
        logits = ungroup(self.logits(tokens, prompts), self.places, self.num_tokens).flatten(0, 1)
        nll = F.cross_entropy(logits, tokens.flatten())
        z = logits.logsumexp(-1).square().mean()
        return nll + self.config.z_loss * z, {"nll": nll.detach(), "z": z.detach()}

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        generators: Sequence[torch.Generator],
        guidance_scale: float | None = None,
        guidance_schedule: str = "half-linear",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, num_tokens]`` in raster order after every window; those to come are 0.

        Args:
            prompts: text ids of each item.
            generators: one an item.
            guidance_scale: of the logits, against the empty text; 1 runs no unconditional half.
            guidance_schedule: over the windows; see `guidance_weight`.
            tokens, token_mask: ids ``[B, num_tokens]`` kept where the mask is True.

        Raises:
            InputError: a text, token or setting that means nothing.
        """
        config = self.config
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        batch, (count, size) = len(prompts), self.places.shape
        check_sampling(temperature, top_k, top_p)
        check_guidance(scale, guidance_schedule)
        check_generators(generators, batch)
        check_given(tokens, token_mask, batch, self.num_tokens, config.vocab_size)
        if tokens is not None:
            missing = (0, self.num_tokens - tokens.shape[1])
            given, kept = (group(F.pad(t, missing), self.places) for t in (tokens, token_mask))

        halves = 2 if scale != 1 else 1
        x, valid = self.embed_prompts([*prompts, *[[]] * (batch * (halves - 1))])
        start = x.shape[1]
        mask, seen = causal_mask(valid), F.pad(valid, (0, count), value=True)[:, None, None]
        cos, sin = self.rope(start + count)
        cache = StaticCache(
            len(self.blocks),
            len(x),
            config.heads,
            start + count,
            config.dim // config.heads,
            x.dtype,
            x.device,
        )
        ids = torch.zeros(batch, count, size, dtype=torch.int64, device=x.device)
        position = 0
        for window in range(count):
            here = slice(position, position + x.shape[1])
            for layer, block in enumerate(self.blocks):
                x = block(x, (cos[here], sin[here]), mask, cache, layer, position)
            logits = self.to_logits(x[:, -1:])[:, 0]
            if scale != 1:
                weight = guidance_weight(guidance_schedule, scale, window / count)
                logits = guide(*logits.chunk(2), weight)
            # The ids of a window are independent of each other, given the position before.
            noise = draw("exponential", logits.shape[1:], generators, x.device).flatten(0, 1)
            new = sample(logits.flatten(0, 1), temperature, top_k, top_p, generators, noise)
            new = new.view(batch, size)
            if tokens is not None:
                new = torch.where(kept[:, window], given[:, window], new)
            ids[:, window] = new
            yield ungroup(ids, self.places, self.num_tokens)
            position = here.stop
            mask = seen[..., : position + 1]
            x = self.embed_windows(new[:, None], self.places[window : window + 1])
            x = x.repeat(halves, 1, 1)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], generators: Sequence[torch.Generator], **settings
    ) -> Tensor:
        """All of `stream`: ids int64 ``[B, num_tokens]``."""
        for drawn in self.stream(prompts, generators, **settings):
            ids = drawn
        return ids


def causal_mask(valid: Tensor) -> Tensor:
    """What is there ``[B, T]`` -> who sees whom, bool ``[B, 1, T, T]``.

    What is missing sees itself: a row that sees nothing would be no number.
    """
    length = valid.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=valid.device)
    own = torch.eye(length, dtype=torch.bool, device=valid.device)
    return ((valid[:, None] & square.tril()) | own)[:, None]
