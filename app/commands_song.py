"""``tessera song``: lyrics and a description as a song."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..modalities.errors import InputError
from .commands_audio import Model, read_text, show_saved
from .commands_audio_tokens import check_audio_suffix
from .commands_image import Out, Temperature, TopK, TopP, weights_sha256
from .commands_shared import (
    AsJson,
    Force,
    Metadata,
    check_outputs,
    device,
    media_paths,
    progress_bar,
    quiet_diffusers,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.text_to_song import SongOutput, TextToSongPipeline

DEFAULT_SONG = "songgen-mixed-pro"
SAMPLING = ("temperature", "top_k", "top_p")
# Records hold no line ends; this stands for one.
_LINE = "\u2028"


def song(
    lyrics: Annotated[
        str | None,
        typer.Argument(help="English, a line a line; - reads it from stdin.", show_default=False),
    ] = None,
    description: Annotated[
        str,
        typer.Option("-d", "--description", help="Of the music and the voice."),
    ] = "",
    file: Annotated[Path | None, typer.Option("--file", help="A text file of lyrics.")] = None,
    voice: Annotated[
        Path | None,
        typer.Option("--voice", help="A recording of the voice that sings; 3 seconds are heard."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="At most so long; default 30.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=100, help="Variants.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Of the first song; default: random, and printed.")
    ] = None,
    out: Out = None,
    model: Model = DEFAULT_SONG,
    tracks: Annotated[
        bool,
        typer.Option("--tracks", help="Vocals and accompaniment also as files of their own."),
    ] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Make songs of lyrics.

    Song i has the seed SEED + i. The format is WAV, FLAC, OGG or Opus by the suffix of -o, WAV in a
    folder. With --tracks NAME.wav has NAME.vocal.wav and NAME.accompaniment.wav beside it.
    """
    from ..modalities.text import clean_prompt
    from ..pipelines.seeds import MAX_SEED, check_seed, random_seed

    lyrics = song_lines(read_text(lyrics, file))
    description = clean_prompt(description)
    seed = random_seed() if seed is None else check_seed(seed)
    seeds = [(seed + i) % (MAX_SEED + 1) for i in range(count)]
    paths = media_paths(out, lyrics, seeds, "song", ".wav", check_audio_suffix, force)
    heard = None if voice is None else _recording(voice)

    pipeline = load_song(model, voice=heard is not None)
    if tracks:
        if len(pipeline.tracks) == 1:
            raise InputError(f'"{model}" writes one track: leave --tracks out.')
        beside = [_track_path(path, name) for path in paths for name in pipeline.tracks]
        check_outputs([path for path in beside if path.exists()][:1], force)
    given = dict(zip(SAMPLING, (temperature, top_k, top_p), strict=True))
    settings = {name: _default(pipeline, name, value) for name, value in given.items()}
    settings["seconds"] = seconds
    sha256 = weights_sha256(pipeline.name)
    start, saved = time.perf_counter(), []
    try:
        with progress_bar() as bar:
            for path, each in zip(paths, seeds, strict=True):
                task = bar.add_task(f"{Path(pipeline.name).name}  seed {each}", total=None)

                def show(step: int, total: int, task: Any = task) -> None:
                    bar.update(task, total=total, completed=step)

                made = _sing(pipeline, lyrics, description, heard, each, settings, show)
                record = song_record(
                    pipeline, lyrics, description, heard is not None, each, settings, sha256
                )
                shown = _save(made, path, None if no_metadata else record, tracks, force)
                saved.append(shown)
    finally:  # Also after Ctrl-C or with a full disk: what is there is named.
        show_saved(pipeline.name, "songs", saved, start, as_json)


def song_lines(text: str) -> str:
    """Lyrics without empty lines and spaces around lines."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def load_song(model: str, voice: bool = False) -> TextToSongPipeline:
    """A model that sings, on the best device; the pipeline says what its licence forbids."""
    from ..pipelines.text_to_song import TextToSongPipeline

    quiet_diffusers()
    return TextToSongPipeline.from_pretrained(model, voice=voice).to(device())


def song_record(
    pipeline: TextToSongPipeline,
    lyrics: str,
    description: str,
    voice: bool,
    seed: int,
    settings: dict[str, Any],
    sha256: str | None,
) -> dict[str, Any]:
    """The record of a song; the prompt is its lyrics.

    Args:
        voice: a recording was heard, which the record does not hold.
        settings: of the pipeline's ``stream``, each with its value.
    """
    from ..modalities.metadata import make_record

    kept = {key: value for key, value in settings.items() if value is not None}
    return make_record(
        type(pipeline).__name__,
        pipeline.name,
        lyrics.replace("\n", _LINE),
        seed,
        0,
        {"description": description, **kept, "voice": voice},
        tokenizer=pipeline.name,
        sha256=sha256,
        device=pipeline.device,
        dtype=pipeline.dtype,
    )


def sing_again(file: Path, record: dict[str, Any], model: str) -> tuple[Tensor, int, bool | None]:
    """The song of a record, its rate, and None for tokens, which it does not hold.

    Raises:
        InputError: the record does not hold what is needed.
    """
    settings = record["settings"]
    if None in (record["prompt"], record["seed"], settings.get("description")):
        raise InputError(f'"{file}" has no lyrics, description or seed in its settings.')
    if settings.get("voice"):
        raise InputError(f'"{file}" was sung by a voice that it does not hold: sing it again.')
    options = {key: settings[key] for key in ("seconds", *SAMPLING) if key in settings}
    lyrics = record["prompt"].replace(_LINE, "\n")
    pipeline = load_song(model)
    made = _sing(pipeline, lyrics, settings["description"], None, record["seed"], options, None)
    return made.audio, made.sample_rate, None


def _sing(
    pipeline: TextToSongPipeline,
    lyrics: str,
    description: str,
    voice: Any,
    seed: int,
    settings: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> SongOutput:
    return pipeline(lyrics, description, voice, seed=seed, callback=progress, **settings)


def _default(pipeline: TextToSongPipeline, name: str, given: Any) -> Any:
    return getattr(pipeline.config, name) if given is None else given


def _recording(path: Path) -> tuple[Tensor, int]:
    """Read before any model is loaded."""
    from ..modalities.audio import load_audio

    return load_audio(path)


def _track_path(path: Path, track: str) -> Path:
    return path.with_suffix(f".{track}{path.suffix}")


def _save(
    made: SongOutput, path: Path, record: dict[str, Any] | None, tracks: bool, force: bool
) -> dict[str, Any]:
    """Write a song, and its tracks beside it."""
    from ..modalities.audio import save_audio

    path.parent.mkdir(parents=True, exist_ok=True)
    save_audio(made.audio, made.sample_rate, path, record, overwrite=force)
    seconds = round(made.audio.shape[-1] / made.sample_rate, 3)
    shown = {"path": str(path), "seed": made.seed, "seconds": seconds}
    if tracks:
        shown["tracks"] = {}
        for name, audio in made.tracks.items():
            beside = _track_path(path, name)
            save_audio(audio, made.sample_rate, beside, overwrite=force)
            shown["tracks"][name] = str(beside)
    return shown
