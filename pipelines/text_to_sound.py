"""A caption in, a sound out: caption -> codec tokens -> sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from ..generators.autoregressive.sound import SoundTransformer
from ..modalities.errors import InputError
from ..modalities.text import clean_prompt
from ..tokenizers.base import AudioTokenizer
from .loading import load_folder
from .seeds import item_seeds, token_stream

# The last of a sound is faded out, so that it does not end in a click.
FADE_SECONDS = 0.03


@dataclass
class SoundOutput(BaseOutput):
    """Sounds, each float32 ``[1, n]``, their rate in Hz, tokens int64 ``[Q, T]`` and seeds."""

    sounds: list[Tensor]
    sample_rate: int
    tokens: list[Tensor]
    seeds: list[int]


@dataclass
class SoundProgress:
    """What is there after ``step`` of ``total`` frames; ``output`` is set in the last one."""

    step: int
    total: int
    output: SoundOutput | None = None


class TextToSoundPipeline(DiffusionPipeline):
    """Captions to sounds over the tokens of a codec.

    Example:
        >>> pipe = TextToSoundPipeline.from_pretrained("sound")
        >>> sound = pipe("a plucked guitar playing a C major chord")
        >>> save_audio(sound.sounds[0], sound.sample_rate, "guitar.wav")

    Args:
        codec, generator: the models.
        guidance_scale, temperature, top_k, top_p: defaults of the token sampler.
    """

    model_cpu_offload_seq = "generator->codec"

    def __init__(
        self,
        codec: AudioTokenizer,
        generator: SoundTransformer,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ):
        super().__init__()
        wanted = generator.config
        written = wanted.frame_rate, wanted.num_codebooks, wanted.vocab_size
        read = codec.frame_rate, codec.num_codebooks, codec.vocab_size
        if written != read:
            shape = "{:g} frames a second of {} x {} ids"
            raise InputError(
                f"The generator writes {shape.format(*written)}, the codec reads "
                f"{shape.format(*read)}: they do not fit."
            )
        self.register_modules(codec=codec, generator=generator)
        self.register_to_config(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> TextToSoundPipeline:
        """A shipped model by its plain name, a folder, or a hub id.

        Raises:
            InputError: nothing of that name, or a folder that is not such a pipeline.
        """
        return load_folder(cls, super().from_pretrained, name, **options)

    @property
    def sample_rate(self) -> int:
        return self.codec.sample_rate

    @property
    def max_seconds(self) -> float:
        return self.generator.config.max_seconds

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str],
        seconds: float | None = None,
        num_sounds_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Iterator[SoundProgress]:
        """Like ``__call__``, yielding after each frame; closing the iterator cancels."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_sounds_per_prompt < 1:
            raise InputError(f"Ask for at least 1 sound a prompt, got {num_sounds_per_prompt}.")
        captions = [clean_prompt(each) for each in prompts for _ in range(num_sounds_per_prompt)]
        seeds = item_seeds(generator, len(captions))
        default = self.config
        lengths = self.generator.lengths(captions, seconds)
        total = int(lengths.max())
        ids = []
        for new in self.generator.stream(
            captions,
            lengths,
            [token_stream(seed) for seed in seeds],
            guidance_scale=default.guidance_scale if guidance_scale is None else guidance_scale,
            temperature=default.temperature if temperature is None else temperature,
            top_k=default.top_k if top_k is None else top_k,
            top_p=default.top_p if top_p is None else top_p,
        ):
            ids.append(new)
            if len(ids) < total:
                yield SoundProgress(len(ids), total)
        drawn = zip(torch.stack(ids, dim=2), lengths.tolist(), strict=True)
        tokens = [rows[:, :length] for rows, length in drawn]
        sounds = [self.decode_tokens(each) for each in tokens]
        yield SoundProgress(total, total, SoundOutput(sounds, self.sample_rate, tokens, seeds))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens ``[Q, T]`` -> sound float32 ``[1, n]`` in [-1, 1], faded out at its end."""
        audio = self.codec.decode(tokens[None])[0].float().cpu()
        fade = torch.linspace(1, 0, round(FADE_SECONDS * self.sample_rate))[-audio.shape[-1] :]
        audio[:, -len(fade) :] *= fade
        return audio.clamp(-1, 1)

    def __call__(
        self,
        prompt: str | Sequence[str],
        seconds: float | None = None,
        num_sounds_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> SoundOutput:
        """Make sounds.

        Args:
            prompt: one caption or several.
            seconds: length; default what the model thinks such sounds last.
            num_sounds_per_prompt: variants of each.
            generator: one an item, or one for all.
            callback: is given the frames so far and in all; what it raises ends the work.
            sampling: ``guidance_scale``, ``temperature``, ``top_k``, ``top_p``; default the model's.

        Raises:
            InputError: an empty caption, or a setting that means nothing.
        """
        for progress in self.stream(prompt, seconds, num_sounds_per_prompt, generator, **sampling):
            if callback is not None:
                callback(progress.step, progress.total)
        return progress.output
