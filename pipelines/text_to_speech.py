"""A text in, speech out: phones -> codec tokens -> sound, sentence by sentence, as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from ..generators.autoregressive.speech import SpeechTransformer
from ..modalities.errors import InputError
from ..modalities.phonemes import Sentence, phonemise
from ..tokenizers.audio.wavtokenizer import WavTokenizer
from .loading import load_folder
from .seeds import check_seed, random_seed, token_stream

# Frames in the first piece of a stream, which should come soon, and in the others.
FIRST_FRAMES, NEXT_FRAMES = 12, 32
# Frames of context before a piece, and by how many it lags.
CONTEXT_FRAMES, LATE_FRAMES = 32, 6
# Sentences begin and end in near silence; this fade takes away what is left of a step.
FADE_SECONDS = 0.008


@dataclass
class Word:
    """A word that has been spoken: where it stands in its sentence, and when it is heard.

    Attributes:
        sentence: number of the sentence.
        text: the written word.
        start, end: in seconds from the beginning of the sound.
    """

    sentence: int
    text: str
    start: float
    end: float


@dataclass
class SpeechChunk:
    """The next piece of a stream.

    Attributes:
        audio: float32 ``[1, n]``.
        sample_rate: in Hz.
        sentence, sentences: the sentence that is being spoken (from 0), and how many there are.
        seconds: of sound so far, this piece included.
        words: those whose sentence begins with this piece, with their times.
    """

    audio: Tensor
    sample_rate: int
    sentence: int
    sentences: int
    seconds: float
    words: list[Word] = field(default_factory=list)


@dataclass
class SpeechOutput(BaseOutput):
    """Sound float32 ``[1, n]``, its rate in Hz, the words with their times, and the seed."""

    audio: Tensor
    sample_rate: int
    words: list[Word]
    seed: int


class TextToSpeechPipeline(DiffusionPipeline):
    """Text to speech over the tokens of one codec.

    Example:
        >>> pipe = TextToSpeechPipeline.from_pretrained("voice")
        >>> speech = pipe("The kettle is boiling.", seed=1)
        >>> save_audio(speech.audio, speech.sample_rate, "kettle.wav")

    Args:
        codec, generator: the models.
        default_voice: speaker where the call names none; empty is the generator's first one.
        guidance_scale, temperature, top_k, top_p: defaults of the token sampler.
    """

    model_cpu_offload_seq = "generator->codec"

    def __init__(
        self,
        codec: WavTokenizer,
        generator: SpeechTransformer,
        default_voice: str = "",
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ):
        super().__init__()
        wanted = generator.config.vocab_size, generator.config.frame_rate
        if wanted != (codec.vocab_size, codec.frame_rate):
            raise InputError(
                f"The generator writes {wanted[1]:g} tokens a second of {wanted[0]} ids, the codec "
                f"reads {codec.frame_rate:g} of {codec.vocab_size}: they do not fit."
            )
        if default_voice:
            generator.speaker_id(default_voice)
        self.register_modules(codec=codec, generator=generator)
        self.register_to_config(
            default_voice=default_voice,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> TextToSpeechPipeline:
        """A shipped model by its plain name, a folder, or a hub id.

        Raises:
            InputError: nothing of that name, or a folder that is not such a pipeline.
        """
        return load_folder(cls, super().from_pretrained, name, **options)

    @property
    def voices(self) -> list[str]:
        return list(self.generator.config.speakers)

    @property
    def sample_rate(self) -> int:
        return self.codec.sample_rate

    @torch.no_grad()
    def stream(
        self,
        text: str,
        voice: str | None = None,
        speed: float = 1.0,
        seed: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Iterator[SpeechChunk]:
        """Yield the sound piece by piece; closing the iterator cancels.

        The first piece comes after some tokens of the first sentence, not after its end. What has
        been yielded is forgotten: a long text needs no more memory than a short one.

        Args:
            text: English.
            voice: one of `voices`.
            speed: 1 is natural, 2 twice as fast; 0.25 to 4.
            seed: 0 to 4294967295; default a random one.
            guidance_scale, temperature, top_k, top_p: of the token sampler; default the model's.

        Raises:
            InputError: nothing that can be spoken, an unknown voice, or a setting that means nothing.
        """
        sentences = phonemise(text)
        voice = voice or self.config.default_voice or self.voices[0]
        speaker = torch.tensor([self.generator.speaker_id(voice)], device=self.device)
        seed = random_seed() if seed is None else check_seed(seed)
        default = self.config
        sampling = {
            "guidance_scale": default.guidance_scale if guidance_scale is None else guidance_scale,
            "temperature": default.temperature if temperature is None else temperature,
            "top_k": default.top_k if top_k is None else top_k,
            "top_p": default.top_p if top_p is None else top_p,
        }
        seconds = 0.0
        for number, sentence in enumerate(sentences):
            plan = self.generator.plan([sentence.phones], speaker, speed)
            words = word_times(
                sentence, plan.durations[0].tolist(), self.codec.frame_rate, number, seconds
            )
            # A stream of its own: a sentence sounds the same whatever stands before it.
            streams = [token_stream((seed << 20) + number)]
            drawn = self.generator.stream(plan, speaker, streams, **sampling)
            for audio in self.decoded(drawn, int(plan.lengths)):
                seconds += audio.shape[-1] / self.sample_rate
                yield SpeechChunk(audio, self.sample_rate, number, len(sentences), seconds, words)
                words = []

    def decoded(self, drawn: Iterator[Tensor], frames: int) -> Iterator[Tensor]:
        """Ids ``[1]`` of one frame after the other -> pieces ``[1, n]``, faded at both ends.

        The codec's decoder hears what is around a frame. So each piece is decoded with the frames
        before it, and some frames late: their sound is decoded again with the next piece, and faded
        from one to the other.
        """
        fade = torch.linspace(0, 1, round(FADE_SECONDS * self.sample_rate), device=self.device)
        ids: list[Tensor] = []
        done, wanted, tail = 0, FIRST_FRAMES, None
        for new in drawn:
            ids.append(new)
            last = len(ids) == frames
            if len(ids) - done < wanted + LATE_FRAMES and not last:
                continue
            begin = max(0, done - CONTEXT_FRAMES)
            window = torch.stack(ids[begin:], dim=-1)[:, None]
            audio = self.codec.decode(window)[0, :, (done - begin) * self.codec.hop :].float()
            if tail is None:
                audio[:, : len(fade)] *= fade
            else:
                mix = torch.linspace(0, 1, tail.shape[-1], device=tail.device)
                audio[:, : len(mix)] = tail.lerp(audio[:, : len(mix)], mix)
            if last:
                audio[:, -len(fade) :] *= fade.flip(0)
            else:
                audio, tail = audio.split(
                    [audio.shape[-1] - LATE_FRAMES * self.codec.hop, LATE_FRAMES * self.codec.hop],
                    -1,
                )
            done, wanted = len(ids) - LATE_FRAMES, NEXT_FRAMES
            yield audio.clamp(-1, 1).cpu()

    def __call__(
        self,
        text: str,
        voice: str | None = None,
        speed: float = 1.0,
        seed: int | None = None,
        callback: Callable[[SpeechChunk], None] | None = None,
        **sampling: Any,
    ) -> SpeechOutput:
        """All of `stream` in one piece.

        Args:
            callback: is given every piece as it comes; what it raises ends the work.
        """
        seed = random_seed() if seed is None else check_seed(seed)
        pieces, words = [], []
        for chunk in self.stream(text, voice, speed, seed, **sampling):
            pieces.append(chunk.audio)
            words += chunk.words
            if callback is not None:
                callback(chunk)
        return SpeechOutput(torch.cat(pieces, dim=-1), self.sample_rate, words, seed)


def word_times(
    sentence: Sentence, durations: list[int], frame_rate: float, number: int, start: float
) -> list[Word]:
    """When each word of a sentence is heard, by the frames of its phones.

    Args:
        start: of the sentence, in seconds.
    """
    times: dict[int, tuple[float, float]] = {}
    frame = 0
    for word, duration in zip(sentence.word_of, durations, strict=False):
        begin, frame = frame, frame + duration
        if word >= 0:
            first = times.get(word, (begin, 0))[0]
            times[word] = (first, frame)
    return [
        Word(number, sentence.words[word], start + a / frame_rate, start + b / frame_rate)
        for word, (a, b) in times.items()
    ]
