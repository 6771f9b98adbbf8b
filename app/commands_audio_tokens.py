"""``tessera encode``, ``decode`` and ``reconstruct`` of sound: recordings as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..modalities.errors import InputError
from .commands_shared import load_tokenizer, note, print_json, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from ..modalities.token_file import TokenFile
    from ..tokenizers.base import AudioTokenizer

DEFAULT_CODEC = "voice"
# More tokens than this are too long for the record in a file.
MAX_RECORD_TOKENS = 10_000


def is_audio(file: Path) -> bool:
    """Whether a file is a recording, by its suffix."""
    from ..modalities.audio import AUDIO_SUFFIXES

    return file.suffix.lower() in AUDIO_SUFFIXES


def check_audio_suffix(path: Path) -> None:
    from ..modalities.audio import SAVE_SUFFIXES

    if path.suffix.lower() not in SAVE_SUFFIXES:
        raise InputError(
            f'Could not write "{path}": its name must end in {", ".join(SAVE_SUFFIXES)}.'
        )


def encode_recording(
    file: Path, out: Path, tokenizer_name: str, force: bool, as_json: bool
) -> None:
    """Write a recording as its tokens, frame by frame with coarse codebooks first."""
    from ..modalities.token_file import write_tokens
    from ..pipelines.reconstruction import ReconstructionPipeline

    tokenizer = load_codec(tokenizer_name)
    result = ReconstructionPipeline(tokenizer)(file)
    flat = flat_tokens(tokenizer, result.tokens[0])
    written = write_tokens(out, flat, tokenizer_name, tokenizer.vocab_size, force)
    report = _report(tokenizer, tokenizer_name, result)
    if as_json:
        print_json({"path": str(out), "bytes": written.payload_bytes, **report})
        return
    note(f"{written.payload_bytes:,} bytes")
    _note_report(report)
    typer.echo(out)


def decode_recording(
    content: TokenFile,
    out: Path,
    tokenizer_name: str,
    force: bool,
    as_json: bool,
    no_metadata: bool,
) -> None:
    """Make the recording of a .tok file again."""
    from ..modalities.audio import save_audio
    from ..pipelines.audio_reconstruction import decode_audio

    tokenizer = load_codec(tokenizer_name)
    tokens = shaped_tokens(tokenizer, content.tokens)
    audio = decode_audio(tokenizer, tokens[None].to(tokenizer.device))[0].float().cpu()
    record = None if no_metadata else _record(tokenizer, tokenizer_name, tokens)
    save_audio(audio, tokenizer.sample_rate, out, record, overwrite=force)
    seconds = round(audio.shape[-1] / tokenizer.sample_rate, 3)
    if as_json:
        print_json({"path": str(out), "tokenizer": tokenizer_name, "seconds": seconds})
    else:
        typer.echo(out)


def reconstruct_recording(
    file: Path, out: Path, tokenizer_name: str, force: bool, as_json: bool, no_metadata: bool
) -> None:
    """Write what a codec keeps of a recording, and say in how many bits and how fast."""
    from ..modalities.audio import save_audio
    from ..pipelines.reconstruction import ReconstructionPipeline

    tokenizer = load_codec(tokenizer_name)
    with progress_bar() as bar:
        bar.add_task(f"{Path(tokenizer_name).name}  reconstructing", total=None)
        result = ReconstructionPipeline(tokenizer)(file)
    record = None if no_metadata else _record(tokenizer, tokenizer_name, result.tokens[0])
    save_audio(result.audios[0], result.sampling_rate, out, record, overwrite=force)
    report = _report(tokenizer, tokenizer_name, result)
    if as_json:
        print_json({"path": str(out), **report})
        return
    _note_report(report)
    typer.echo(out)


def load_codec(name: str) -> AudioTokenizer:
    """An audio tokenizer by name or folder.

    Raises:
        InputError: no such tokenizer, or one of pictures.
    """
    from ..tokenizers.base import AudioTokenizer

    tokenizer = load_tokenizer(name)
    if not isinstance(tokenizer, AudioTokenizer):
        raise InputError(
            f'"{name}" is a tokenizer of pictures: choose one of sound, such as mimi; see '
            "tessera models list --task audio-tokenizer."
        )
    return tokenizer


def flat_tokens(tokenizer: AudioTokenizer, tokens: Tensor) -> Tensor:
    """``[Q, T]`` -> ids ``[T * Q]``; latents ``[T, D]`` stay."""
    return tokens if tokenizer.vocab_size is None else tokens.mT.flatten()


def shaped_tokens(tokenizer: AudioTokenizer, flat: Tensor) -> Tensor:
    """Undoes `flat_tokens`.

    Raises:
        InputError: tokens of another kind, or that are no whole frames.
    """
    if (tokenizer.vocab_size is None) != flat.dtype.is_floating_point:
        raise InputError("These tokens are of another tokenizer: pass its name as --tokenizer.")
    if tokenizer.vocab_size is None:
        return flat
    if len(flat) % tokenizer.num_codebooks:
        raise InputError(
            f"{len(flat)} tokens are no whole frames of {tokenizer.num_codebooks} codebooks: pass "
            "the tokenizer that wrote them as --tokenizer."
        )
    return flat.unflatten(0, (-1, tokenizer.num_codebooks)).mT


def _record(tokenizer: AudioTokenizer, name: str, tokens: Tensor) -> dict[str, Any]:
    from ..modalities.metadata import make_record

    flat = flat_tokens(tokenizer, tokens)
    fits = tokenizer.vocab_size is not None and len(flat) <= MAX_RECORD_TOKENS
    return make_record(
        "ReconstructionPipeline",
        name,
        "",
        0,
        settings={"frames": tokens.shape[0 if tokenizer.vocab_size is None else 1]},
        tokens=flat if fits else None,
        tokenizer=name,
        device=tokenizer.device,
        dtype=tokenizer.dtype,
    )


def _report(tokenizer: AudioTokenizer, name: str, result: Any) -> dict[str, Any]:
    samples = result.originals[0].shape[-1]
    return {
        "tokenizer": name,
        "seconds": round(samples / tokenizer.sample_rate, 3),
        "sample_rate": tokenizer.sample_rate,
        "codebooks": tokenizer.num_codebooks,
        "frames": result.tokens[0].shape[0 if tokenizer.vocab_size is None else 1],
        "bitrate": tokenizer.bitrate,
        "si_snr": result.si_snr[0],
        "real_time_factor": result.real_time_factor[0],
        "approximate": result.approximate[0],
    }


def _note_report(report: dict[str, Any]) -> None:
    bitrate, speed = report["bitrate"], report["real_time_factor"]
    size = "continuous" if bitrate is None else f"{bitrate / 1000:.2f} kbit/s"
    note(
        f"{report['seconds']:g} s: {report['codebooks']} x {report['frames']} tokens, {size}   "
        f"SI-SNR {report['si_snr']:.1f} dB"
    )
    note(f"Real-time factor: encode {speed['encode']:.3f}, decode {speed['decode']:.3f}")
    if report["approximate"]:
        note(
            "Note: encoded and decoded in windows, since it is long and this codec does not stream."
        )
