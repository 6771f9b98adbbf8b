"""The autoregressive loop, and what a generator must offer to run in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...modalities.errors import InputError
from ..sampling import (
    check_generators,
    check_ids,
    check_sampling,
    draw,
    probabilities,
    sample,
)


class Decoder(Protocol):
    """A causal generator over discrete tokens, bound to its conditions, guidance and caches.

    Place 0 of its sequence is the start, place j the token j - 1; the output at place j predicts
    token j.

    Attributes:
        batch: items.
        device: where the ids live.
        vocab_size: ids 0 to ``vocab_size - 1``.
        num_tokens: the longest sequence that its caches hold.
        cached: places that are in the caches before the first call (see `acceleration.share_prefix`).
    """

    batch: int
    device: torch.device
    vocab_size: int
    num_tokens: int
    cached: int

    def __call__(self, ids: Tensor, cached: int, count: int) -> Tensor:
        """Run the places ``cached`` to n over the ids ``[B, n]``, n < num_tokens.

        Earlier places are read from the caches, later ones are overwritten by later calls: a call
        with a smaller ``cached`` than the places that were run takes them back.

        Returns:
            guided logits of the last ``count`` places, float32 ``[B, count, V]``.
        """

    def repeat(self, batch: int) -> Decoder:
        """Of a decoder of one item: one of ``batch`` such items that all start from its caches."""


@torch.no_grad()
def autoregress(
    decoder: Decoder,
    generators: Sequence[torch.Generator],
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    tokens: Tensor | None = None,
    token_mask: Tensor | None = None,
    noise: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield ids ``[B, 1]``, ``[B, 2]``, ... ``[B, num_tokens]`` as they are drawn.

    Args:
        generators: one an item.
        tokens, token_mask: ids ``[B, n]`` kept where the mask ``[B, n]`` is True. Kept ones use up
            their draws too, so that an item goes on as it would after drawing them itself.
        noise: Exp(1) draws ``[num_tokens, B, V]`` in place of the generators'.

    Raises:
        InputError: a decoder with a shared prefix, and no such tokens.
    """
    _check_shared(decoder, tokens)
    drawn = torch.empty(decoder.batch, 0, dtype=torch.int64, device=decoder.device)
    for position in range(num_tokens):
        if position < decoder.cached:
            draw("exponential", (decoder.vocab_size,), generators, decoder.device)
            new = tokens[:, position]
        else:
            logits = decoder(drawn, position, 1)[:, 0]
            draws = None if noise is None else noise[position]
            new = sample(logits, temperature, top_k, top_p, generators, draws)
            if tokens is not None and position < tokens.shape[1]:
                new = torch.where(token_mask[:, position], tokens[:, position], new)
        drawn = torch.cat([drawn, new[:, None]], dim=1)
        yield drawn


@torch.no_grad()
def branch(
    decoder: Decoder,
    generators: Sequence[torch.Generator],
    num_tokens: int,
    num_samples: int = 1,
    prefix: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Continue every item once, and branch into several candidates at the last token alone.

    Args:
        generators: one an item.
        num_tokens: of a whole sequence, the prefix included.
        num_samples: different candidates an item; with temperature 0 the likeliest ones, by falling
            probability.
        prefix: ids ``[B, k]``, k < num_tokens.

    Returns:
        ids ``[B num_samples, num_tokens]``, all of the first item first, and the summed log-probability
        of their new tokens ``[B num_samples]``: after guidance, temperature (1 where it is 0), top-k
        and top-p.

    Raises:
        InputError: a setting that means nothing, or fewer ids to choose from than samples.
    """
    check_sampling(temperature, top_k, top_p)
    check_generators(generators, decoder.batch)
    ids = start_ids(decoder, num_tokens, prefix)
    choices = decoder.vocab_size if top_k is None else min(top_k, decoder.vocab_size)
    if not 1 <= num_samples <= choices:
        raise InputError(
            f"The last token can branch into 1 to {choices} samples, got {num_samples}."
        )
    first = ids.shape[1]
    log_p = torch.zeros(decoder.batch, 1, device=decoder.device)
    for position in range(first, num_tokens):
        logits = decoder(ids, decoder.cached if position == first else position, 1)[:, 0]
        p = probabilities(logits, temperature or 1.0, top_k, top_p)
        score = p
        if temperature:
            score = p / draw("exponential", p.shape[1:], generators, p.device)
        new = score.topk(num_samples if position + 1 == num_tokens else 1).indices
        log_p = log_p + p.gather(1, new).log()
        if position + 1 < num_tokens:
            ids = torch.cat([ids, new], dim=1)
    ids = ids.repeat_interleave(num_samples, dim=0)
    return torch.cat([ids, new.reshape(-1, 1)], dim=1), log_p.flatten()


def start_ids(decoder: Decoder, num_tokens: int, prefix: Tensor | None) -> Tensor:
    """The ids ``[B, k]`` that a sequence of ``num_tokens`` starts with; of no prefix ``[B, 0]``.

    Raises:
        InputError: more tokens than the decoder holds, or a prefix that does not fit.
    """
    check_length(num_tokens, decoder.num_tokens)
    _check_shared(decoder, prefix)
    if prefix is None:
        return torch.empty(decoder.batch, 0, dtype=torch.int64, device=decoder.device)
    if prefix.ndim != 2 or len(prefix) != decoder.batch or not prefix.shape[1] < num_tokens:
        raise InputError(
            f"The prefix must have the shape [{decoder.batch}, 0 to {num_tokens - 1}], got "
            f"{list(prefix.shape)}."
        )
    check_ids(prefix, decoder.vocab_size)
    return prefix


def check_length(count: int, longest: int) -> None:
    """Raise InputError unless ``count`` tokens can be made."""
    if not 1 <= count <= longest:
        raise InputError(f"This model makes 1 to {longest} tokens, got {count}. Use {longest}.")


def _check_shared(decoder: Decoder, prefix: Tensor | None) -> None:
    count = 0 if prefix is None else prefix.shape[1]
    if count < decoder.cached:
        raise InputError(
            f"This decoder has read a prefix of {decoder.cached} tokens: give the same ones to go on "
            f"from, got {count}."
        )
