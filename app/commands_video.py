"""``tessera video`` and ``tessera interpolate``, and ``tessera reconstruct`` of clips."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..modalities.errors import InputError
from .commands_image import Guidance, Out, Steps, Temperature, TopK, TopP, weights_sha256
from .commands_shared import (
    AsJson,
    Force,
    Metadata,
    check_outputs,
    device,
    load_tokenizer,
    media_paths,
    note,
    print_json,
    progress_bar,
    quiet_diffusers,
)
from .video_records import (
    clip_record,
    one_round,
    read_scene,
    recordable,
    scenes_told,
    smooth_record,
    told,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..modalities.video import Video
    from ..pipelines.frame_interpolation import FrameInterpolationPipeline
    from ..pipelines.video_generation import VideoGenerationPipeline, VideoPipelineOutput
    from ..tokenizers.base import Tokenizer

DEFAULT_VIDEO = "animated-sticker"
MOVING_SUFFIXES = (".gif", ".apng")
# Pictures by name, which may move.
MAYBE_MOVING = (".webp", ".png", ".avif")

Rate = Annotated[float | None, typer.Option("--fps", help="Frames a second.")]
Loop = Annotated[
    bool, typer.Option("--loop/--once", help="Whether an animation starts again at its end.")
]


def is_clip(file: Path) -> bool:
    """Whether a file is a video or moves, by its suffix and of WebP, PNG and AVIF its frames."""
    from ..modalities.video import VIDEO_SUFFIXES, count_pictures

    suffix = file.suffix.lower()
    if suffix in MAYBE_MOVING:
        return count_pictures(file) > 1
    return suffix in (*VIDEO_SUFFIXES, *MOVING_SUFFIXES)


def check_video_suffix(path: Path) -> None:
    from ..modalities.video import SAVE_SUFFIXES

    if path.suffix.lower() not in SAVE_SUFFIXES:
        raise InputError(
            f'Could not write "{path}": its name must end in {", ".join(SAVE_SUFFIXES)}.'
        )


def video(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What moves, or a class by name or number.", show_default=False),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Default: as long as the model's clips are.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="In place of --seconds.")] = None,
    frame_rate: Rate = None,
    story: Annotated[
        list[str] | None,
        typer.Option(
            "--story", help='A scene and how long it lasts, "2: a seed falls"; several in order.'
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="A picture that the clip begins with.")
    ] = None,
    go_on: Annotated[
        Path | None, typer.Option("--continue", help="A clip whose last frames it goes on from.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=100, help="Variants.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Of the first clip; default: random, and printed.")
    ] = None,
    out: Out = None,
    model: Annotated[str, typer.Option(help="Name or folder of a model.")] = DEFAULT_VIDEO,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    steps: Steps = None,
    loop: Loop = True,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Make a clip from a sentence, a story, a class or a picture.

    Clip i has the seed SEED + i and is the same, whatever -n is. The format is animated WebP, GIF or
    PNG, MP4 or WebM by the suffix of -o, WebP in a folder.
    """
    if story and prompt is not None:
        raise InputError("Give a prompt or --story, not both.")
    if image is not None and (go_on is not None or story):
        raise InputError("--image begins a clip of one prompt: leave --continue and --story out.")
    if seconds is not None and frames is not None:
        raise InputError("--seconds and --frames both say how long: leave one of them out.")
    if seconds is not None and not 0 < seconds < 1e6:
        raise InputError(f"A clip must last longer than 0 seconds, got {seconds:g}.")
    if story and (seconds is not None or frames is not None):
        raise InputError("A story has its own length: leave --seconds and --frames out.")
    for file in (image, go_on):
        if file is not None and not file.is_file():
            raise InputError(f'There is no file "{file}": check the path.')
    scenes = None if not story else [read_scene(text) for text in story]
    what, source = prompt if scenes is None else told(scenes), image or go_on
    from ..pipelines.seeds import MAX_SEED, check_seed, random_seed

    seed = random_seed() if seed is None else check_seed(seed)
    seeds = [(seed + i) % (MAX_SEED + 1) for i in range(count)]
    title = what or (source or Path()).stem
    paths = media_paths(out, title, seeds, "clip", ".webp", check_video_suffix, force)
    pipeline = load_video(model, moving_picture=image is not None)
    condition = getattr(pipeline, "condition", "text")
    if what is None and not (condition == "frames" and source and pipeline.clip is None):
        raise InputError('Say what moves, for example "a butterfly flapping".')
    given = {
        "guidance_scale": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_steps": steps,
    }
    rate = pipeline.config.frame_rate if frame_rate is None else frame_rate
    if seconds is not None:
        frames = max(1, round(seconds * rate))
    settings = {"num_frames": frames, "frame_rate": rate}
    settings |= {name: given[name] for name in given if given[name] is not None}
    settings = {**pipeline.settings, **settings}
    sha256 = weights_sha256(pipeline.name)
    start, saved = time.perf_counter(), []
    try:
        with progress_bar() as bar:
            task = bar.add_task(f"{Path(pipeline.name).name}  seed {seed}", total=None)
            for each, path in zip(seeds, paths, strict=True):
                for partial in stream(pipeline, prompt, scenes, image, go_on, each, settings):
                    done = len(saved) * partial.total + partial.step
                    bar.update(task, total=count * partial.total, completed=done)
                saved.append(
                    _save(
                        pipeline,
                        partial.output,
                        path,
                        what or "",
                        settings,
                        sha256,
                        loop,
                        force,
                        not no_metadata,
                        None if source is None else source.name,
                        scenes is not None,
                    )
                )
    finally:  # Also after Ctrl-C or with a full disk: what is there is named.
        if as_json:
            took = round(time.perf_counter() - start, 2)
            print_json({"model": pipeline.name, "took": took, "videos": saved})
        else:
            for each in saved:
                typer.echo(each["path"])


