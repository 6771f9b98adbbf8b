"""The command line: ``tessera`` and ``python -m tessera``.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the machine failed (disk full,
out of memory) or a rerun differs, 2 bad argument or input, 130 stopped.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..modalities.errors import InputError
from .commands_audio import sound, speak
from .commands_edit import edit, grid
from .commands_image import image, info
from .commands_models import models
from .commands_shared import (
    DEFAULT_MODEL,
    AsJson,
    Force,
    check_outputs,
    load_pipeline,
    note,
    print_json,
)
from .commands_song import song
from .commands_tokens import decode, encode, reconstruct
from .commands_video import interpolate, video

# What an OSError says about the arguments; everything else is the machine's failure.
_INPUT_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Commands(TyperGroup):
    """Turns expected failures into one sentence and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Other libraries warn their developers,
                warnings.filterwarnings("always", module="tessera")  # ours warn users.
                warnings.showwarning = lambda message, *_, **__: note(f"Note: {message}")
                return super().invoke(ctx)
        except InputError as error:
            _fail(str(error), 2)
        except KeyboardInterrupt:
            note("Stopped.")
            raise typer.Exit(130) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # Whoever read our output has gone, as "head" does.
                raise
            place = "" if error.filename is None else f' "{error.filename}"'
            code = 2 if isinstance(error, _INPUT_ERRORS) else 1
            _fail(f"Could not read or write{place}: {error.strerror or error}.", code)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _out_of_memory(error):
                raise
            _fail("Out of memory: make fewer pictures at once, or close other programs.", 1)


def _fail(sentence: str, code: int) -> None:
    note(f"Error: {' '.join(sentence.split())}")
    raise typer.Exit(code)


def _out_of_memory(error: RuntimeError) -> bool:
    return any(sign in str(error) for sign in ("out of memory", "can't allocate memory"))


