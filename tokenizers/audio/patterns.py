"""Codebook patterns: tokens ``[B, Q, T]`` as the sequence that a language model writes, and back.

What a step of the model holds, for Q codebooks and T frames:

- `parallel`: one frame of all tracks, rows below each other; Q rows a track, T steps.
- `delay`: codebook q of frame t at step t + q; Q rows, T + Q - 1 steps (Copet et al., MusicGen,
  arXiv 2306.05284, section 2.2).
- `flatten`: one token; T * Q steps, frame by frame, coarse codebooks first.
- `interleave`: the frames of several tracks in turn; Q rows, T steps a track (Liu et al., SongGen,
  arXiv 2502.13128, section 3.3).

Special ids belong to the language model and lie above all code ids. All functions keep the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...modalities.errors import InputError

FREE = -1


def parallel(tracks: Sequence[Tensor]) -> Tensor:
    """Tracks ``[B, Q_i, T]`` -> ``[B, sum of Q_i, T]``, the rows of the first track on top."""
    _check_tracks(tracks)
    return torch.cat(list(tracks), dim=1)


def split_parallel(sequence: Tensor, num_tracks: int) -> list[Tensor]:
    """``[B, num_tracks * Q, T]`` -> tracks ``[B, Q, T]``: undoes `parallel`."""
    if sequence.shape[1] % num_tracks:
        raise InputError(f"{sequence.shape[1]} rows cannot be {num_tracks} tracks of one height.")
    return list(sequence.chunk(num_tracks, dim=1))


def interleave(tracks: Sequence[Tensor]) -> Tensor:
    """Tracks ``[B, Q, T]`` -> ``[B, Q, len(tracks) * T]``: frame 0 of each, frame 1 of each, ..."""
    _check_tracks(tracks)
    return torch.stack(list(tracks), dim=3).flatten(2)


def deinterleave(sequence: Tensor, num_tracks: int) -> list[Tensor]:
    """``[B, Q, L]`` -> tracks ``[B, Q, L // num_tracks]``; an unfinished last turn is dropped."""
    turns = sequence.shape[2] // num_tracks
    return list(sequence[:, :, : turns * num_tracks].unflatten(2, (turns, num_tracks)).unbind(3))


def flatten(tokens: Tensor, vocab_size: int) -> Tensor:
    """``[B, Q, T]`` -> ``[B, T * Q]``; ids of codebook q are raised by ``q * vocab_size``."""
    shift = torch.arange(tokens.shape[1], device=tokens.device, dtype=tokens.dtype) * vocab_size
    return (tokens + shift[:, None]).mT.flatten(1)


def unflatten(sequence: Tensor, num_codebooks: int, vocab_size: int) -> Tensor:
    """``[B, L]`` -> ``[B, Q, L // Q]``: undoes `flatten`; an unfinished last frame is dropped.

    Raises:
        InputError: an id that is not of the codebook whose turn it is.
    """
    frames = sequence.shape[1] // num_codebooks
    tokens = sequence[:, : frames * num_codebooks].unflatten(1, (frames, num_codebooks)).mT
    codebooks = torch.arange(num_codebooks, device=sequence.device)[:, None]
    if bool((tokens.div(vocab_size, rounding_mode="floor") != codebooks).any()):
        raise InputError("This sequence holds an id of another codebook than the one in turn.")
    return tokens - codebooks.to(tokens.dtype) * vocab_size


def delay(tokens: Tensor, fill: int) -> Tensor:
    """``[B, Q, T]`` -> ``[B, Q, T + Q - 1]``: row q starts q steps later; ``fill`` in the corners."""
    batch, rows, frames = tokens.shape
    sequence = tokens.new_full((batch, rows, frames + rows - 1), fill)
    for q in range(rows):
        sequence[:, q, q : q + frames] = tokens[:, q]
    return sequence


def undelay(sequence: Tensor) -> Tensor:
    """``[B, Q, L]`` -> ``[B, Q, L - Q + 1]``: undoes `delay`.

    Raises:
        InputError: fewer steps than rows, so that no frame is whole.
    """
    rows, steps = sequence.shape[1:]
    frames = steps - rows + 1
    if frames < 1:
        raise InputError(f"{steps} steps hold no whole frame of {rows} delayed codebooks.")
    return torch.stack([sequence[:, q, q : q + frames] for q in range(rows)], dim=1)


def delay_mask(num_codebooks: int, frames: int, device: torch.device | None = None) -> Tensor:
    """bool ``[Q, T + Q - 1]``: where `delay` puts tokens."""
    ones = torch.ones(1, num_codebooks, frames, dtype=torch.long, device=device)
    return delay(ones, 0)[0].bool()


def delay_template(prompt: Tensor, max_length: int, bos: int, pad: int) -> Tensor:
    """What a delayed sequence must hold where nothing is to be drawn (SongGen's and Parler-TTS's).

    Args:
        prompt: ``[B, Q, S]``, a start column of ``bos`` and S - 1 frames that are given.
        max_length: columns of the sequence, the start column among them.
        bos: fills row q before its first frame, q + 1 times.
        pad: fills the other corner, at the end.

    Returns:
        ``[B, Q, max_length]`` of ``bos``, ``pad``, given tokens, and -1 where the model writes; -1
        everywhere where ``max_length`` < 2 Q - 1 leaves no room for the pattern. The model starts
        from the columns before the first -1 of row 0.
    """
    batch, rows, _ = prompt.shape
    template = prompt.new_full((batch, rows, max_length), FREE)
    if max_length < 2 * rows - 1:
        return template
    for q in range(rows):
        given = prompt[:, q, 1 : 1 + max_length - q - 1]
        template[:, q, : q + 1] = bos
        template[:, q, q + 1 : q + 1 + given.shape[1]] = given
        template[:, q, max_length - rows + 1 + q :] = pad
    return template


def apply_template(sequence: Tensor, template: Tensor) -> Tensor:
    """``sequence`` ``[B, Q, L]`` with what `delay_template` prescribes for its first L columns."""
    template = template[..., : sequence.shape[-1]]
    return torch.where(template == FREE, sequence, template)


def _check_tracks(tracks: Sequence[Tensor]) -> None:
    if len({track.shape[2] for track in tracks}) != 1:
        raise InputError(
            f"Tracks must have one number of frames, got {[track.shape[2] for track in tracks]}."
        )
