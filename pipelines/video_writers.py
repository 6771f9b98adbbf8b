"""One face for all generators of video: the tokens of a clip, alone or after frames that are there."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..generators.autoregressive.larp_ar import LARPGenerator
from ..generators.linear_video.lingen import LinGen
from ..generators.masked.phenaki import Phenaki
from ..generators.next_block.nbp import NBP
from ..modalities.errors import InputError
from ..tokenizers.base import Tokenizer

# What users may set of a generator's ``stream``, where it takes it.
SETTINGS = ("num_steps", "guidance_scale", "temperature", "top_k", "top_p")

VideoGenerator = NBP | Phenaki | LinGen | LARPGenerator


class VideoWriter(ABC):
    """A generator over its tokenizer; it writes one clip at a time.

    Attributes:
        conditions: what it can draw from: "text", "class", or "frames" alone.
        step: frames of a step in time; clips have ``1 + k step``.
        window: frames of the longest clip; None where there is no limit.
        continues: whether a clip can begin with given frames.
        in_order: whether frames come one after the other, each finished.
    """

    conditions: ClassVar[tuple[str, ...]]
    in_order: ClassVar[bool] = False
    continues: bool = True
    window: int | None = None

    def __init__(self, tokenizer: Tokenizer, generator: VideoGenerator):
        self.tokenizer, self.generator = tokenizer, generator
        self.step = tokenizer.temporal_patch_size
        self.check()

    def check(self) -> None:
        """Raise InputError unless the two fit."""
        generator, tokenizer = type(self.generator).__name__, type(self.tokenizer).__name__
        ours, theirs = self.generator.config.vocab_size, self.tokenizer.vocab_size
        if ours != theirs:
            holds = "no ids" if theirs is None else f"ids below {theirs}"
            raise InputError(
                f"{generator} writes ids below {ours}; {tokenizer} decodes {holds}: choose the "
                "tokenizer that the generator was trained on."
            )

    def settings(self) -> dict[str, Any]:
        """What a call may set, with the values that it has otherwise."""
        found = {}
        for name, parameter in inspect.signature(self.generator.stream).parameters.items():
            if name in SETTINGS:
                default = parameter.default
                found[name] = self.generator.config.get(name) if default is None else default
        return found

    def known(self, available: int, most: int) -> int:
        """How many of ``available`` frames a clip goes on from: at most ``most``, and half of it."""
        if not available:
            return 0
        if self.window is not None:
            most = min(most, self.window // 2)
        return 1 + (max(1, min(most, available)) - 1) // self.step * self.step

    def new(self, known: int, left: int) -> int:
        """Frames that one clip adds behind ``known`` ones; the last step may pass ``left``."""
        own = 0 if known else 1
        count = own + math.ceil(max(0, left - own) / self.step) * self.step
        return count if self.window is None else min(count, self.window - known)

    def steps(self, frames: int) -> int:
        """Steps in time of so many frames."""
        return 1 + (frames - 1) // self.step

    def encode(self, frames: Tensor) -> Tensor:
        """Known frames ``[B, 3, n, S, S]`` in [-1, 1] -> what `write` continues."""
        return self.tokenizer.encode(frames)

    @abstractmethod
    def num_yields(self, known: int, new: int, settings: dict[str, Any]) -> int:
        """How often `write` yields."""

    @abstractmethod
    def write(
        self,
        condition: dict[str, Tensor],
        prime: Tensor | None,
        frames: int,
        streams: Sequence[torch.Generator],
        settings: dict[str, Any],
    ) -> Iterator[Tensor]:
        """Yield the tokens of a clip of ``frames`` frames, those of ``prime`` (of `encode`) included."""

    def passes(self, frames: int, settings: dict[str, Any]) -> int:
        """Tokens that go through the generator for a clip of ``frames`` frames."""
        guided = settings.get("guidance_scale") not in (None, 1)
        tokens = self.steps(frames) * self.tokenizer.tokens_per_step
        return tokens * (1 + guided) * (settings.get("num_steps") or 1)

    def decoder(self) -> Callable[[Tensor], Tensor]:
        """A function: the tokens of one growing clip -> its frames so far ``[B, 3, n, S, S]``."""
        return lambda tokens: self.tokenizer.decode(tokens).clamp(-1, 1)


class BlockWriter(VideoWriter):
    """NBP: ids in the order of time, so what is there can be seen."""

    conditions = ("text",)
    in_order = True

    def __init__(self, tokenizer: Tokenizer, generator: NBP):
        super().__init__(tokenizer, generator)
        self.window = 1 + self.step * (generator.num_tokens // tokenizer.tokens_per_step - 1)
        if not generator.hybrid:
            self.conditions = ("frames",)
        elif generator.config.text_dim is None:  # Ids of the names of classes.
            self.conditions = ("class",)

    def num_yields(self, known: int, new: int, settings: dict[str, Any]) -> int:
        per, size = self.tokenizer.tokens_per_step, self.generator.config.block_size
        tokens = per * self.steps(known + new)
        if not self.generator.hybrid:
            return math.ceil((tokens - per * self.steps(known)) / size)
        return min(tokens, size) + math.ceil(max(0, tokens - size) / size)

    def write(self, condition, prime, frames, streams, settings):
        total = self.tokenizer.tokens_per_step * self.steps(frames)
        if not self.generator.hybrid:
            new = total - prime.shape[1]
            for ids in self.generator.stream(prime, streams, num_tokens=new, **settings):
                yield torch.cat([prime, ids], dim=1)
            return
        if prime is not None:
            kept = torch.ones_like(prime, dtype=torch.bool)
            settings = {**settings, "tokens": prime, "token_mask": kept}
        yield from self.generator.stream(
            **condition, generators=streams, num_tokens=total, **settings
        )

    def decoder(self) -> Callable[[Tensor], Tensor]:
        per, tokenizer = self.tokenizer.tokens_per_step, self.tokenizer
        empty = torch.empty(0)
        if not hasattr(tokenizer, "decode_stream"):

            def decode(tokens: Tensor) -> Tensor:
                whole = tokens[:, : tokens.shape[1] // per * per]
                return tokenizer.decode(whole).clamp(-1, 1) if whole.shape[1] else empty

            return decode
        pieces: deque[Tensor] = deque()
        frames: list[Tensor] = []

        def feed() -> Iterator[Tensor]:
            while True:
                yield pieces.popleft()

        stream = tokenizer.decode_stream(feed())

        def decode_new(tokens: Tensor) -> Tensor:
            steps = tokens.shape[1] // per
            for k in range(len(frames), steps):
                pieces.append(tokens[:, k * per : (k + 1) * per])
                frames.append(next(stream).clamp(-1, 1))
            return torch.cat(frames[:steps], dim=2) if steps else empty

        return decode_new


class MaskedWriter(VideoWriter):
    """Phenaki: all ids at once, surer from step to step."""

    conditions = ("text",)

    def __init__(self, tokenizer: Tokenizer, generator: Phenaki):
        super().__init__(tokenizer, generator)
        steps = generator.config.max_tokens // tokenizer.tokens_per_step
        self.window = 1 + self.step * (steps - 1)

    def num_yields(self, known: int, new: int, settings: dict[str, Any]) -> int:
        return settings["num_steps"]

    def write(self, condition, prime, frames, streams, settings):
        grid = (self.steps(frames), *self.tokenizer.grid[1:])
        yield from self.generator.stream(
            **condition, generators=streams, grid=grid, prime=prime, **settings
        )


class FlowWriter(VideoWriter):
    """LinGen: latents out of noise, clips of any length in one go."""

    conditions = ("text",)

    def check(self) -> None:
        ours, theirs = self.generator.config.latent_channels, self.tokenizer.latent_dim
        if ours != theirs:
            holds = "ids" if theirs is None else f"latents of width {theirs}"
            raise InputError(
                f"{type(self.generator).__name__} writes latents of width {ours}; "
                f"{type(self.tokenizer).__name__} decodes {holds}: choose the tokenizer that the "
                "generator was trained on."
            )

    def num_yields(self, known: int, new: int, settings: dict[str, Any]) -> int:
        return settings["num_steps"]

    def write(self, condition, prime, frames, streams, settings):
        side = math.isqrt(self.tokenizer.tokens_per_step)
        if prime is not None:
            prime = prime.movedim(2, 1).unflatten(2, (-1, side, side))
        shape = (self.steps(frames), side, side)
        for latents in self.generator.stream(
            **condition, generators=streams, shape=shape, known=prime, **settings
        ):
            yield latents.flatten(2).movedim(1, 2)


class HolisticWriter(VideoWriter):
    """LARP: ids without places, of which only all together are a clip of one length."""

    conditions = ("class",)

    def __init__(self, tokenizer: Tokenizer, generator: LARPGenerator):
        super().__init__(tokenizer, generator)
        self.step, self.window = 1, tokenizer.num_frames
        self.continues = generator.config.frame_prediction
        if self.continues:
            self.conditions = ("frames",)

    def encode(self, frames: Tensor) -> Tensor:
        return self.tokenizer.encode(self.tokenizer.pad(frames))

    def num_yields(self, known: int, new: int, settings: dict[str, Any]) -> int:
        return self.generator.num_tokens

    def passes(self, frames: int, settings: dict[str, Any]) -> int:
        return self.generator.num_tokens * (1 + (settings["guidance_scale"] != 1))

    def write(self, condition, prime, frames, streams, settings):
        if prime is not None:
            condition = {"condition": prime}
        yield from self.generator.stream(**condition, generators=streams, **settings)

    def decoder(self) -> Callable[[Tensor], Tensor]:
        whole = super().decoder()
        count = self.tokenizer.num_tokens
        return lambda tokens: whole(tokens) if tokens.shape[1] == count else torch.empty(0)


_WRITERS = {
    NBP: BlockWriter,
    Phenaki: MaskedWriter,
    LinGen: FlowWriter,
    LARPGenerator: HolisticWriter,
}


def video_writer(tokenizer: Tokenizer, generator: VideoGenerator) -> VideoWriter:
    """The writer of a generator.

    Raises:
        InputError: a generator of something else, or a tokenizer that does not fit.
    """
    for kind, writer in _WRITERS.items():
        if isinstance(generator, kind):
            return writer(tokenizer, generator)
    known = ", ".join(kind.__name__ for kind in _WRITERS)
    raise InputError(f"{type(generator).__name__} makes no video: use one of {known}.")