cli = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@cli.callback(invoke_without_command=True)
def about(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Type a sentence, get a picture, a clip or a voice: token-based generation on your own machine.

    \b
    tessera image "a sleepy red fox" -n 4 --seed 7 -o foxes/
    tessera video "a butterfly flapping" -o butterfly.webp
    tessera speak "The kettle is boiling." -o kettle.wav
    tessera reconstruct cat.png --tokens 1,8,32 -o grid.png
    tessera info foxes/a-sleepy-red-fox_7.png --rerun
    tessera app --open
    """
    if version:
        typer.echo(f"tessera {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


cli.command("image")(image)
cli.command("encode")(encode)
cli.command("decode")(decode)
cli.command("reconstruct")(reconstruct)
cli.command("info")(info)
cli.add_typer(models, name="models")
cli.add_typer(edit, name="edit")
cli.command("grid")(grid)
cli.command("speak")(speak)
cli.command("sound")(sound)
cli.command("song")(song)
cli.command("video")(video)
cli.command("interpolate")(interpolate)


@cli.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe that ships, or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="e.g. size=gpu training.steps=100"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
) -> None:
    """Train a model by a recipe.

    Prints the folder of the model. Several processes: torchrun --nproc-per-node 2 -m tessera train RECIPE.
    """
    from ..training.config import load_recipe

    loaded = load_recipe(recipe, settings or [])
    from ..training.trainer import train as run

    folder = run(loaded, resume)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(folder)


@cli.command()
def tokenize(
    data: Annotated[str, typer.Argument(help="A folder of pictures, shards, or a sticker pack.")],
    out: Annotated[Path, typer.Argument(help="The folder of token shards to make or go on with.")],
    tokenizer: Annotated[str, typer.Option(help="Name or folder of a tokenizer.")] = DEFAULT_MODEL,
    batch_size: Annotated[int, typer.Option(help="Pictures encoded together.")] = 8,
    shard_size: Annotated[int, typer.Option(help="Pictures a shard.")] = 1000,
) -> None:
    """Write a data set's tokens as WebDataset shards.

    Started again with the same arguments it goes on where it stopped. Several processes:
    torchrun --nproc-per-node 2 -m tessera tokenize DATA OUT.
    """
    from ..training.tokenize import tokenize_dataset

    tokenize_dataset(data, out, tokenizer, batch_size, shard_size)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(out)


@cli.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Name or folder of a pipeline or a tokenizer.")],
    data: Annotated[
        Path | None,
        typer.Option(help="A pack, a folder of captioned pictures or of recordings, or shards."),
    ] = None,
    names: Annotated[int, typer.Option(help="Names drawn of each split.")] = 200,
    pictures: Annotated[int, typer.Option(help="Pictures reconstructed.")] = 256,
    recordings: Annotated[int, typer.Option(help="Recordings reconstructed by a codec.")] = 40,
    voices: Annotated[
        str | None, typer.Option(help="Of a speech pack, e.g. kathleen; commas between.")
    ] = None,
    sentences: Annotated[int, typer.Option(help="Spoken by a voice, for its failures.")] = 200,
    minutes: Annotated[float, typer.Option(help="Of a voice's long text; 0 leaves it out.")] = 5.0,
    seeds: Annotated[int, typer.Option(help="Pictures of one name, for diversity.")] = 4,
    repeated: Annotated[int, typer.Option(help="Names drawn with all seeds.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Pictures worked on together.")] = 8,
    seed: Annotated[int, typer.Option(help="Picks names and pictures.")] = 0,
    lpips_backbone: Annotated[
        Path | None, typer.Option(help="torchvision's AlexNet weights, for LPIPS.")
    ] = None,
    i3d: Annotated[
        Path | None, typer.Option(help="I3D as TorchScript, for the distance of clips.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A JSON file to write.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on data of its kind.

    How well it keeps and draws pictures or clips, makes frames between frames, keeps or makes sound,
    or speaks.
    """
    if out is not None:
        check_outputs([out], force)
    from ..pipelines.loading import pipeline_class

    pipeline = pipeline_class(model)
    if pipeline == "TextToSpeechPipeline":
        from ..evaluation.voice import evaluate_voice

        counts = (recordings, sentences, minutes, seed)
        report = evaluate_voice(model, data or Path("data/speech"), *counts, out=out)
        _show_report(report, out, as_json)
        return
    if pipeline == "TextToSoundPipeline":
        from ..evaluation.sound import evaluate_sound

        report = evaluate_sound(model, data or Path("data/sounds"), seed=seed, out=out)
        _show_report(report, out, as_json)
        return
    from ..pipelines.frame_interpolation import makes_frames_between
    from ..tokenizers.auto import tokenizer_class
    from ..tokenizers.base import AudioTokenizer, Tokenizer

    if makes_frames_between(model):
        from ..evaluation.video import evaluate_interpolation

        clips = data or Path("data/clips")
        report = evaluate_interpolation(model, clips, lpips_backbone=lpips_backbone, out=out)
        _show_report(report, out, as_json)
        return
    kind = tokenizer_class(model)
    # Tokenizers of pictures have the one frame of the base class.
    moves = kind is not None and issubclass(kind, Tokenizer) and kind.num_frames != 1
    if (pipeline or "").endswith("ToVideoPipeline") or (pipeline is None and moves):
        from ..evaluation.video import evaluate_video

        report = evaluate_video(
            model,
            data or Path("data/animated"),
            pictures,
            names,
            seed,
            lpips_backbone,
            i3d,
            out=out,
        )
        _show_report(report, out, as_json)
        return
    if kind is not None and issubclass(kind, AudioTokenizer):
        from ..evaluation.audio import evaluate_audio

        speakers = None if voices is None else voices.split(",")
        data = data or Path("data/speech")
        report = evaluate_audio(model, data, recordings, seed, speakers, out)
        _show_report(report, out, as_json)
        return
    from ..evaluation.evaluate import evaluate as run

    report = run(
        model,
        data or Path("data/stickers"),
        names=names,
        pictures=pictures,
        seeds=seeds,
        repeated=repeated,
        batch_size=batch_size,
        seed=seed,
        lpips_backbone=lpips_backbone,
        out=out,
    )
    _show_report(report, out, as_json)


def _show_report(report: dict[str, Any], out: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(report)
    elif out is not None:
        typer.echo(out)


@cli.command("app")
def app_command(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 7860.")] = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Reachable from other machines; needs --auth.")
    ] = False,
    auth: Annotated[str | None, typer.Option(metavar="USER:PASS", help="Ask for a login.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    share: Annotated[
        bool, typer.Option("--share", help="A public address by Gradio; needs --auth.")
    ] = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Write clean files, without their settings.")
    ] = False,
    outputs: Annotated[Path, typer.Option(help="Where pictures are kept.")] = Path("outputs"),
    max_upload: Annotated[str, typer.Option(help="Largest upload, e.g. 100mb.")] = "50mb",
    model: Annotated[str, typer.Option(help="Name or folder of a model.")] = DEFAULT_MODEL,
    add: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a further model of sound or video; may be given again."),
    ] = None,
) -> None:
    """Open the app in a browser."""
    if (listen or share) and auth is None:
        raise InputError(
            f"--{'listen' if listen else 'share'} lets others in: set a login with --auth user:pass."
        )
    if auth is not None and not all(auth.partition(":")):
        raise InputError("--auth must be user:pass, with a colon between the two.")
    from .main import launch

    launch(
        port=port,
        listen=listen,
        auth=auth,
        open_browser=open_browser,
        share=share,
        metadata=not no_metadata,
        outputs=outputs,
        max_upload=max_upload,
        model=model,
        add=add or (),
    )


