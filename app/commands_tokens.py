"""``tessera encode``, ``decode`` and ``reconstruct``: pictures (recordings, clips) as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..modalities.errors import InputError
from .commands_audio_tokens import (
    DEFAULT_CODEC,
    check_audio_suffix,
    decode_recording,
    encode_recording,
    is_audio,
    reconstruct_recording,
)
from .commands_shared import (
    DEFAULT_MODEL,
    AsJson,
    Force,
    Metadata,
    check_outputs,
    check_picture_suffix,
    load_tokenizer,
    note,
    print_json,
    progress_bar,
    token_lengths,
)
from .commands_video import DEFAULT_VIDEO, is_clip, reconstruct_clip

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..tokenizers.base import Tokenizer

Media = Annotated[Path, typer.Argument(help="A picture or a recording.")]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help=f"Name or folder; default: {DEFAULT_MODEL}, of recordings {DEFAULT_CODEC}, of clips "
        f"{DEFAULT_VIDEO}.",
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Of the decoder.")]
Seed = Annotated[int, typer.Option(help="Of the decoder's noise.")]


def encode(
    file: Media,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: FILE.tok here.")] = None,
    tokenizer_name: TokenizerName = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a picture or a recording as its tokens, a .tok file."""
    out = out or Path(f"{file.stem}.tok")
    if out.suffix.lower() != ".tok":
        raise InputError(f'Could not write "{out}": its name must end in .tok.')
    check_outputs([out], force)
    if is_audio(file):
        encode_recording(file, out, tokenizer_name or DEFAULT_CODEC, force, as_json)
        return
    tokenizer_name = tokenizer_name or DEFAULT_MODEL
    from ..modalities.image import load_image
    from ..modalities.token_file import write_tokens
    from ..pipelines.reconstruction import ReconstructionPipeline

    picture = load_image(file)
    tokenizer = load_tokenizer(tokenizer_name)
    count = tokenizer.num_tokens
    result = ReconstructionPipeline(tokenizer)(picture, num_tokens=[count])
    written = write_tokens(out, result.tokens[0], tokenizer_name, tokenizer.vocab_size, force)
    psnr = result.psnr[count][0]
    if as_json:
        print_json(
            {
                "path": str(out),
                "tokenizer": written.tokenizer,
                "tokens": count,
                "bits": written.bits or None,
                "bytes": written.payload_bytes,
                "psnr": psnr,
            }
        )
        return
    size = f"{written.bits} bit" if written.bits else f"{written.tokens.shape[1]} values"
    note(f"{count} tokens x {size} = {written.payload_bytes} bytes   PSNR {psnr:.1f} dB")
    typer.echo(out)


