"""One seed an item: what makes item k of a batch equal to item k alone."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from ..modalities.errors import InputError

MAX_SEED = 2**32 - 1


def check_seed(seed: int) -> int:
    """Raise InputError unless the seed is a whole number from 0 to 4294967295."""
    if not 0 <= seed <= MAX_SEED:
        raise InputError(
            f"Seed must be a whole number from 0 to {MAX_SEED}, got {seed}. "
            "Leave it empty for a random seed."
        )
    return seed


def random_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


def seed_generators(seed: int, count: int) -> list[torch.Generator]:
    """Generators of ``seed``, ``seed + 1``, ... (wrapping at 2**32): one an item."""
    check_seed(seed)
    return [torch.Generator().manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(count)]


def item_seeds(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[int]:
    """The seed of each item.

    A list of fresh generators gives their own seeds; a used one, or a single one, is drawn from,
    so that calling again with it makes something new, as everywhere in diffusers.
    """
    if generator is None:
        return [random_seed() for _ in range(count)]
    if isinstance(generator, torch.Generator):
        return [_draw(generator) for _ in range(count)]
    if len(generator) != count:
        raise InputError(
            f"{count} pictures need {count} generators (one each) or a single one, "
            f"got {len(generator)}."
        )
    seeds = []
    for each in generator:
        fresh = torch.Generator(each.device).manual_seed(each.initial_seed())
        if torch.equal(fresh.get_state(), each.get_state()):
            seeds.append(each.initial_seed())
            _draw(each)
        else:
            seeds.append(_draw(each))
    return seeds


def _draw(generator: torch.Generator) -> int:
    high, low = torch.randint(0, 2**31, (2,), generator=generator, device=generator.device).tolist()
    return high << 31 | low


def token_stream(seed: int) -> torch.Generator:
    """The stream that an item's tokens are drawn from."""
    return torch.Generator().manual_seed(seed)


def noise_stream(seed: int) -> torch.Generator:
    """The stream of an item's decoder noise, apart from its token stream."""
    return torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15) % 2**63)
