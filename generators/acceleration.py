"""Faster decoding of autoregressive generators, with the same distribution of what they write.

Speculative Jacobi decoding: "Accelerating Auto-regressive Text-to-Image Generation with Training-free
Speculative Jacobi Decoding" (Teng et al., ICLR 2025, arXiv 2410.01699), with the rule of speculative
sampling (arXiv 2211.17192). Written from the paper.

Both functions take a `Decoder`, which every autoregressive generator's ``decoder`` method makes:

    decoder = model.decoder(labels, guidance_scale=2.0)
    for ids in speculative_jacobi(decoder, generators, num_tokens=256):
        ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modalities.errors import InputError
from .autoregressive.decoding import Decoder, start_ids
from .sampling import check_generators, check_sampling, draw, probabilities


def inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """Weights ``[..., V]``, U(0, 1) ``[...]`` -> the first index whose share of the sum exceeds it."""
    cdf = p.double().cumsum(-1)
    target = uniform.double()[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True)[..., 0].clamp(max=p.shape[-1] - 1)


def verify(draft: Tensor, q: Tensor, p: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """One step of speculative sampling: what it emits is distributed as p, whatever q is.

    Drafts are accepted from the left while ``u < p(x) / q(x)``. At the first rejection a token is drawn
    from ``max(0, p - q)``; after the last draft, one from p.

    Args:
        draft: ids ``[B, J]``, each drawn from its ``q``.
        q: ``[B, J, V]``; one-hot for drafts that were not drawn at random.
        p: ``[B, J + 1, V]``, entry i given the drafts before i.
        u, w: draws from U(0, 1), ``[B, J]`` and ``[B]``.

    Returns:
        the number of accepted drafts ``[B]`` and the token that follows them ``[B]``.
    """
    of_draft = draft[..., None]
    accepted = u * q.gather(-1, of_draft)[..., 0] < p[:, :-1].gather(-1, of_draft)[..., 0]
    count = accepted.long().cumprod(1).sum(1)
    row = count[:, None, None].expand(-1, 1, p.shape[-1])
    at, before = p.gather(1, row)[:, 0], F.pad(q, (0, 0, 0, 1)).gather(1, row)[:, 0]
    residual = (at - before).clamp(min=0)
    # Where q is p up to rounding, nothing may be left.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, at)
    return count, inverse_cdf(residual, w)


@torch.no_grad()
def speculative_jacobi(
    decoder: Decoder,
    generators: Sequence[torch.Generator],
    num_tokens: int,
    window: int = 16,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    prefix: Tensor | None = None,
) -> Iterator[Tensor]:
    """Write several tokens a step: guess the next ones, verify all of them in one pass, guess again.

    A pass gives the distributions p of the next tokens, given the guesses before them. Guesses are
    verified from the left (`verify`); those after the first wrong one are drawn anew from this pass's
    p, which becomes their q. The result is distributed as that of token-by-token sampling, and equal
    to it at temperature 0 as far as products of other shapes round alike. A pass over a few places
    takes hardly longer than one over a single place, since it reads the same weights.

    Items of a batch advance each at its own pace, and what one writes does not depend on the others.
    Every step asks on the host how far they are.

    Args:
        generators: one an item.
        num_tokens: of a whole sequence, the prefix included.
        window: guesses a step.
        prefix: ids ``[B, k]`` that the sequences start with, k < num_tokens.

    Yields:
        After each pass, what all items have: ids ``[B, n]``, n growing by 1 or more, to ``num_tokens``.
        The number of passes is the number of yields.

    Raises:
        InputError: a setting that means nothing, or a prefix that does not fit.
    """
    check_sampling(temperature, top_k, top_p)
    check_generators(generators, decoder.batch)
    if window < 1:
        raise InputError(f"The window must hold 1 guess or more, got {window}.")
    ids = start_ids(decoder, num_tokens, prefix)
    first = last = ids.shape[1]  # Tokens that every item, and the foremost one, have written.
    device, vocab = decoder.device, decoder.vocab_size
    written = torch.full((decoder.batch,), first, device=device)
    ahead = torch.arange(window + 1, device=device)
    # Beyond what is written stand the guesses; the first ones are uniform.
    q = torch.full((decoder.batch, window, vocab), 1 / vocab, device=device)
    guesses = inverse_cdf(q, draw("uniform", (window,), generators, device))
    ids = F.pad(torch.cat([ids, guesses], dim=1), (0, num_tokens - first + window + 1))
    cached = decoder.cached
    while first < num_tokens:
        end = min(last + window, num_tokens - 1)
        count = end - first + 1
        logits = decoder(ids[:, :end], cached, count)
        p = distribution(logits, temperature, top_k, top_p)
        # Every item's own next places. Rows beyond the end repeat the last and decide nothing.
        rows = (written[:, None] - first + ahead).clamp(max=count - 1)
        p = p.gather(1, rows[..., None].expand(-1, -1, vocab))
        guesses = ids.gather(1, written[:, None] + ahead[:-1])
        uniform = draw("uniform", (2 * window + 1,), generators, device)
        accepted, token = verify(guesses, q, p, uniform[:, :window], uniform[:, window])

        # Places past the window are guessed from the last distribution that there is.
        rows = (accepted[:, None] + 1 + ahead[:-1]).clamp(max=window)
        q = p.gather(1, rows[..., None].expand(-1, -1, vocab))
        guesses = inverse_cdf(q, uniform[:, window + 1 :])
        at = (written + accepted)[:, None] + ahead
        ids = ids.scatter(1, at, torch.cat([token[:, None], guesses], dim=1))
        written = (written + accepted + 1).clamp(max=num_tokens)
        first, last = torch.stack(written.aminmax()).tolist()
        cached = first
        yield ids[:, :first].clone()


def distribution(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Logits ``[B, n, V]`` -> what a sampler draws from, ``[B, n, V]``; one-hot at temperature 0."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    flat = probabilities(logits.flatten(0, 1), temperature, top_k, top_p)
    return flat.view(logits.shape)


@torch.no_grad()
def share_prefix(decoder: Decoder, batch: int, prefix: Tensor | None = None) -> Decoder:
    """Read a condition and the first tokens once, for many items that have them in common.

    The samplers of `decoding` and `speculative_jacobi` start where this ends, if they are given the
    same prefix for every item; they write what they would write without it.

    Args:
        decoder: of one item.
        batch: number of items.
        prefix: ids ``[1, k]``; None shares the condition alone.

    Raises:
        InputError: a decoder of several items, or a prefix that does not fit.
    """
    if decoder.batch != 1:
        raise InputError(f"Only one item's prefix can be shared, got {decoder.batch} items.")
    prefix = start_ids(decoder, decoder.num_tokens, prefix)
    if prefix.shape[1]:
        # The last token is left to the samplers, which need the output there.
        decoder(prefix[:, :-1], decoder.cached, 1)
    shared = decoder.repeat(batch)
    shared.cached = prefix.shape[1]
    return shared
