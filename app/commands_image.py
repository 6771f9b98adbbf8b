"""``tessera image`` and ``tessera info``: make pictures, and read how they were made."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..modalities.errors import InputError
from ..modalities.text import expand_prompt
from .commands_shared import (
    DEFAULT_MODEL,
    AsJson,
    Force,
    Metadata,
    check_folder,
    check_outputs,
    check_picture_suffix,
    load_pipeline,
    load_tokenizer,
    note,
    output_folder,
    print_json,
    progress_bar,
    slug,
)
from .records import STREAM_SETTINGS, picture_record, recorded_edit

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.editing import Edit
    from ..pipelines.image_generation import ImageGenerationPipeline, ImagePipelineOutput

# Pictures of one prompt drawn together. Their number is part of the record, since the rounding of
# matrix products depends on it.
BATCH = 8
MAX_PROMPT_FILE_CHARACTERS = 1_000_000

Count = Annotated[
    int, typer.Option("-n", "--count", min=1, max=1000, help="Pictures of each prompt.")
]
Seed = Annotated[
    int | None, typer.Option(help="Of the first picture; default: random, and printed.")
]
Out = Annotated[
    str | None, typer.Option("-o", "--out", help="A file or a folder; default: outputs/DATE/.")
]
Model = Annotated[str, typer.Option(help="Name or folder of a model.")]
TokenizerOf = Annotated[
    str | None, typer.Option("--tokenizer", help="Of a folder that holds a generator alone.")
]
Style = Annotated[str | None, typer.Option(help="One of the model's styles.")]
Tokens = Annotated[int | None, typer.Option(help="Fewer are coarser and quicker.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, max=100, help="How strongly the prompt is followed.")
]
Temperature = Annotated[
    float | None, typer.Option(min=0, max=100, help="0 is the likeliest, 1 as trained.")
]
TopK = Annotated[int | None, typer.Option(min=1, help="Draw among the likeliest so many.")]
TopP = Annotated[float | None, typer.Option(help="Draw among the likeliest of this sum.")]
Steps = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="Of the generator, or of a decoder that alone takes steps."),
]
Format = Annotated[
    Literal["png", "webp", "jpeg"] | None, typer.Option("--format", help="Default: png.")
]


def image(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to draw, or a class by name or number; {red,blue} makes both.",
            show_default=False,
        ),
    ] = None,
    count: Count = 1,
    seed: Seed = None,
    out: Out = None,
    model: Model = DEFAULT_MODEL,
    tokenizer: TokenizerOf = None,
    style: Style = None,
    tokens: Tokens = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    steps: Steps = None,
    from_file: Annotated[
        str | None, typer.Option("--from", help="A text file with one prompt a line; - is stdin.")
    ] = None,
    file_format: Format = None,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Make pictures from a sentence, or of a class.

    Picture i of a prompt has the seed SEED + i and shows the same, whatever -n is. The settings
    are kept in each file: see tessera info.
    """
    prompts = _prompts(prompt, from_file)
    folder = output_folder(out)
    if folder is None:
        _check_single_file(Path(out), len(prompts) * count, file_format)
        check_outputs([Path(out)], force)
    elif out is not None:
        check_folder(folder)

    from ..pipelines.seeds import MAX_SEED, check_seed, random_seed

    seed = random_seed() if seed is None else check_seed(seed)
    seeds = [(seed + i) % (MAX_SEED + 1) for i in range(count)]
    paths = [[Path(out)]] if folder is None else _names(folder, out, prompts, seeds, file_format)
    if folder is not None:
        existing = [path for row in paths for path in row if path.exists()]
        check_outputs(existing[:1], force)

    pipeline = load_pipeline(model, tokenizer)
    given = (tokens, steps, guidance, temperature, top_k, top_p, style)
    settings = choose_settings(pipeline, *given)
    for text in prompts:
        check_condition(pipeline, text)
    batches = [
        (text, seeds[first : first + BATCH], row[first : first + BATCH])
        for text, row in zip(prompts, paths, strict=True)
        for first in range(0, count, BATCH)
    ]
    make_pictures(pipeline, batches, settings, None, force, as_json, not no_metadata)


