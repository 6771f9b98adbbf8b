"""Lyrics and a description in, a song out: text -> codec tokens of one or two tracks -> sound."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor

from ..generators.autoregressive.songgen import (
    FRAME_RATE,
    VOICE_RATE,
    SongGen,
    encode_lyrics,
    encode_voice,
)
from ..generators.conditioning.mert import VoiceMERT
from ..generators.conditioning.t5 import TextT5
from ..modalities.errors import InputError
from ..modalities.text import clean_prompt
from ..tokenizers.audio.transformers_codecs import XcodecTokenizer
from ..tokenizers.auto import AutoTokenizer
from ..weights.loading import (
    find_files,
    licence_notice,
    load_published,
    read_json,
    read_state_dict,
)
from ..weights.registry import ModelInfo, find_model, resolve_model
from .audio_reconstruction import read_recording
from .loading import load_folder
from .seeds import check_seed, random_seed, token_stream

LYRICS_FILE = "lyrics_tokenizer.json"
# The vocabulary of the published checkpoints' lyrics (Coqui Public Model License).
VOICE_BPE = "coqui/XTTS-v2:vocab.json"
MERT_CONFIG = "m-a-p/MERT-v1-330M:config.json"
MAX_LYRICS_CHARACTERS = 2_000
DEFAULT_SECONDS = 30.0


@dataclass
class SongOutput(BaseOutput):
    """A song.

    Attributes:
        audio: float32 ``[1, n]`` in [-1, 1]: the sum of the tracks.
        tracks: each track's sound ``[1, n]``, "mixed", or "vocal" and "accompaniment".
        sample_rate: in Hz.
        tokens: each track's codes int64 ``[Q, frames]``.
        seed: it was drawn with.
    """

    audio: Tensor
    tracks: dict[str, Tensor]
    sample_rate: int
    tokens: dict[str, Tensor]
    seed: int


@dataclass
class SongProgress:
    """What is there after ``step`` of at most ``total`` steps; ``output`` is set in the last one."""

    step: int
    total: int
    output: SongOutput | None = None


class TextToSongPipeline(DiffusionPipeline):
    """Lyrics to songs over the tokens of one codec.

    Example:
        >>> pipe = TextToSongPipeline.from_pretrained("songgen-mixed-pro")
        >>> song = pipe("Morning light\\nover the hill", "a calm folk song, female voice", seed=1)
        >>> save_audio(song.audio, song.sample_rate, "song.wav")

    Args:
        codec, generator, text_tower: the models.
        voice_tower: hears the voice that is to sing; None: the model sings in voices of its own.
        lyrics_tokenizer: reads the lyrics.
        temperature, top_k, top_p: defaults of the token sampler.
    """

    model_cpu_offload_seq = "text_tower->voice_tower->generator->codec"
    _optional_components: ClassVar[list[str]] = ["voice_tower"]

    def __init__(
        self,
        codec: XcodecTokenizer,
        generator: SongGen,
        text_tower: TextT5,
        voice_tower: VoiceMERT | None = None,
        lyrics_tokenizer: TextTokenizer | None = None,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
    ):
        super().__init__()
        wants = generator.config
        form = (wants.num_codebooks, wants.codebook_size, FRAME_RATE)
        found = (codec.num_codebooks, codec.vocab_size, codec.frame_rate)
        if form != found:
            raise InputError(
                "Generator and codec do not fit: codebooks, ids of each and frames a second are "
                f"{form} of the one, {found} of the other."
            )
        if text_tower.text_dim != wants.text_dim:
            raise InputError(
                f"The generator reads text features of width {wants.text_dim}, the text tower makes "
                f"{text_tower.text_dim}: they do not fit."
            )
        if voice_tower is not None:
            form = (wants.voice_layers, wants.voice_dim)
            found = (voice_tower.num_states, voice_tower.voice_dim)
            if form != found:
                raise InputError(
                    "Generator and voice tower do not fit: layers and their width are "
                    f"{form} of the one, {found} of the other."
                )
        if lyrics_tokenizer is None:
            raise InputError("A model that sings needs the tokenizer of its lyrics: pass it.")
        if lyrics_tokenizer.get_vocab_size() > wants.lyrics_vocab:
            raise InputError(
                f"The lyrics' tokenizer has {lyrics_tokenizer.get_vocab_size()} ids, the generator "
                f"reads {wants.lyrics_vocab}: they do not fit."
            )
        self.lyrics_tokenizer = lyrics_tokenizer
        self.register_modules(
            codec=codec, generator=generator, text_tower=text_tower, voice_tower=voice_tower
        )
        self.register_to_config(temperature=temperature, top_k=top_k, top_p=top_p)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        files: str | Path | None = None,
        voice: bool = False,
        **options: Any,
    ) -> TextToSongPipeline:
        """A published checkpoint with the models beside it, a folder, or the hub id of a saved pipeline.

        Args:
            files: folder with the published files of the generator; default: the hub's cache, then a
                download.
            voice: load what hears a voice too, of a published checkpoint (a saved pipeline has it or
                not).
            options: parts in place of the published ones, ``codec=`` (also by name or folder),
                ``text_tower=``, ``voice_tower=``, ``lyrics_tokenizer=``; or others of diffusers'
                ``from_pretrained``.

        Raises:
            InputError: nothing of that name, damaged files, or parts that do not fit each other.
        """
        info = find_model(str(name))
        if info is not None and not info.shipped and (files is not None or not Path(name).is_dir()):
            if info.model_class() is not SongGen:
                raise InputError(f'"{info.name}" is a {info.task} model, not text-to-song.')
            pipeline = cls(**_published_parts(info, files, voice, options), **options)
            pipeline.name = str(name)
            return pipeline
        path = resolve_model(name)
        if "lyrics_tokenizer" not in options:
            options["lyrics_tokenizer"] = _saved_tokenizer(path)
        return load_folder(cls, super().from_pretrained, name, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        super().save_pretrained(folder, **options)
        self.lyrics_tokenizer.save(str(Path(folder) / LYRICS_FILE), pretty=False)

    @property
    def sample_rate(self) -> int:
        return self.codec.sample_rate

    @property
    def tracks(self) -> tuple[str, ...]:
        """Names of the tracks of a song."""
        return self.generator.tracks

    @property
    def max_seconds(self) -> float:
        """The longest song; what is published was trained on up to 30 seconds."""
        config = self.generator.config
        return (config.max_positions // self._turns - config.num_codebooks) / FRAME_RATE

    @property
    def _turns(self) -> int:
        """Columns of the sequence that a frame takes."""
        return 2 if self.generator.config.pattern.startswith("interleaving") else 1

    @torch.no_grad()
    def stream(
        self,
        lyrics: str,
        description: str,
        voice: str | Path | bytes | BinaryIO | tuple[Tensor, int] | None = None,
        seconds: float | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        project_text: str = "auto",
    ) -> Iterator[SongProgress]:
        """Like ``__call__``, yielding after each step; closing the iterator cancels."""
        condition = self._condition(lyrics, description, voice)
        seed = random_seed() if seed is None else check_seed(seed)
        codebooks, longest = self.generator.config.num_codebooks, self.max_seconds
        seconds = min(DEFAULT_SECONDS, longest) if seconds is None else seconds
        if not codebooks / FRAME_RATE <= seconds <= longest:
            raise InputError(
                f"A song of this model takes {codebooks / FRAME_RATE:g} to {longest:g} seconds, got "
                f"{seconds:g}."
            )
        # A start column, and the delay of the last codebook.
        columns = (int(seconds * FRAME_RATE) + codebooks) * self._turns
        default = self.config
        sequence = None
        for sequence in self.generator.stream(
            *condition[:4],
            [token_stream(seed)],
            *condition[4:],
            max_length=columns,
            temperature=default.temperature if temperature is None else temperature,
            top_k=default.top_k if top_k is None else top_k,
            top_p=default.top_p if top_p is None else top_p,
            project_text=project_text,
        ):
            yield SongProgress(sequence.shape[-1] - 1, columns)
        tokens = self.generator.codes(sequence)[0]
        if not all(codes.shape[1] for codes in tokens.values()):
            raise InputError(f"With the seed {seed} this model ended at once: take another seed.")
        audio, tracks = self.decode_tokens(tokens)
        tokens = {name: codes.cpu() for name, codes in tokens.items()}
        yield SongProgress(
            columns, columns, SongOutput(audio, tracks, self.sample_rate, tokens, seed)
        )

    def decode_tokens(self, tokens: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes ``[Q, frames]`` of each track -> their sum and each track, float32 ``[1, n]``.

        All are as long as the shortest, and one scale keeps the loudest in [-1, 1].
        """
        tracks = {
            name: self.codec.decode(codes[None])[0].float().cpu() for name, codes in tokens.items()
        }
        length = min(track.shape[-1] for track in tracks.values())
        tracks = {name: track[:, :length] for name, track in tracks.items()}
        audio = torch.stack(list(tracks.values())).sum(0)
        scale = max(1.0, *(float(each.abs().max()) for each in (audio, *tracks.values())))
        return audio / scale, {name: track / scale for name, track in tracks.items()}

    def __call__(
        self,
        lyrics: str,
        description: str,
        voice: str | Path | bytes | BinaryIO | tuple[Tensor, int] | None = None,
        seconds: float | None = None,
        seed: int | None = None,
        callback: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> SongOutput:
        """Make a song.

        Args:
            lyrics: English; each line is sung as one.
            description: of the music and the voice.
            voice: a recording of a clean voice that is to sing, of which the first 3 seconds are heard:
                a path, bytes, an open file, or samples ``[C, T]`` and their rate.
            seconds: at most so long; default 30. The model may end sooner.
            seed: 0 to 4294967295; default a random one. Seeds differ much: try several.
            callback: is given the steps so far and at most; what it raises ends the work.
            sampling: ``temperature``, ``top_k``, ``top_p``, default the model's; ``project_text``, see
                `SongGen.stream`.

        Raises:
            InputError: no lyrics or description, a voice that cannot be read or heard, or a setting
                that means nothing.
        """
        for progress in self.stream(lyrics, description, voice, seconds, seed, **sampling):
            if callback is not None:
                callback(progress.step, progress.total)
        return progress.output

    def _condition(self, lyrics: str, description: str, voice: Any) -> list[Tensor]:
        """Arguments of `SongGen.condition`."""
        if len(lyrics) > MAX_LYRICS_CHARACTERS:
            raise InputError(
                f"The lyrics have {len(lyrics):,} characters; at most {MAX_LYRICS_CHARACTERS:,} are "
                "read, so shorten them."
            )
        ids = encode_lyrics(self.lyrics_tokenizer, [lyrics])
        description = clean_prompt(description)
        count, limit = self.text_tower.count_tokens(description), self.text_tower.context_length
        if count > limit:
            raise InputError(
                f"The description has {count} tokens; this model reads {limit}, so shorten it."
            )
        given = [*self.text_tower.text_features([description]), *ids]
        if voice is not None:
            if self.voice_tower is None:
                raise InputError(
                    "This model was loaded without the network that hears a voice: leave the voice "
                    "out, or load a published model with voice=True."
                )
            audio = read_recording(voice, VOICE_RATE)
            if not audio.any():
                raise InputError("The recording of the voice is silent: record it again.")
            given += encode_voice(audio[None].to(self.device), self.voice_tower)
        return [each.to(self.device) for each in given]


def _published_parts(
    info: ModelInfo, files: str | Path | None, voice: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """A published generator and what stands beside it; taken out of the options if there."""
    notice = licence_notice(info)
    if notice is not None:
        warnings.warn(notice, stacklevel=3)
    paths = find_files(info, files)
    parts = {"generator": load_published(info, paths)}
    codec = options.pop("codec", info.tokenizer)
    if isinstance(codec, str | Path):
        codec = AutoTokenizer.from_pretrained(codec)
    parts["codec"] = codec
    parts["text_tower"] = options.pop("text_tower", None) or TextT5.from_hub(
        info.text_tower.removeprefix("t5:")
    )
    parts["voice_tower"] = options.pop("voice_tower", None)
    if voice and parts["voice_tower"] is None:
        (config,) = find_files(replace(info, files=(MERT_CONFIG,)))
        state = {name: value for path in paths for name, value in read_state_dict(path).items()}
        prefix = "mert_model."
        heard = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        parts["voice_tower"] = VoiceMERT.from_published(heard, read_json(config))
    tokenizer = options.pop("lyrics_tokenizer", None)
    if tokenizer is None:
        beside = None if files is None else Path(files) / VOICE_BPE.partition(":")[2]
        here = files if beside is not None and beside.is_file() else None
        (path,) = find_files(replace(info, files=(VOICE_BPE,)), here)
        tokenizer = TextTokenizer.from_file(str(path))
    return parts | {"lyrics_tokenizer": tokenizer}


def _saved_tokenizer(path: str | Path) -> TextTokenizer:
    """What `save_pretrained` wrote beside the models."""
    try:
        file = path / LYRICS_FILE if isinstance(path, Path) else hf_hub_download(path, LYRICS_FILE)
        return TextTokenizer.from_file(str(file))
    except Exception as error:  # The hub's many kinds of failure, and the tokenizers' own.
        raise InputError(
            f'"{path}" holds no song pipeline: {LYRICS_FILE} is missing or damaged.'
        ) from error
