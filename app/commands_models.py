"""``tessera models``: what can be loaded by name, under which terms, and conversion to our format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..modalities.errors import InputError
from ..weights.registry import ModelInfo, find_model, list_models, model_info
from .commands_shared import AsJson, Force, note, print_json

models = typer.Typer(rich_markup_mode=None)


@models.callback(invoke_without_command=True)
def all_models(ctx: typer.Context) -> None:
    """List, show and convert models."""
    if ctx.invoked_subcommand is None:
        list_command()


@models.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help='Part of a name, or wildcards: "titok*".')] = "*",
    task: Annotated[str | None, typer.Option(help="Only of this task.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the models that can be loaded by name, shipped ones first."""
    wildcards = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    infos = [model_info(name) for name in list_models(wildcards, task)]
    if not infos and (pattern != "*" or task is not None):
        of_task = "" if task is None else f" of the task {task}"
        raise InputError(f'No model{of_task} matches "{pattern}": see tessera models list.')
    if as_json:
        print_json([_as_dict(info) for info in infos])
        return
    rows = [("name", "task", "tokens", "size", "weights' licence")]
    for info in infos:
        size = "shipped, " if info.shipped else ""
        size += _size(info)
        licence = ("NON-COMMERCIAL " if info.non_commercial else "") + info.license_weights
        rows.append((info.name, info.task, info.tokens or "-", size, licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


@models.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A name of tessera models list, or a hub id.")],
    as_json: AsJson = False,
) -> None:
    """Show one model: what it is, its licences, and where it comes from."""
    info = model_info(name)
    if as_json:
        print_json(_as_dict(info))
        return
    rows = {
        "name": info.name,
        "title": info.title,
        "task": info.task,
        "tokens": info.tokens,
        "ids of a token": info.vocab_size,
        "parameters": None if info.parameters is None else f"{info.parameters:g} M",
        "size": _size(info),
        "code licence": info.license_code,
        "weights licence": info.license_weights,
        "commercial use": "not allowed" if info.non_commercial else None,
        "paper": None if info.paper is None else f"https://arxiv.org/abs/{info.paper}",
        "source": _source(info),
        "files": ", ".join(info.files) or None,
        "class": info.model.replace(":", "."),
    }
    for key, value in rows.items():
        if value is not None:
            typer.echo(f"{key:18}{value}")


@models.command("convert")
def convert(
    name: Annotated[str, typer.Argument(help="The checkpoint, or its system if it has only one.")],
    file: Annotated[Path, typer.Argument(help="Its weight file, or the folder of its files.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    force: Force = False,
) -> None:
    """Turn published weights into a folder that from_pretrained loads.

    Only tensors are read: a pickle that holds more is refused, since it could run code.
    """
    info = _published(name)
    _check_folder(out, force)
    from ..training.checkpoints import replace_folder
    from ..weights.loading import find_files, licence_notice, load_published

    notice = licence_notice(info)
    if notice is not None:
        note(f"Note: {notice}")
    model = load_published(info, find_files(info, file))
    replace_folder(out, model.save_pretrained)
    typer.echo(out)


def _published(name: str) -> ModelInfo:
    info = find_model(name)
    if info is None:
        infos = map(model_info, list_models(shipped=False))
        variants = [each for each in infos if each.system == name.lower()]
        if len(variants) > 1:
            raise InputError(
                f'"{name}" has several checkpoints: give one of '
                f"{', '.join(each.name for each in variants)}."
            )
        info = variants[0] if variants else model_info(name)
    if info.shipped:
        raise InputError(f'"{info.name}" ships with Tessera and needs no conversion.')
    return info


def _check_folder(out: Path, force: bool) -> None:
    """Only a model's folder, or an empty one, may be replaced."""
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
            raise InputError(f'"{out}" holds something else: choose another folder.')
        if any(out.iterdir()) and not force:
            raise InputError(f'"{out}" exists already: choose another folder or pass -f.')
    if not out.absolute().parent.is_dir():
        raise InputError(
            f'Could not write "{out}": the folder "{out.parent}" does not exist, create it.'
        )


def _as_dict(info: ModelInfo) -> dict[str, Any]:
    return {**vars(info), "shipped": info.shipped, "source": _source(info)}


def _source(info: ModelInfo) -> str:
    return str(info.folder) if info.shipped else f"https://huggingface.co/{info.hub_id}"


def _size(info: ModelInfo) -> str:
    if info.size_mb is None:
        return "-"
    return f"{info.size_mb / 1000:.1f} GB" if info.size_mb >= 1000 else f"{info.size_mb:.0f} MB"
