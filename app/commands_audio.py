"""``tessera speak`` and ``tessera sound``: a text as speech, a caption as sound."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..modalities.errors import InputError
from .audio_records import (
    SAMPLING,
    one_line,
    sampling_settings,
    sound_record,
    speech_record,
    spoken_text,
)
from .commands_audio_tokens import check_audio_suffix, load_codec, shaped_tokens
from .commands_image import Guidance, Out, Temperature, TopK, TopP, weights_sha256
from .commands_shared import (
    AsJson,
    Force,
    Metadata,
    check_folder,
    check_outputs,
    device,
    media_path,
    media_paths,
    note,
    output_folder,
    print_json,
    progress_bar,
    quiet_diffusers,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..modalities.audio import AudioWriter
    from ..pipelines.text_to_sound import SoundOutput, TextToSoundPipeline
    from ..pipelines.text_to_speech import TextToSpeechPipeline, Word

DEFAULT_VOICE, DEFAULT_SOUND = "voice", "sound"
MAX_TEXT_FILE_CHARACTERS = 1_000_000
# Sounds of one caption drawn together. Their number is part of the record, since the rounding of
# matrix products depends on it.
BATCH = 8

Seed = Annotated[int | None, typer.Option(help="Default: random, and printed.")]
Model = Annotated[str, typer.Option(help="Name or folder of a model.")]


def speak(
    text: Annotated[
        str | None,
        typer.Argument(help="English; - reads it from stdin.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A text file to read out.")] = None,
    out: Out = None,
    voice: Annotated[str | None, typer.Option(help="One of the model's voices.")] = None,
    speed: Annotated[float, typer.Option(help="1 is natural, 2 twice as fast; 0.25 to 4.")] = 1.0,
    seed: Seed = None,
    model: Model = DEFAULT_VOICE,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    words: Annotated[
        Path | None, typer.Option("--words", help="A JSON file for the time of each word.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Raw 16-bit mono samples to stdout, as they are made."),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Read a text out.

    The file is WAV, FLAC, OGG or Opus by its suffix, and is written while the text is spoken, so a
    long text needs no more memory than a short one. --stream writes a file only where -o names one.
    """
    if stream and as_json:
        raise InputError("--stream and --json both write to stdout: leave one of them out.")
    line = one_line(read_text(text, file))
    folder = None if stream and out is None else output_folder(out)
    if out is not None and folder is None:
        check_audio_suffix(Path(out))
        check_outputs([Path(out)], force)
    elif out is not None:
        check_folder(folder)
    if words is not None:
        check_outputs([words], force)

    from ..modalities.phonemes import phonemise
    from ..pipelines.seeds import check_seed, random_seed

    total = len(phonemise(spoken_text(line)))
    seed = random_seed() if seed is None else check_seed(seed)
    path = None if out is None else Path(out)
    if folder is not None:
        path = media_path(folder, out, line, seed, "sound", ".wav")
        check_outputs([path] if path.exists() else [], force)
    pipeline = load_voice(model)
    given = dict(zip(SAMPLING, (guidance, temperature, top_k, top_p), strict=True))
    settings = {
        "voice": voice or pipeline.config.default_voice or pipeline.voices[0],
        "speed": speed,
        **sampling_settings(pipeline, given),
    }
    record = speech_record(pipeline, line, seed, settings, weights_sha256(pipeline.name))
    if stream:
        rate = pipeline.sample_rate
        note(f"{rate} Hz, 16 bit, mono: for example | aplay -q -t raw -f S16_LE -r {rate}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    start, marks, seconds, stopped = time.perf_counter(), [], 0.0, False
    metadata = None if no_metadata else record
    chunks = pipeline.stream(spoken_text(line), seed=seed, **settings)
    first = next(chunks)  # Before a file is opened: here a setting that means nothing is refused.
    with _writer(path, pipeline.sample_rate, metadata, force) as writer, progress_bar() as bar:
        task = bar.add_task(f"{Path(pipeline.name).name}  seed {seed}", total=total)
        try:
            for chunk in chain([first], chunks):
                if writer is not None:
                    writer.write(chunk.audio)
                if stream:
                    sys.stdout.buffer.write(pcm(chunk.audio))
                    sys.stdout.buffer.flush()
                marks += chunk.words
                seconds = chunk.seconds
                bar.update(task, completed=chunk.sentence)
            bar.update(task, completed=total)
        except KeyboardInterrupt:  # What has been spoken is kept.
            if path is None or not seconds:
                raise
            stopped = True
    spent = time.perf_counter() - start
    if words is not None:
        marks = [mark for mark in marks if mark.start < seconds]
        _write_words(words, marks, seconds, force)
    note(f"{seconds:.1f} s of speech in {spent:.1f} s, seed {seed}")
    if as_json:
        shown = {"path": str(path), "voice": settings["voice"], "seed": seed}
        shown |= {"seconds": round(seconds, 3), "took": round(spent, 2)}
        print_json({"model": pipeline.name, **shown})
    elif path is not None and not stream:
        typer.echo(path)
    if stopped:
        raise KeyboardInterrupt


def sound(
    caption: Annotated[str, typer.Argument(help="What it sounds like.", show_default=False)],
    seconds: Annotated[
        float | None, typer.Option(help="Default: as long as such sounds are.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=100, help="Variants.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Of the first sound; default: random, and printed.")
    ] = None,
    out: Out = None,
    model: Model = DEFAULT_SOUND,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Make sounds from a caption.

    Sound i has the seed SEED + i and is the same, whatever -n is. The format is WAV, FLAC, OGG or
    Opus by the suffix of -o, WAV in a folder.
    """
    from ..modalities.text import clean_prompt
    from ..pipelines.seeds import MAX_SEED, check_seed, random_seed

    caption = clean_prompt(caption)
    seed = random_seed() if seed is None else check_seed(seed)
    seeds = [(seed + i) % (MAX_SEED + 1) for i in range(count)]
    paths = media_paths(out, caption, seeds, "sound", ".wav", check_audio_suffix, force)

    pipeline = load_sound(model)
    given = dict(zip(SAMPLING, (guidance, temperature, top_k, top_p), strict=True))
    settings = {"seconds": seconds, **sampling_settings(pipeline, given)}
    sha256 = weights_sha256(pipeline.name)
    start, saved = time.perf_counter(), []
    try:
        with progress_bar() as bar:
            task = bar.add_task(f"{Path(pipeline.name).name}  seed {seed}", total=None)

            def show(step: int, total: int) -> None:
                done = len(saved) * total
                now = min(BATCH, count - len(saved))
                bar.update(task, total=count * total, completed=done + now * step)

            for first in range(0, count, BATCH):
                batch = slice(first, first + BATCH)
                made = _draw(pipeline, caption, seeds[batch], settings, show)
                saving = (settings, sha256, paths[batch], force, not no_metadata)
                for each in _save(pipeline, caption, made, *saving):
                    saved.append(each)
    finally:  # Also after Ctrl-C or with a full disk: what is there is named.
        show_saved(pipeline.name, "sounds", saved, start, as_json)


def pcm(audio: Tensor) -> bytes:
    """Sound ``[1, n]`` in [-1, 1] -> 16-bit little-endian samples."""
    import torch

    return (audio[0] * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()


def load_voice(model: str) -> TextToSpeechPipeline:
    """A model that speaks, on the best device."""
    from ..pipelines.text_to_speech import TextToSpeechPipeline

    quiet_diffusers()
    return TextToSpeechPipeline.from_pretrained(model).to(device())


def load_sound(model: str) -> TextToSoundPipeline:
    """A model that makes sounds, on the best device."""
    from ..pipelines.text_to_sound import TextToSoundPipeline

    quiet_diffusers()
    return TextToSoundPipeline.from_pretrained(model).to(device())


def rerun(file: Path, record: dict[str, Any], model: str) -> dict[str, Any]:
    """Make the sound of a record again and hold it against the file.

    Raises:
        InputError: the record does not hold what is needed.
    """
    from ..modalities.audio import load_audio, save_audio

    again = _AGAIN.get(record["pipeline"])
    if again is None:
        raise InputError(f'"{file}" was made by {record["pipeline"]}, which cannot be rerun here.')
    old, _ = load_audio(file)
    audio, rate, same_tokens = again(file, record, model)
    if record["pipeline"] == "ReconstructionPipeline":
        audio = audio[:, : old.shape[-1]]
    same_weights = record["sha256"] in (None, weights_sha256(model))
    with TemporaryDirectory() as folder:  # Through the same format, since OGG is not exact.
        path = Path(folder) / f"again{file.suffix.lower()}"
        save_audio(audio, rate, path)
        new, rate = load_audio(path)
    result = {"identical": False, "same_tokens": same_tokens, "difference": None}
    if new.shape != old.shape:
        verdict = f"differs: {old.shape[-1] / rate:.2f} s became {new.shape[-1] / rate:.2f} s"
    else:
        result["difference"] = float((new - old).abs().max())
        result["identical"] = result["difference"] == 0 and same_tokens is not False
        verdict = (
            "identical"
            if result["identical"]
            else f"differs: by up to {result['difference']:.2g} of full scale"
        )
    if not result["identical"] and not same_weights:
        verdict += "; the model's weights are not those that made it"
    return {**result, "verdict": verdict}


def _speak_again(file: Path, record: dict[str, Any], model: str) -> tuple[Tensor, int, bool | None]:
    settings = record["settings"]
    if None in (record["prompt"], record["seed"]):
        raise InputError(f'"{file}" has no text or no seed in its settings.')
    if settings.get("characters"):
        raise InputError(
            f'"{file}" holds only the beginning of its text of {settings["characters"]:,} '
            "characters: speak the text again with tessera speak --file."
        )
    options = {key: settings[key] for key in ("voice", "speed", *SAMPLING) if key in settings}
    pipeline = load_voice(model)
    speech = pipeline(spoken_text(record["prompt"]), seed=record["seed"], **options)
    return speech.audio, speech.sample_rate, None


def _sound_again(file: Path, record: dict[str, Any], model: str) -> tuple[Tensor, int, bool | None]:
    from ..modalities.metadata import encode_tokens
    from ..pipelines.seeds import MAX_SEED

    settings = record["settings"]
    if None in (record["prompt"], record["seed"], record["tokens"]):
        raise InputError(f'"{file}" has no caption, seed or tokens in its settings.')
    options = {key: settings[key] for key in ("seconds", *SAMPLING) if key in settings}
    # The whole batch again, since its size decides how matrix products are rounded.
    batch, index = settings.get("num_sounds_per_prompt") or 1, record["index"] or 0
    if not (isinstance(batch, int) and index < batch <= BATCH):
        batch, index = 1, 0
    seeds = [(record["seed"] - index + i) % (MAX_SEED + 1) for i in range(batch)]
    pipeline = load_sound(model)
    made = _draw(pipeline, record["prompt"], seeds, options, lambda step, total: None)
    tokens = encode_tokens(made.tokens[index].mT.flatten())
    return made.sounds[index], made.sample_rate, tokens == record["tokens"]


def _song_again(file: Path, record: dict[str, Any], model: str) -> tuple[Tensor, int, bool | None]:
    from .commands_song import sing_again

    return sing_again(file, record, model)


def _decode_again(
    file: Path, record: dict[str, Any], model: str
) -> tuple[Tensor, int, bool | None]:
    from ..modalities.metadata import decode_tokens
    from ..pipelines.audio_reconstruction import decode_audio

    if record["tokens"] is None:
        raise InputError(f'"{file}" has no tokens in its settings: it cannot be made again.')
    codec = load_codec(model)
    tokens = shaped_tokens(codec, decode_tokens(record["tokens"]))
    audio = decode_audio(codec, tokens[None].to(codec.device))[0].float().cpu()
    return audio, codec.sample_rate, True


_AGAIN = {
    "TextToSpeechPipeline": _speak_again,
    "TextToSoundPipeline": _sound_again,
    "TextToSongPipeline": _song_again,
    "ReconstructionPipeline": _decode_again,
}


def read_text(text: str | None, file: Path | None) -> str:
    """What to read out, from the command line, stdin or a file."""
    if (text is None) == (file is None):
        raise InputError('Give a text, for example "The kettle is boiling.", or a --file.')
    where = "standard input" if file is None else f'"{file}"'
    try:
        if file is not None:
            with open(file, encoding="utf-8-sig") as lines:
                text = lines.read(MAX_TEXT_FILE_CHARACTERS + 1)
        elif text == "-":
            text = sys.stdin.read(MAX_TEXT_FILE_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not a text file in UTF-8: save it as one.") from error
    except OSError as error:
        raise InputError(f"Could not open {where}: {error.strerror}, check the path.") from error
    if len(text) > MAX_TEXT_FILE_CHARACTERS:
        raise InputError(
            f"The text has more than {MAX_TEXT_FILE_CHARACTERS:,} characters: split it."
        )
    return text


def show_saved(
    model: str, what: str, saved: list[dict[str, Any]], start: float, as_json: bool
) -> None:
    """Name the files on stdout, or print one document with them under ``what``."""
    if as_json:
        took = round(time.perf_counter() - start, 2)
        print_json({"model": model, "took": took, what: saved})
    else:
        for each in saved:
            typer.echo(each["path"])


@contextmanager
def _writer(
    path: Path | None, rate: int, record: dict[str, Any] | None, force: bool
) -> Iterator[AudioWriter | None]:
    from ..modalities.audio import write_audio

    if path is None:
        yield None
    else:
        with write_audio(path, rate, 1, record, overwrite=force) as writer:
            yield writer


def _write_words(path: Path, words: list[Word], seconds: float, force: bool) -> None:
    """The time of each word in seconds from the beginning."""
    from ..modalities.files import atomic_path

    rows = [
        {
            "word": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "sentence": word.sentence,
        }
        for word in words
    ]
    with atomic_path(path, force) as temporary:
        text = json.dumps({"seconds": round(seconds, 3), "words": rows}, ensure_ascii=False)
        temporary.write_text(text + "\n", "utf8")


def _draw(
    pipeline: TextToSoundPipeline,
    caption: str,
    seeds: list[int],
    settings: dict[str, Any],
    progress: Callable[[int, int], None],
) -> SoundOutput:
    """One batch of one caption."""
    from ..pipelines.seeds import seed_generators

    generators = [seed_generators(seed, 1)[0] for seed in seeds]
    options = {"num_sounds_per_prompt": len(seeds), "generator": generators, "callback": progress}
    return pipeline(caption, **options, **settings)


def _save(
    pipeline: TextToSoundPipeline,
    caption: str,
    made: SoundOutput,
    settings: dict[str, Any],
    sha256: str | None,
    paths: list[Path],
    force: bool,
    metadata: bool,
) -> Iterator[dict[str, Any]]:
    """Write the sounds of a batch, and tell of each once it is there."""
    from ..modalities.audio import save_audio

    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for index, (path, audio, tokens, seed) in enumerate(
        zip(paths, made.sounds, made.tokens, made.seeds, strict=True)
    ):
        record = sound_record(pipeline, caption, seed, index, settings, len(paths), tokens, sha256)
        save_audio(audio, made.sample_rate, path, record if metadata else None, overwrite=force)
        seconds = round(audio.shape[-1] / made.sample_rate, 3)
        yield {"path": str(path), "seed": seed, "seconds": seconds, "tokens": record["tokens"]}
