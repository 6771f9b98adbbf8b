"""SoundTransformer: a caption to codec tokens.

This project's own model: the caption's encoding, with the time since the start and the time to the end,
stands beside every step of a `frames.FrameTransformer`. The length is known before the first token:
predicted from the caption, or given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...modalities.errors import InputError
from ..conditioning.words import WordEncoder, pooled
from ..layers.rope import rope_tables
from .frames import Block, FrameTransformer

# Sines and cosines of a time, with periods of 0.04 to 40 seconds.
TIME_FEATURES = 32


class SoundTransformer(ModelMixin, ConfigMixin):
    """Caption and length -> tokens of a codec.

    Args:
        words: of the captions that it was trained on.
        vocab_size, num_codebooks, frame_rate: of the codec.
        max_seconds: longest sound.
        dim, heads, mlp_hidden: of both transformers.
        text_depth, depth: blocks over words and over frames.
        window: frames that the decoder looks back on.
        dropout, token_dropout, history_dropout: in training.
    """

    @register_to_config
    def __init__(
        self,
        words: Sequence[str],
        vocab_size: int = 4096,
        frame_rate: float = 75.0,
        max_seconds: float = 10.0,
        dim: int = 256,
        heads: int = 4,
        mlp_hidden: int = 640,
        text_depth: int = 2,
        depth: int = 6,
        window: int = 192,
        dropout: float = 0.1,
        token_dropout: float = 0.1,
        history_dropout: float = 0.0,
        num_codebooks: int = 1,
    ):
        super().__init__()
        self.word_encoder = WordEncoder(words, dim)
        self.encoder = nn.ModuleList(
            Block(dim, heads, mlp_hidden, dropout) for _ in range(text_depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.length_head = nn.Linear(dim, 1)
        self.time = nn.Linear(2 * TIME_FEATURES, dim)
        self.decoder = FrameTransformer(
            vocab_size,
            dim,
            depth,
            heads,
            mlp_hidden,
            window,
            dropout,
            token_dropout,
            history_dropout,
            num_codebooks,
        )

    def init_weights(self) -> None:
        """Normal 0.02; projections into the residual stream are scaled by depth (GPT-2)."""
        for blocks in (self.encoder, self.decoder.blocks):
            for name, parameter in blocks.named_parameters():
                if parameter.ndim >= 2:
                    residual = name.endswith(("proj.weight", "fc2.weight"))
                    std = 0.02 / (2 * len(blocks)) ** 0.5 if residual else 0.02
                    nn.init.normal_(parameter, std=std)
        for module in (self.length_head, self.decoder.embedding, self.decoder.head):
            nn.init.normal_(module.weight, std=0.02)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> ``[B, dim]``; the empty one is the null caption of guidance."""
        x, mask = self.word_encoder(captions)
        positions = torch.arange(x.shape[1], device=x.device)[:, None]
        rope = rope_tables(positions, self.config.dim // self.config.heads)
        for block in self.encoder:
            x = block(x, rope, mask[:, None, None])
        return pooled(self.norm(x), mask)

    def log_frames(self, text: Tensor) -> Tensor:
        """``[B, dim]`` -> log of the number of frames ``[B]``."""
        return self.length_head(text)[:, 0].float()

    def condition(self, text: Tensor, lengths: Tensor, frames: int) -> Tensor:
        """Text ``[B, dim]`` and frames of each item ``[B]`` -> ``[B, frames + Q - 1, dim]``."""
        steps = frames + self.config.num_codebooks - 1
        now = torch.arange(steps, device=text.device).expand(len(text), -1)
        left = (lengths[:, None] - now).clamp(min=0)
        times = torch.stack([now, left], dim=-1) / self.config.frame_rate
        periods = torch.logspace(
            math.log10(0.04), math.log10(40.0), TIME_FEATURES // 2, device=text.device
        )
        angles = 2 * math.pi * times[..., None] / periods
        features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
        return text[:, None] + self.time(features.to(text.dtype))

    def forward(
        self, tokens: Tensor, lengths: Tensor, captions: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the tokens plus the L1 distance of the logarithm of the length.

        Args:
            tokens: ids ``[B, Q, T]``.
            lengths: frames of each item ``[B]``; what is behind them does not count.
            captions: of each item; empty ones train guidance and no length.

        Returns:
            the loss, and values to report: "nll" and "coarse", in nats a token of all codebooks and
            of the first.
        """
        text = self.encode(captions)
        named = torch.tensor([bool(caption) for caption in captions], device=text.device)
        wrong = (self.log_frames(text) - lengths.float().log()).abs()
        length = (wrong * named).sum() / named.sum().clamp(min=1)
        condition = self.condition(text, lengths, tokens.shape[-1])
        logits = self.decoder.logits(tokens, lengths, condition).float()
        inside = torch.arange(tokens.shape[-1], device=tokens.device) < lengths[:, None]
        nll = nn.functional.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none")
        nll = nll.transpose(0, 1)[:, inside].mean(1)
        loss = nll.mean()
        parts = {"nll": loss.detach(), "coarse": nll[0].detach(), "length": length.detach()}
        return loss + length, parts

    @torch.no_grad()
    def lengths(self, captions: Sequence[str], seconds: float | None = None) -> Tensor:
        """Frames of each sound ``[B]``: as long as such sounds are, or as asked for.

        Raises:
            InputError: seconds that are not above 0 and up to ``max_seconds``.
        """
        longest = self.config.max_seconds
        if seconds is None:
            frames = self.log_frames(self.encode(captions)).exp().round().long()
            return frames.clamp(1, int(longest * self.config.frame_rate))
        if not 0 < seconds <= longest:
            raise InputError(
                f"A sound lasts more than 0 and up to {longest:g} seconds, got {seconds}."
            )
        frames = max(1, round(seconds * self.config.frame_rate))
        return torch.full((len(captions),), frames, device=self.device)

    @torch.no_grad()
    def stream(
        self,
        captions: Sequence[str],
        lengths: Tensor,
        generators: Sequence[torch.Generator],
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Iterator[Tensor]:
        """Yield the ids ``[B, Q]`` of frame after frame, ``vocab_size`` behind an item's length.

        Args:
            lengths: frames of each item ``[B]``.
            generators: one an item.
            guidance_scale: 1 runs no unconditional half.

        Raises:
            InputError: a setting that means nothing.
        """
        frames = int(lengths.max())
        condition = self.condition(self.encode(captions), lengths, frames)
        null = self.condition(self.encode([""] * len(captions)), lengths, frames)
        yield from self.decoder.stream(
            condition, lengths, generators, guidance_scale, null, temperature, top_k, top_p
        )

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        generators: Sequence[torch.Generator],
        seconds: float | None = None,
        **sampling,
    ) -> list[Tensor]:
        """All of `stream`: the ids int64 ``[Q, T]`` of each item."""
        lengths = self.lengths(captions, seconds)
        ids = torch.stack(list(self.stream(captions, lengths, generators, **sampling)), dim=2)
        return [rows[:, :length] for rows, length in zip(ids, lengths.tolist(), strict=True)]
