"""Editing that token models give for nothing: tokens that are kept, and conditions between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generators.base import ImageGenerator
from ..modalities.errors import InputError
from ..tokenizers.base import Tokenizer

SIDES = ("left", "right", "top", "bottom")
# A token is drawn anew where so much of its square is painted over.
COVERED = 0.25


@dataclass(frozen=True)
class Blend:
    """A condition between two prompts or classes: ``(1 - weight) first + weight second``."""

    first: Any
    second: Any
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"The weight of a blend must lie in 0 to 1, got {self.weight}.")


def blends(first: Any, second: Any, count: int) -> list[Blend]:
    """``count`` even steps from one condition to the other, both ends among them.

    Raises:
        InputError: fewer than two.
    """
    if count < 2:
        raise InputError(f"Going from one to the other takes 2 pictures or more, got {count}.")
    return [Blend(first, second, i / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Edit:
    """What a call keeps of a picture or of tokens; made by the functions below.

    Attributes:
        kind: how it was made.
        tokens, token_mask: ``[1, n]`` (or ``[1, n, latent_dim]``), bool ``[1, n]``: True = kept.
        arguments: further arguments of the generator's ``stream``, ``[1, ...]`` each.
        cells: which tokens of the grid stay, bool ``[1, p, p]``.
        picture, kept: known pixels ``[1, 3, S, S]`` in [-1, 1] and where they stay, bool
            ``[1, 1, S, S]``.
        side: at which side of ``canvas`` the generated square lies.
        canvas: the whole extended picture ``[1, 3, H, W]``.
    """

    kind: Literal["inpaint", "outpaint", "vary"]
    tokens: Tensor
    token_mask: Tensor
    arguments: dict[str, Tensor] = field(default_factory=dict)
    cells: Tensor | None = None
    picture: Tensor | None = None
    kept: Tensor | None = None
    side: str | None = None
    canvas: Tensor | None = None

    def finish(self, pictures: Tensor) -> Tensor:
        """Decoded pictures ``[B, 3, S, S]`` -> those with the known pixels in place."""
        if self.picture is None:
            return pictures
        pictures = torch.where(self.kept, self.picture.to(pictures), pictures)
        if self.canvas is None:
            return pictures
        whole = self.canvas.to(pictures).repeat(len(pictures), 1, 1, 1)
        window(whole, self.side, pictures.shape[-1]).copy_(pictures)
        return whole


def window(pictures: Tensor, side: str, size: int) -> Tensor:
    """The square at one side of ``[B, C, H, W]``, a view."""
    return {
        "left": pictures[..., :size],
        "right": pictures[..., -size:],
        "top": pictures[..., :size, :],
        "bottom": pictures[..., -size:, :],
    }[side]


def inpainting(
    generator: ImageGenerator,
    tokenizer: Tokenizer,
    picture: Tensor,
    redraw: Tensor,
    kind: Literal["inpaint", "outpaint"] = "inpaint",
) -> Edit:
    """Keep a picture but for an area.

    The area is widened to whole tokens: a token is drawn anew where a quarter of its square or more is
    painted over. Generators that write in order (RAR, xAR) do not look at kept tokens that come later.

    Args:
        picture: ``[1, 3, S, S]`` in [-1, 1].
        redraw: bool ``[1, 1, S, S]``, True = draw anew.

    Raises:
        InputError: tokens without a place in the picture, or an area that covers no token.
    """
    side = tokenizer.token_grid
    if side is None:
        raise InputError(
            f"The tokens of {type(tokenizer).__name__} have no place in the picture, so that no area "
            "of it can be drawn anew: choose a model whose tokens form a grid."
        )
    cells = F.adaptive_avg_pool2d(redraw.float(), side) < COVERED
    if bool(cells.all()):
        raise InputError("The mask paints over no token: paint a larger area.")
    return keep_cells(generator, tokenizer, picture, cells[:, 0], tokenizer.encode(picture), kind)


def keep_cells(
    generator: ImageGenerator,
    tokenizer: Tokenizer,
    picture: Tensor,
    cells: Tensor,
    tokens: Tensor,
    kind: Literal["inpaint", "outpaint"],
) -> Edit:
    """Keep tokens ``[1, n]`` and pixels ``[1, 3, S, S]`` where a map over the grid, bool
    ``[1, p, p]``, is True."""
    kept = F.interpolate(cells[:, None].float(), picture.shape[-2:]) > 0.5
    arguments = generator.edit_arguments(tokenizer, picture, kept, cells)
    return Edit(kind, tokens, generator.token_mask(cells), arguments, cells, picture, kept)


def outpainting(
    generator: ImageGenerator,
    tokenizer: Tokenizer,
    picture: Tensor,
    side: str,
    amount: int | None = None,
) -> Edit:
    """Go on beyond one side of a picture.

    Args:
        picture: ``[1, 3, H, W]`` in [-1, 1], as long as the model's pictures along that side, at least
            as long across.
        amount: pixels to add, rounded to whole tokens; default: half a picture.

    Raises:
        InputError: an unknown side, more than the model can add at once, or see `inpainting`.
    """
    if side not in SIDES:
        raise InputError(f'A picture goes on at the {", ".join(SIDES)}, got "{side}".')
    size = tokenizer.image_size
    cell = size // (tokenizer.token_grid or 1)
    amount = size // 2 if amount is None else round(amount / cell) * cell
    if tokenizer.token_grid is not None and not cell <= amount <= size - cell:
        raise InputError(f"This model adds {cell} to {size - cell} pixels at once, got {amount}.")
    before, after = (amount, 0) if side in ("left", "top") else (0, amount)
    pad = (before, after, 0, 0) if side in ("left", "right") else (0, 0, before, after)
    # The edge goes on, so that the encoder sees no step where the known part ends.
    canvas = F.pad(picture, pad, mode="replicate")
    new = F.pad(torch.zeros_like(picture[:, :1]), pad, value=1.0) > 0.5
    edit = inpainting(
        generator,
        tokenizer,
        window(canvas, side, size).contiguous(),
        window(new, side, size),
        "outpaint",
    )
    return Edit(**{**vars(edit), "side": side, "canvas": canvas})


def variation(tokenizer: Tokenizer, tokens: Tensor, keep: int) -> Edit:
    """Keep the first tokens, which say what the whole shows, and draw the others anew.

    Args:
        tokens: ids ``[N]``.

    Raises:
        InputError: tokens without an order, or a number to keep that they do not have.
    """
    if not tokenizer.ordered:
        raise InputError(
            f"The tokens of {type(tokenizer).__name__} are not ordered from coarse to fine, so that "
            "their first ones do not stand for a draft: choose a model over ordered tokens."
        )
    if not 1 <= keep <= len(tokens):
        raise InputError(f"A variation keeps 1 to {len(tokens)} tokens, got {keep}.")
    kept = tokens[None, :keep]
    return Edit("vary", kept, torch.ones_like(kept, dtype=torch.bool))


def mix(first: dict[str, Tensor], second: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Text conditions of a batch between those of two; a position only one has is that one's."""
    if "text_mask" in first:
        a, b = first["text_mask"][..., None], second["text_mask"][..., None]
        x, y = first["text_features"], second["text_features"]
        first = {**first, "text_features": torch.where(a, x, y)}
        second = {**second, "text_features": torch.where(b, y, x)}

    def between(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == torch.bool:
            return a | b
        return torch.lerp(a, b, weights.to(a).view(-1, *[1] * (a.ndim - 1)))

    return {name: between(first[name], second[name]) for name in first}


def weights_of(conditions: Sequence[Any]) -> list[float]:
    """How much of its second end each condition has; 0 where it is no blend."""
    return [c.weight if isinstance(c, Blend) else 0.0 for c in conditions]


def ends(condition: Any) -> tuple[Any, Any]:
    """Both ends of a blend; of any other condition twice itself."""
    return (
        (condition.first, condition.second)
        if isinstance(condition, Blend)
        else (condition, condition)
    )
