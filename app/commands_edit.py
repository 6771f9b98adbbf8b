"""``tessera edit``: in-painting, out-painting, variations and blends; ``tessera grid``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..modalities.errors import InputError
from .commands_image import (
    BATCH,
    Count,
    Guidance,
    Model,
    Out,
    Seed,
    Steps,
    Temperature,
    TokenizerOf,
    Tokens,
    check_condition,
    choose_settings,
    make_pictures,
)
from .commands_shared import (
    DEFAULT_MODEL,
    AsJson,
    Force,
    Metadata,
    check_folder,
    check_outputs,
    check_picture_suffix,
    load_pipeline,
    note,
    output_folder,
    progress_bar,
    slug,
)

edit = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Change pictures.")

Picture = Annotated[Path, typer.Argument(help="A picture.")]
Condition = Annotated[str, typer.Argument(help="What to draw, or a class by name or number.")]


@edit.command("inpaint")
def inpaint(
    picture: Picture,
    condition: Condition,
    mask: Annotated[Path, typer.Option(help="As large as the picture, white where to draw anew.")],
    count: Count = 1,
    seed: Seed = None,
    out: Out = None,
    model: Model = DEFAULT_MODEL,
    tokenizer: TokenizerOf = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    steps: Steps = None,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Draw a part of a picture anew; the rest stays as it is.

    For models whose tokens form a grid, such as var-d16 or enat-l-256.
    """
    seeds, files = _plan(condition, count, seed, out, force)
    from ..modalities.image import load_image

    images = load_image(picture), load_image(mask)
    pipeline = load_pipeline(model, tokenizer)
    check_condition(pipeline, condition)
    settings = choose_settings(pipeline, None, steps, guidance, temperature)
    kept = pipeline.inpainting(*images)
    batches = _batches(condition, seeds, files)
    make_pictures(pipeline, batches, settings, kept, force, as_json, not no_metadata)