def interpolate(
    files: Annotated[
        list[Path], typer.Argument(help="A clip, or two pictures or more.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Default: FILE_smooth.mp4 here.")
    ] = None,
    factor: Annotated[int, typer.Option(min=2, max=64, help="Times as many frames.")] = 2,
    frame_rate: Annotated[
        float | None,
        typer.Option("--fps", help="Of the result; default: so that it lasts as long."),
    ] = None,
    input_rate: Annotated[
        float | None,
        typer.Option("--input-fps", help="Read the clip at this rate, if its own is variable."),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(help="Side of the squares that large frames are made in; 0: never."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a model; default: the first that ships.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Make frames between the frames of a clip, or between pictures.

    The clip becomes smoother, or slower.

    An MP4 or WebM is written while it is made, so a long clip needs no more memory than a short one.
    Sound is left out.
    """
    out = out or Path(f"{files[0].stem}_smooth.mp4")
    check_video_suffix(out)
    check_outputs([out], force)
    for file in files:
        if not file.is_file():
            raise InputError(f'There is no file "{file}": check the path.')
    if len(files) > 1 and any(is_clip(file) for file in files):
        raise InputError("Give one clip, or several pictures.")
    pipeline = load_interpolation(model)
    settings = {"factor": factor, "frame_rate": frame_rate, "input_frame_rate": input_rate}
    record = smooth_record(pipeline, settings, weights_sha256(pipeline.name))
    start = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task(f"{Path(pipeline.name).name}  x{factor}", total=None)
        frames, rate = pipeline.convert(
            files[0] if len(files) == 1 else files,
            out,
            record=None if no_metadata else record,
            overwrite=force,
            callback=lambda done, total: bar.update(task, completed=done, total=total),
            tile=tile,
            **settings,
        )
    if as_json:
        took = round(time.perf_counter() - start, 2)
        shown = {"path": str(out), "frames": frames, "frame_rate": rate, "took": took}
        print_json({"model": pipeline.name, **shown})
    else:
        note(f"{frames} frames, {rate:g} a second")
        typer.echo(out)


def reconstruct_clip(
    file: Path, out: Path, tokenizer_name: str, force: bool, as_json: bool, no_metadata: bool
) -> None:
    """Write what a video tokenizer keeps of a clip, and say in how many tokens."""
    import math

    from ..modalities.metadata import make_record
    from ..modalities.video import save_video
    from ..pipelines.reconstruction import ReconstructionPipeline

    check_video_suffix(out)
    check_outputs([out], force)
    if not file.is_file():
        raise InputError(f'There is no file "{file}": check the path.')
    tokenizer = load_video_tokenizer(tokenizer_name)
    with progress_bar() as bar:
        bar.add_task(f"{Path(tokenizer_name).name}  reconstructing", total=None)
        result = ReconstructionPipeline(tokenizer)(file)
    frames, tokens, rate = result.videos[0], result.tokens[0], result.frame_rates[0]
    record = make_record(
        "ReconstructionPipeline",
        tokenizer_name,
        "",
        0,
        settings={"num_frames": frames.shape[1], "frame_rate": rate},
        tokens=recordable(tokens),
        tokenizer=tokenizer_name,
        device=tokenizer.device,
        dtype=tokenizer.dtype,
    )
    save_video(frames, out, rate, None if no_metadata else record, overwrite=force)
    bits = None
    if tokenizer.vocab_size is not None:
        bits = len(tokens) * math.log2(tokenizer.vocab_size)
    report = {
        "path": str(out),
        "tokenizer": tokenizer_name,
        "frames": frames.shape[1],
        "frame_rate": rate,
        "tokens": len(tokens),
        "bits": None if bits is None else math.ceil(bits),
        "psnr": result.psnr[0],
    }
    if as_json:
        print_json(report)
        return
    size = "" if bits is None else f", {bits / frames.shape[1]:.0f} bits a frame"
    note(f"{frames.shape[1]} frames: {len(tokens)} tokens{size}   PSNR {result.psnr[0]:.1f} dB")
    typer.echo(out)


def load_video(model: str, moving_picture: bool = False) -> VideoGenerationPipeline:
    """A model that makes video, on the best device.

    Args:
        moving_picture: as a pipeline that begins with a picture.
    """
    from ..pipelines.auto import load_video_pipeline
    from ..pipelines.image_to_video import ImageToVideoPipeline

    quiet_diffusers()
    load = ImageToVideoPipeline.from_pretrained if moving_picture else load_video_pipeline
    return load(model).to(device())


def load_interpolation(model: str | None) -> FrameInterpolationPipeline:
    """A model that makes frames between frames, on the best device."""
    from ..pipelines.frame_interpolation import TASK, FrameInterpolationPipeline
    from ..weights.registry import list_models

    quiet_diffusers()
    # Those that ship are listed first.
    model = model or list_models(task=TASK)[0]
    return FrameInterpolationPipeline.from_pretrained(model).to(device())


def load_video_tokenizer(name: str) -> Tokenizer:
    """A video tokenizer by name or folder.

    Raises:
        InputError: no such tokenizer, or one of something else.
    """
    from ..tokenizers.auto import tokenizer_class
    from ..tokenizers.base import Tokenizer
    from ..weights.registry import list_models

    kind = tokenizer_class(name)
    # Tokenizers of pictures have the one frame of the base class.
    if kind is None or not issubclass(kind, Tokenizer) or kind.num_frames == 1:
        known = ", ".join(list_models(task="video-tokenizer"))
        raise InputError(f'There is no video tokenizer "{name}": give a folder or one of {known}.')
    return load_tokenizer(name)


def stream(
    pipeline: VideoGenerationPipeline,
    prompt: str | None,
    scenes: list[tuple[str, float]] | None,
    image: Path | None,
    go_on: Path | Video | None,
    seed: int,
    settings: dict[str, Any],
) -> Any:
    """The pipeline's ``stream`` of one clip."""
    options = {"seed": seed, "output_type": "pt", **settings}
    if pipeline.condition == "frames":
        if image is None and go_on is None:
            raise InputError(
                f'"{pipeline.name}" goes on from frames: pass --image or --continue with a file.'
            )
        return pipeline.stream(image or go_on, prompt, **options)
    if pipeline.condition == "class":
        if scenes is not None:
            raise InputError(f'"{pipeline.name}" draws classes and tells no stories.')
        return pipeline.stream(prompt, start=go_on, **options)
    return pipeline.stream(prompt, story=scenes, start=go_on, **options)


def rerun(file: Path, record: dict[str, Any], model: str) -> dict[str, Any]:
    """Make the clip of a record again and hold it against the file.

    Raises:
        InputError: the record does not hold what is needed.
    """
    from ..modalities.metadata import encode_tokens
    from ..modalities.video import VideoReader, save_video

    if record["pipeline"] == "ReconstructionPipeline":
        frames, rate, tokens = _decode_again(file, record, model)
    elif record["pipeline"] in ("TextToVideoPipeline", "ClassToVideoPipeline"):
        output = _draw_again(file, record, model)
        frames, rate, tokens = output.frames[0], output.frame_rate, one_round(output)
        tokens = None if tokens is None else encode_tokens(tokens)
    else:
        raise InputError(f'"{file}" was made by {record["pipeline"]}, which cannot be rerun here.')
    same_weights = record["sha256"] in (None, weights_sha256(model))
    with TemporaryDirectory() as folder:  # Through the same format, since MP4 is not exact.
        again = Path(folder) / f"again{file.suffix.lower()}"
        save_video(frames, again, rate)
        with VideoReader(file) as old, VideoReader(again) as new:
            result = {"identical": False, "same_tokens": None, "difference": None}
            if record["tokens"] is not None and tokens is not None:
                result["same_tokens"] = tokens == record["tokens"]
            shapes = [(r.num_frames, r.width, r.height) for r in (old, new)]
            if shapes[0] != shapes[1]:
                was, now = (f"{n} frames of {w}x{h}" for n, w, h in shapes)
                verdict = f"differs: {was} became {now}"
            else:
                pairs = zip(
                    old.frames(range(old.num_frames)),
                    new.frames(range(new.num_frames)),
                    strict=True,
                )
                most = max(int(abs(a.astype("i2") - b.astype("i2")).max()) for a, b in pairs)
                result["difference"] = most
                result["identical"] = most == 0 and result["same_tokens"] is not False
                verdict = "identical" if result["identical"] else f"differs: by up to {most} of 255"
    if not result["identical"] and not same_weights:
        verdict += "; the model's weights are not those that made it"
    return {**result, "verdict": verdict}


def _save(
    pipeline: VideoGenerationPipeline,
    output: VideoPipelineOutput,
    path: Path,
    what: str,
    settings: dict[str, Any],
    sha256: str | None,
    loop: bool,
    force: bool,
    metadata: bool,
    begins_with: str | None,
    story: bool,
) -> dict[str, Any]:
    """Write a clip, and tell of it."""
    from ..modalities.video import save_video

    record = clip_record(pipeline, output, what, settings, sha256, begins_with, story)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames, kept = output.frames[0], record if metadata else None
    save_video(frames, path, output.frame_rate, kept, loop=loop, overwrite=force)
    shown = {"prompt": record["prompt"], "seed": record["seed"], "frames": frames.shape[1]}
    return {"path": str(path), **shown, "frame_rate": output.frame_rate}


def _draw_again(file: Path, record: dict[str, Any], model: str) -> VideoPipelineOutput:
    settings = dict(record["settings"])
    if None in (record["prompt"], record["seed"]):
        raise InputError(f'"{file}" has no prompt or no seed in its settings.')
    if settings.get("begins_with") is not None:
        raise InputError(
            f'"{file}" was made from "{settings["begins_with"]}", which it does not hold: make it '
            "again with tessera video."
        )
    pipeline = load_video(model)
    prompt, scenes = record["prompt"], None
    names = ("frame_rate", *pipeline.settings)
    options = {name: settings[name] for name in names if settings.get(name) is not None}
    if settings.get("story"):
        prompt, scenes = None, scenes_told(prompt)
    else:
        options["num_frames"] = settings.get("num_frames")
    if pipeline.condition == "class":
        prompt = settings.get("class_label", prompt)
    with progress_bar() as bar:
        task = bar.add_task(f"{Path(model).name}  rerun", total=None)
        for partial in stream(pipeline, prompt, scenes, None, None, record["seed"], options):
            bar.update(task, completed=partial.step, total=partial.total)
            if partial.step == settings.get("stopped_at"):
                return partial.finish()
    return partial.output


def _decode_again(file: Path, record: dict[str, Any], model: str) -> tuple[Tensor, float, str]:
    from ..modalities.metadata import decode_tokens
    from ..pipelines.video_reconstruction import decode_clip

    settings = record["settings"]
    frames, rate = settings.get("num_frames"), settings.get("frame_rate")
    if record["tokens"] is None or not frames or not rate:
        raise InputError(f'"{file}" has no tokens in its settings: it cannot be made again.')
    tokenizer = load_video_tokenizer(model)
    tokens = decode_tokens(record["tokens"])[None].to(tokenizer.device)
    return decode_clip(tokenizer, tokens, frames)[0].float().cpu(), rate, record["tokens"]