def make_pictures(
    pipeline: ImageGenerationPipeline,
    batches: list[tuple[Any, list[int], list[Path]]],
    settings: dict[str, Any],
    edit: Edit | None,
    force: bool,
    as_json: bool,
    metadata: bool,
) -> None:
    """Draw and write batches of (condition, seeds, files), and name the files on stdout."""
    start = time.perf_counter()
    sha256 = weights_sha256(pipeline.name)
    saved: list[dict[str, Any]] = []
    try:
        with progress_bar() as bar:
            steps = yields(pipeline, settings)
            first_seed = batches[0][1][0]
            label = (
                f"{Path(pipeline.name).name}  {steps} {pipeline.generator.unit}s  seed {first_seed}"
            )
            task = bar.add_task(label, total=steps * sum(len(seeds) for _, seeds, _ in batches))
            for condition, seeds, files in batches:
                advance = partial(bar.advance, task, len(seeds))
                output = draw(pipeline, condition, seeds, settings, advance, edit)
                saving = (settings, edit, sha256, files, force, metadata)
                for picture in _save(pipeline, condition, output, *saving):
                    saved.append(picture)
    finally:  # Also after Ctrl-C or with a full disk: what is there is named.
        if as_json:
            seconds = round(time.perf_counter() - start, 2)
            print_json({"model": pipeline.name, "seconds": seconds, "pictures": saved})
        else:
            for picture in saved:
                typer.echo(picture["path"])