@edit.command("outpaint")
def outpaint(
    picture: Picture,
    condition: Condition,
    side: Annotated[str, typer.Option(help="left, right, top or bottom.")] = "right",
    pixels: Annotated[int | None, typer.Option(help="To add; default: half a picture.")] = None,
    count: Count = 1,
    seed: Seed = None,
    out: Out = None,
    model: Model = DEFAULT_MODEL,
    tokenizer: TokenizerOf = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    steps: Steps = None,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Go on beyond one side of a picture."""
    seeds, files = _plan(condition, count, seed, out, force)
    from ..modalities.image import load_image

    image = load_image(picture)
    pipeline = load_pipeline(model, tokenizer)
    check_condition(pipeline, condition)
    settings = choose_settings(pipeline, None, steps, guidance, temperature)
    kept = pipeline.outpainting(image, side, pixels)
    batches = _batches(condition, seeds, files)
    make_pictures(pipeline, batches, settings, kept, force, as_json, not no_metadata)


@edit.command("vary")
def vary(
    picture: Annotated[Path, typer.Argument(help="A picture by Tessera, with its settings.")],
    keep: Annotated[
        int | None, typer.Option(min=1, help="First tokens to keep; default: a quarter.")
    ] = None,
    count: Count = 4,
    seed: Seed = None,
    out: Out = None,
    model: Annotated[
        str | None, typer.Option(help="Name or folder; default: the shipped one that made it.")
    ] = None,
    tokens: Tokens = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Draw variations of a picture: its first tokens stay, and with them what it shows.

    For models over ordered tokens, such as sticker or var-d16.
    """
    from ..modalities.image import read_record
    from ..modalities.metadata import decode_tokens
    from ..weights.registry import find_model

    record = read_record(picture)
    if record is None or record["tokens"] is None or record["prompt"] is None:
        raise InputError(
            f'"{picture}" does not hold the tokens it was made from: make it with tessera image.'
        )
    if model is None:
        # A stranger's file may name a shipped model, but must not start a download.
        info = find_model(record["model"] or "")
        if info is None or not info.shipped:
            raise InputError(
                f'"{picture}" was made by "{record["model"]}", which does not ship with Tessera: '
                "pass its name or folder as --model."
            )
        model = info.name
    condition = str(record["settings"].get("class_label", record["prompt"]))
    seeds, files = _plan(record["prompt"], count, seed, out, force)
    pipeline = load_pipeline(model)
    check_condition(pipeline, condition)
    style = record["settings"].get("style")
    given = decode_tokens(record["tokens"])
    count_tokens = max(tokens or len(given), 1)
    settings = choose_settings(
        pipeline,
        count_tokens if "num_tokens" in pipeline.settings else tokens,
        None,
        guidance,
        temperature,
        style=style,
    )
    kept = pipeline.variation(given, max(len(given) // 4, 1) if keep is None else keep)
    batches = _batches(condition, seeds, files)
    make_pictures(pipeline, batches, settings, kept, force, as_json, not no_metadata)


@edit.command("blend")
def blend(
    first: Condition,
    second: Condition,
    count: Annotated[int, typer.Option("-n", "--count", min=2, max=BATCH)] = 5,
    seed: Seed = None,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="A folder; default: outputs/DATE/.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    tokenizer: TokenizerOf = None,
    tokens: Tokens = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    steps: Steps = None,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Go from one prompt or class to another in even steps, all with the same seed."""
    from ..pipelines.seeds import check_seed, random_seed

    folder = output_folder(out)
    if folder is None:
        raise InputError(
            f'"{out}" names one file, but {count} pictures are to be made: give a folder.'
        )
    check_folder(folder if out is not None else Path("."))
    seed = random_seed() if seed is None else check_seed(seed)
    stem = f"{slug(first)[:30]}-to-{slug(second)[:30]}_{seed}"
    files = [folder / f"{stem}_{i}.png" for i in range(count)]
    check_outputs([file for file in files if file.exists()][:1], force)
    from ..pipelines.editing import blends

    pipeline = load_pipeline(model, tokenizer)
    for text in (first, second):
        check_condition(pipeline, text)
    settings = choose_settings(pipeline, tokens, steps, guidance, temperature)
    batches = [(blends(first, second, count), [seed] * count, files)]
    make_pictures(pipeline, batches, settings, None, force, as_json, not no_metadata)


def grid(
    condition: Condition,
    x: Annotated[str, typer.Option("--x", help="A setting and its values: guidance=1,3,6.")],
    y: Annotated[str | None, typer.Option("--y", help="Likewise, downwards.")] = None,
    seed: Seed = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="A picture file.")] = Path("grid.png"),
    model: Model = DEFAULT_MODEL,
    tokenizer: TokenizerOf = None,
    force: Force = False,
    no_metadata: Metadata = False,
) -> None:
    """Draw a grid over the values of two settings.

    One picture with its values beside it. Settings: tokens, steps, guidance, temperature, top_k, top_p, seed. All cells have the same seed.
    Ctrl-C writes the cells that are there.
    """
    check_picture_suffix(out)
    check_outputs([out], force)
    from ..modalities.image import save_image
    from ..pipelines.seeds import check_seed, random_seed
    from .xy_grid import Axis, Grid

    axes = [Axis.parse(text) for text in (x, y) if text]
    seed = random_seed() if seed is None else check_seed(seed)
    pipeline = load_pipeline(model, tokenizer)
    check_condition(pipeline, condition)
    drawn = Grid(pipeline, condition, seed, axes[0], axes[1] if y else None)
    stopped = False
    with progress_bar() as bar:
        task = bar.add_task(f"{Path(model).name}  grid", total=len(drawn.cells))
        try:
            for _ in drawn.draw():
                bar.update(task, completed=len(drawn.pictures))
        except KeyboardInterrupt:
            stopped = True
    if not drawn.pictures:
        raise KeyboardInterrupt
    picture = drawn.picture()
    save_image(picture, out, None if no_metadata else drawn.record(), overwrite=force)
    typer.echo(out)
    if stopped:
        note("Stopped; the cells that were done are kept.")
        raise typer.Exit(130)


def _plan(
    condition: str, count: int, seed: int | None, out: str | None, force: bool
) -> tuple[list[int], list[Path]]:
    """Seeds and files of the pictures; refuses what could not be written."""
    from ..pipelines.seeds import MAX_SEED, check_seed, random_seed

    folder = output_folder(out)
    seed = random_seed() if seed is None else check_seed(seed)
    seeds = [(seed + i) % (MAX_SEED + 1) for i in range(count)]
    if folder is None:
        check_picture_suffix(Path(out))
        if count > 1:
            raise InputError(
                f'"{out}" names one file, but {count} pictures are to be made: give a folder.'
            )
        files = [Path(out)]
        check_outputs(files, force)
    else:
        if out is not None:
            check_folder(folder)
        files = [folder / f"{slug(condition)}_{seed}.png" for seed in seeds]
        check_outputs([file for file in files if file.exists()][:1], force)
    return seeds, files


def _batches(condition: Any, seeds: list[int], files: list[Path]) -> list[tuple[Any, Any, Any]]:
    return [
        (condition, seeds[first : first + BATCH], files[first : first + BATCH])
        for first in range(0, len(seeds), BATCH)
    ]