@cli.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, device, disk and models; test itself."""
    from importlib.metadata import version

    import torch

    from ..weights.registry import list_models

    shipped = list_models(shipped=True)
    rows: dict[str, Any] = {"tessera": __version__, "python": platform.python_version()}
    rows |= {name: version(name) for name in ("torch", "diffusers", "gradio", "pillow")}
    rows["system"] = f"{platform.system()} {platform.machine()}"
    rows["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows["threads"] = torch.get_num_threads()
    rows["free disk"] = f"{shutil.disk_usage('.').free / 1e9:.1f} GB in {Path.cwd()}"
    rows["ffmpeg"] = shutil.which("ffmpeg") or "not found; not needed"
    rows["shipped models"] = ", ".join(shipped) or "none"
    if not as_json:
        for key, value in rows.items():
            typer.echo(f"{key:18}{value}")
    try:
        rows["self test"] = _self_test(shipped)
    except Exception as error:  # Whatever fails is the answer to the question that was asked.
        rows["self test"] = f"FAILED: {type(error).__name__}: {error}"
    if as_json:
        print_json(rows)
    else:
        typer.echo(f"{'self test':18}{rows['self test']}")
    if rows["self test"].startswith("FAILED"):
        raise typer.Exit(1)


def _self_test(shipped: list[str]) -> str:
    """Make a picture (or, with no model, take a plain one), write it, and read it back."""
    from PIL import Image, ImageChops

    from ..modalities.image import load_image, read_record, save_image
    from ..modalities.metadata import make_record

    picture, what = Image.new("RGB", (64, 64), "#2f6f4f"), "a plain picture"
    start = time.perf_counter()
    if DEFAULT_MODEL in shipped:
        from ..pipelines.seeds import seed_generators

        pipeline = load_pipeline(DEFAULT_MODEL)
        start, what = time.perf_counter(), f"a picture by {DEFAULT_MODEL}"
        picture = pipeline("red heart", generator=seed_generators(0, 1), num_tokens=8).images[0]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "test.png"
        save_image(picture, path, make_record("doctor", DEFAULT_MODEL, "red heart", 0))
        if ImageChops.difference(load_image(path), picture).getbbox() is not None:
            raise RuntimeError("the picture changed when it was saved")
        if (read_record(path) or {}).get("prompt") != "red heart":
            raise RuntimeError("the settings in the picture could not be read back")
    return f"ok: {what} made and read back in {time.perf_counter() - start:.1f} s"


def main() -> None:
    """Run the command line and exit."""
    if hasattr(sys.stdout, "reconfigure"):  # A prompt's letters must not fail on an old terminal.
        sys.stdout.reconfigure(errors="replace")
        sys.stderr.reconfigure(errors="replace")
    cli(prog_name="tessera")