def info(
    file: Annotated[Path, typer.Argument(help="A picture, sound, video or .tok file.")],
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Make it again and say whether it is identical.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Name or folder of the model to run again.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a file was made.

    With --rerun the exit code is 0 if the file comes out identical, 1 if it differs.
    """
    if file.suffix.lower() == ".tok":
        if rerun:
            raise InputError(f'"{file}" holds tokens, not a picture: use tessera decode.')
        _token_info(file, as_json)
        return
    from ..modalities.records import read_record

    record = read_record(file)
    if record is None:
        raise InputError(
            f'"{file}" has no Tessera settings: it was made elsewhere, or saved as a clean copy.'
        )
    result = _rerun(file, record, model) if rerun else None
    if as_json:
        print_json(record if result is None else {"record": record, "rerun": result})
    else:
        for key, value in record.items():
            if key == "settings":
                for name, setting in value.items():
                    typer.echo(f"{name.replace('_', ' '):22}{setting}")
            elif value is not None:
                typer.echo(f"{key.replace('_', ' '):22}{value}")
        if result is not None:
            typer.echo(result["verdict"])
    if result is not None and not result["identical"]:
        raise typer.Exit(1)


def weights_sha256(model: str | Path) -> str | None:
    """One hash over the weight files of a shipped model or a folder, and of the model that draws its
    first frames if there is one; None for a hub id."""
    from ..weights.registry import resolve_model, shared_parts

    folder = resolve_model(model)
    if not isinstance(folder, Path):
        return None
    digest = hashlib.sha256()
    files = {file.relative_to(folder): file for file in folder.rglob("*.safetensors")}
    for part, shared in shared_parts(folder).items():
        found = shared.rglob("*.safetensors")
        files.update({Path(part) / file.relative_to(shared): file for file in found})
    for name, file in sorted(files.items()):
        digest.update(name.as_posix().encode())
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    index = folder / "model_index.json"
    painter = json.loads(index.read_text("utf8")).get("first_frame") if index.is_file() else None
    if painter is not None:
        with suppress(InputError):  # It may be away where a clip begins with a file.
            digest.update((weights_sha256(painter) or painter).encode())
    return digest.hexdigest()


def _prompts(prompt: str | None, from_file: str | None) -> list[str]:
    """The prompts of the command line or of a file, braces expanded."""
    if (prompt is None) == (from_file is None):
        raise InputError(
            'Give one prompt, for example "a sleepy red fox", or a file of prompts with --from.'
        )
    if from_file is None:
        return expand_prompt(prompt)
    try:
        if from_file == "-":
            text = sys.stdin.read(MAX_PROMPT_FILE_CHARACTERS + 1)
        else:
            with open(from_file, encoding="utf-8-sig") as file:
                text = file.read(MAX_PROMPT_FILE_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise InputError(f'"{from_file}" is not a text file in UTF-8: save it as one.') from error
    except OSError as error:
        raise InputError(
            f'Could not open "{from_file}": {error.strerror}, check the path.'
        ) from error
    if len(text) > MAX_PROMPT_FILE_CHARACTERS:
        raise InputError(
            f'"{from_file}" has more than {MAX_PROMPT_FILE_CHARACTERS:,} characters: split it.'
        )
    prompts = [each for line in text.splitlines() if line.strip() for each in expand_prompt(line)]
    if not prompts:
        raise InputError(f'"{from_file}" holds no prompts: write one a line.')
    return list(dict.fromkeys(prompts))


def _check_single_file(path: Path, pictures: int, file_format: str | None) -> None:
    check_picture_suffix(path)
    if pictures > 1:
        raise InputError(
            f'"{path}" names one file, but {pictures} pictures are to be made: give a folder, '
            f"-o {path.stem}/."
        )
    kind = path.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    if file_format not in (None, kind):
        raise InputError(f'--format {file_format} does not fit "{path}": leave one of them out.')


def _names(
    folder: Path, out: str | None, prompts: list[str], seeds: list[int], file_format: str | None
) -> list[list[Path]]:
    """A file for each prompt and seed; prompts whose names would be the same are numbered."""
    stems: dict[str, None] = {}
    for text in prompts:
        stem, number = slug(text), 2
        while stem in stems:
            stem, number = f"{slug(text)}-{number}", number + 1
        stems[stem] = None
    time_of_day = "" if out is not None else datetime.now().strftime("%H%M%S_")
    suffix = file_format or "png"
    return [[folder / f"{time_of_day}{stem}_{seed}.{suffix}" for seed in seeds] for stem in stems]


def choose_settings(
    pipeline: ImageGenerationPipeline,
    tokens: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    style: str | None = None,
) -> dict[str, Any]:
    """Every setting with its value, so that a record stays true when defaults change.

    Raises:
        InputError: one that the model does not take.
    """
    found = pipeline.settings
    given = {
        "num_tokens": tokens,
        "guidance_scale": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_steps" if "num_steps" in found else "num_inference_steps": steps,
    }
    given = {name: value for name, value in given.items() if value is not None}
    pipeline.check_settings(given)
    if style is not None and pipeline.condition == "class":
        raise InputError(f'"{pipeline.name}" draws classes and knows no styles: leave out --style.')
    return {**found, **given, **({} if style is None else {"style": style})}


def check_condition(pipeline: ImageGenerationPipeline, text: str) -> None:
    """Refuse a class that is none; say what of a prompt is not read."""
    if pipeline.condition == "class":
        pipeline.class_label(text)
        return
    report = pipeline.prompt_report(text)
    if report.cut:
        cut = report.cut if len(report.cut) <= 80 else report.cut[:80] + "…"
        note(
            f"Warning: Prompt has {report.words} words; this model reads the first "
            f'{len(report.kept.split())}. Not read: "{cut}"'
        )


def yields(pipeline: ImageGenerationPipeline, settings: dict[str, Any]) -> int:
    """Steps until a picture of these settings is there."""
    return pipeline.generator.num_yields(settings.get("num_tokens"), settings.get("num_steps"))


def draw(
    pipeline: ImageGenerationPipeline,
    condition: Any,
    seeds: list[int],
    settings: dict[str, Any],
    advance: Callable[[], None],
    edit: Edit | None = None,
) -> ImagePipelineOutput:
    """One batch of one condition, or of a list of them; ``advance`` is called after each step."""
    from ..pipelines.seeds import seed_generators

    generators = [seed_generators(seed, 1)[0] for seed in seeds]
    many = len(condition) if isinstance(condition, list) else 1
    options = {"num_images_per_prompt": len(seeds) // many, "generator": generators, **settings}
    stop = options.pop("stopped_at", None)
    for step in pipeline.stream(condition, edit=edit, **options):
        advance()
        if step.step == stop:
            return step.finish()
    return step.output


def _save(
    pipeline: ImageGenerationPipeline,
    condition: Any,
    output: ImagePipelineOutput,
    settings: dict[str, Any],
    edit: Edit | None,
    sha256: str | None,
    paths: list[Path],
    force: bool,
    metadata: bool,
) -> Iterator[dict[str, Any]]:
    """Write the pictures of a batch, and tell of each once it is there."""
    from ..modalities.image import save_image

    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for index, (path, picture, seed) in enumerate(
        zip(paths, output.images, output.seeds, strict=True)
    ):
        record = picture_record(
            pipeline,
            condition[index] if isinstance(condition, list) else condition,
            seed,
            index,
            settings,
            len(paths),
            output.tokens[index],
            edit,
            sha256,
        )
        save_image(picture, path, record if metadata else None, overwrite=force)
        shown = {"prompt": record["prompt"], "seed": seed, "tokens": record["tokens"]}
        yield {"path": str(path), **shown}


def _token_info(file: Path, as_json: bool) -> None:
    from ..modalities.token_file import read_tokens

    content = read_tokens(file)
    rows = {
        "tokenizer": content.tokenizer,
        "tokens": len(content.tokens),
        "bits": content.bits or None,
        "bytes": content.payload_bytes,
    }
    if as_json:
        print_json(rows)
    else:
        for key, value in rows.items():
            if value is not None:
                typer.echo(f"{key:22}{value}")


def _rerun(file: Path, record: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Make the picture of a record again and hold it against the file."""
    from ..modalities.image import load_image, save_image

    if model is None:
        model = record["model"]
        # A stranger's file may name a shipped model, but must not start a download or open a folder.
        from ..weights.registry import find_model

        found = find_model(model) if model else None
        if found is None or not found.shipped:
            raise InputError(
                f'"{file}" was made by "{model}", which does not ship with Tessera: pass its '
                "folder or hub id as --model."
            )
    from ..modalities.audio import AUDIO_SUFFIXES

    if file.suffix.lower() in AUDIO_SUFFIXES:
        from .commands_audio import rerun

        return rerun(file, record, model)
    from .commands_video import is_clip

    if is_clip(file):
        from .commands_video import rerun as rerun_clip

        return rerun_clip(file, record, model)
    if None in (record["prompt"], record["seed"], record["tokens"]):
        raise InputError(
            f'"{file}" has no prompt, seed or tokens in its settings: it cannot be made again.'
        )
    if record["pipeline"] in ("TextToImagePipeline", "ClassToImagePipeline"):
        picture, tokens = _redraw(record, model, file)
    elif record["pipeline"] == "ReconstructionPipeline":
        picture, tokens = _redecode(record, model)
    else:
        raise InputError(f'"{file}" was made by {record["pipeline"]}, which cannot be rerun here.')

    same_weights = record["sha256"] in (None, weights_sha256(model))
    with TemporaryDirectory() as folder:  # Through the same format, since a JPEG is not exact.
        again = Path(folder) / f"again{file.suffix.lower()}"
        save_image(picture, again)
        new, old = load_image(again), load_image(file)
    result = {"identical": False, "same_tokens": tokens == record["tokens"], "difference": None}
    if new.size != old.size:
        verdict = f"differs: {old.width}x{old.height} pixels became {new.width}x{new.height}"
    else:
        from PIL import ImageChops

        result["difference"] = max(high for _, high in ImageChops.difference(new, old).getextrema())
        result["identical"] = result["difference"] == 0 and result["same_tokens"]
        verdict = (
            "identical"
            if result["identical"]
            else f"differs: by up to {result['difference']} of 255, the tokens are "
            + ("the same" if result["same_tokens"] else "others")
        )
    if not result["identical"] and not same_weights:
        verdict += "; the model's weights are not those that made it"
    return {**result, "verdict": verdict}


def _redraw(record: dict[str, Any], model: str, file: Path) -> tuple[Image, str]:
    from ..modalities.metadata import decode_tokens, encode_tokens
    from ..pipelines.editing import blends
    from ..pipelines.seeds import MAX_SEED

    pipeline = load_pipeline(model)
    recorded = record["settings"]
    settings = {
        key: recorded[key]
        for key in (*STREAM_SETTINGS, "stopped_at")
        if recorded.get(key) is not None
    }
    # The whole batch again, since its size decides how matrix products are rounded.
    batch = recorded.get("num_images_per_prompt") or 1
    index = record["index"] or 0
    if not index < batch <= BATCH:
        batch, index = 1, 0
    seeds = [(record["seed"] - index + i) % (MAX_SEED + 1) for i in range(batch)]
    condition = recorded.get("class_label", record["prompt"])
    if recorded.get("edit") == "blend":
        second = recorded.get("second_label", recorded.get("second"))
        condition, seeds = blends(condition, second, batch), [record["seed"]] * batch
    edit = recorded_edit(pipeline, recorded, decode_tokens(record["tokens"]), file)
    with progress_bar() as bar:
        task = bar.add_task(f"{Path(model).name}  rerun", total=yields(pipeline, settings))
        advance = partial(bar.advance, task)
        output = draw(pipeline, condition, seeds, settings, advance, edit)
    return output.images[index], encode_tokens(output.tokens[index])


def _redecode(record: dict[str, Any], model: str) -> tuple[Image, str]:
    from ..modalities.metadata import decode_tokens
    from .commands_tokens import decode_picture

    tokens = decode_tokens(record["tokens"])
    steps = record["settings"].get("num_inference_steps")
    tokenizer = load_tokenizer(model)
    return decode_picture(tokenizer, tokens, record["seed"], steps), record["tokens"]