def decode(
    file: Annotated[Path, typer.Argument(help="A .tok file.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Default: FILE.png, of a recording FILE.wav, here."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Use only the first ones.")] = None,
    tokenizer_name: Annotated[
        str | None, typer.Option("--tokenizer", help="Default: the one that the file names.")
    ] = None,
    steps: Steps = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Make the picture or the recording of a .tok file again."""
    if out is not None:
        check_outputs([out], force)
    from ..modalities.image import save_image
    from ..modalities.metadata import make_record
    from ..modalities.token_file import read_tokens
    from ..pipelines.seeds import check_seed
    from ..tokenizers.auto import tokenizer_class
    from ..tokenizers.base import AudioTokenizer
    from ..weights.registry import find_model

    content = read_tokens(file)
    check_seed(seed)
    if tokenizer_name is None:
        # A stranger's file may name a registered tokenizer, never a folder.
        if find_model(content.tokenizer) is None:
            raise InputError(
                f'"{file}" was written by "{content.tokenizer}", which is no name of a model: pass '
                "the folder of that tokenizer as --tokenizer."
            )
        tokenizer_name = content.tokenizer
    kind = tokenizer_class(tokenizer_name)
    if kind is not None and issubclass(kind, AudioTokenizer):
        out = out or Path(f"{file.stem}.wav")
        check_audio_suffix(out)
        check_outputs([out], force)
        if tokens is not None:
            raise InputError("A recording is decoded from all of its tokens: leave --tokens out.")
        decode_recording(content, out, tokenizer_name, force, as_json, no_metadata)
        return
    out = out or Path(f"{file.stem}.png")
    check_picture_suffix(out)
    check_outputs([out], force)
    count = len(content.tokens) if tokens is None else tokens
    if not 1 <= count <= len(content.tokens):
        raise InputError(f'"{file}" holds 1 to {len(content.tokens)} tokens, got --tokens {count}.')
    tokenizer = load_tokenizer(tokenizer_name)
    if count < tokenizer.num_tokens and not tokenizer.ordered:
        raise InputError(
            f'"{tokenizer_name}" decodes only all of its {tokenizer.num_tokens} tokens, got {count}.'
        )
    ids = content.tokens[:count]
    picture = decode_picture(tokenizer, ids, seed, steps)
    record = None
    if not no_metadata:
        settings = {"num_tokens": count, "width": picture.width, "height": picture.height}
        if steps is not None:
            settings["num_inference_steps"] = steps
        record = make_record(
            "ReconstructionPipeline",
            tokenizer_name,
            "",
            seed,
            settings=settings,
            tokens=ids if content.bits else None,
            tokenizer=tokenizer_name,
            device=tokenizer.device,
            dtype=tokenizer.dtype,
        )
    save_image(picture, out, record, overwrite=force)
    if as_json:
        print_json({"path": str(out), "tokenizer": tokenizer_name, "tokens": count, "seed": seed})
    else:
        typer.echo(out)


def reconstruct(
    file: Annotated[Path, typer.Argument(help="A picture, a recording or a clip.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Default: FILE_tokens.png, .wav or .webp here."),
    ] = None,
    tokenizer_name: TokenizerName = None,
    tokens: Annotated[
        str | None, typer.Option(help="How many to keep, e.g. 1,8,32; default: powers of two.")
    ] = None,
    steps: Steps = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
    no_metadata: Metadata = False,
) -> None:
    """Show what tokens keep of a picture, a recording or a clip.

    Of a picture: writes one with the original and each reconstruction, and lists their PSNR. Of a
    recording: writes it from its tokens, and says their bit rate and how long the work took. Of a
    clip: writes it from its tokens, and says how many they are and the PSNR.
    """
    if is_clip(file):
        if tokens is not None or steps is not None:
            raise InputError("--tokens and --steps are of pictures: leave them out.")
        out = out or Path(f"{file.stem}_tokens.webp")
        reconstruct_clip(file, out, tokenizer_name or DEFAULT_VIDEO, force, as_json, no_metadata)
        return
    if is_audio(file):
        out = out or Path(f"{file.stem}_tokens.wav")
        check_audio_suffix(out)
        check_outputs([out], force)
        if tokens is not None or steps is not None:
            raise InputError("--tokens and --steps are of pictures: leave them out.")
        name = tokenizer_name or DEFAULT_CODEC
        reconstruct_recording(file, out, name, force, as_json, no_metadata)
        return
    tokenizer_name = tokenizer_name or DEFAULT_MODEL
    out = out or Path(f"{file.stem}_tokens.png")
    check_picture_suffix(out)
    check_outputs([out], force)
    lengths = token_lengths(tokens)
    from ..modalities.image import fit_image, load_image, save_image
    from ..modalities.metadata import make_record
    from ..pipelines.reconstruction import ReconstructionPipeline
    from ..pipelines.seeds import check_seed

    check_seed(seed)
    picture = load_image(file)
    tokenizer = load_tokenizer(tokenizer_name)
    with progress_bar() as bar:
        task = bar.add_task(f"{Path(tokenizer_name).name}  reconstructing", total=None)
        result = ReconstructionPipeline(tokenizer)(
            picture,
            lengths,
            seed,
            steps,
            callback=lambda done, total: bar.update(task, completed=done, total=total),
        )
    original = fit_image(picture, tokenizer.image_size, mode="contain")
    cells = {"original": original}
    cells |= {f"{n} tokens": pictures[0] for n, pictures in result.reconstructions.items()}
    record = make_record(
        "ReconstructionPipeline",
        tokenizer_name,
        "",
        seed,
        settings={"tokens": ",".join(map(str, result.reconstructions))},
        tokenizer=tokenizer_name,
        device=tokenizer.device,
        dtype=tokenizer.dtype,
    )
    save_image(_labelled_grid(cells), out, None if no_metadata else record, overwrite=force)
    psnr = {n: values[0] for n, values in result.psnr.items()}
    if as_json:
        print_json({"path": str(out), "tokenizer": tokenizer_name, "psnr": psnr})
        return
    note("tokens   PSNR")
    for n, value in psnr.items():
        note(f"{n:6}   {value:.1f} dB")
    typer.echo(out)


def decode_picture(
    tokenizer: Tokenizer, tokens: Tensor, seed: int, steps: int | None = None
) -> Image:
    """Tokens ``[k]`` or ``[k, latent_dim]`` -> a picture."""
    from ..modalities.image import to_pil
    from ..pipelines.reconstruction import decode_tokens

    return to_pil(decode_tokens(tokenizer, tokens[None].to(tokenizer.device), [seed], steps))[0]


def _labelled_grid(cells: dict[str, Any], columns: int = 5) -> Image:
    """Pictures in reading order, each over its name."""
    from PIL import Image, ImageDraw, ImageFont

    from ..modalities.image import image_grid

    font = ImageFont.load_default(11)
    labelled = []
    for name, picture in cells.items():
        cell = Image.new("RGB", (max(picture.width, 60), picture.height + 16), "white")
        cell.paste(picture, ((cell.width - picture.width) // 2, 0))
        place = cell.width // 2, picture.height + 8
        ImageDraw.Draw(cell).text(place, name, "black", font, anchor="mm")
        labelled.append(cell)
    return image_grid(labelled, columns, padding=4)
