"""Which output row each token goes to: the one form that every token reduction produces.

`merge` is a segmented reduction over the rows, `unmerge` a gather by them. Gradients flow through
both; matchings are never differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...modalities.errors import InputError

MERGE_MODES = ("mean", "sum", "amax", "wavg", "prune")


@dataclass(frozen=True)
class Assignment:
    """A map of N tokens to M rows, for each of B samples.

    Attributes:
        row: int32 ``[B, N]``, the row of each token, -1 = dropped.
        rep: int32 ``[B, M]``, the token that represents each row, -1 = padding.
        size: float32 ``[B, M]``, tokens in each row, 0 = padding.
        num: int32 ``[B]``, rows of each sample; the others up to M are padding, at the end.
        drops: whether some token may be dropped.
    """

    row: Tensor
    rep: Tensor
    size: Tensor
    num: Tensor
    drops: bool = False

    @classmethod
    def build(
        cls, row: Tensor, rep: Tensor, num: Tensor | None = None, drops: bool = False
    ) -> Assignment:
        """From ``row [B, N]`` and ``rep [B, M]`` of any integer type; counts the sizes."""
        batch, rows = rep.shape
        size = torch.zeros(batch, rows + 1, device=row.device)
        target = row.long() if not drops else row.long().masked_fill(row < 0, rows)
        size.scatter_add_(1, target, torch.ones_like(target, dtype=size.dtype))
        if num is None:
            num = torch.full((batch,), rows, device=row.device)
        return cls(row.int(), rep.int(), size[:, :rows], num.int(), drops)

    @classmethod
    def from_merges(
        cls, tokens: int, rep: Tensor, sources: Tensor, targets: Tensor, drops: bool = False
    ) -> Assignment:
        """Each of ``sources [B, r]`` joins the row of the token ``targets [B, r]``, one of ``rep``."""
        batch, rows = rep.shape
        row = torch.full((batch, tokens), -1, device=rep.device)
        row.scatter_(1, rep, torch.arange(rows, device=rep.device).expand(batch, rows))
        row.scatter_(1, sources, row.gather(1, targets))
        return cls.build(row, rep, drops=drops)

    @classmethod
    def from_mapping(cls, row: Tensor, rows: int) -> Assignment:
        """From a row for every token, ``[B, N]`` in 0..rows-1; the first token represents a row."""
        batch, tokens = row.shape
        position = torch.arange(tokens, device=row.device).expand(batch, tokens)
        rep = torch.full((batch, rows), -1, device=row.device)
        rep.scatter_reduce_(1, row.long(), position, "amin", include_self=False)
        return cls.build(row, rep)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | None = None) -> Assignment:
        """Every token its own row."""
        each = torch.arange(tokens, device=device).expand(batch, tokens)
        return cls.build(each, each)

    @property
    def valid(self) -> Tensor:
        """Rows that are no padding, bool ``[B, M]``."""
        return self.rep >= 0

    def sorted(self) -> Assignment:
        """The same groups with the rows in the order of their ``rep`` (raster order)."""
        last = self.row.shape[1]
        order = torch.where(self.valid, self.rep, last).argsort(dim=1, stable=True)
        place = order.argsort(dim=1)
        row = place.gather(1, self.row.long().clamp(min=0)).masked_fill(self.row < 0, -1)
        return Assignment(
            row.int(),
            self.rep.gather(1, order),
            self.size.gather(1, order),
            self.num,
            self.drops,
        )

    def then(self, other: Assignment) -> Assignment:
        """This reduction followed by ``other`` of its rows, as one of the original tokens."""
        check_match(self.rep, other)
        row = other.row.gather(1, self.row.long().clamp(min=0)).masked_fill(self.row < 0, -1)
        rep = self.rep.gather(1, other.rep.long().clamp(min=0)).masked_fill(other.rep < 0, -1)
        return Assignment.build(row, rep, other.num, self.drops or other.drops)

    def matrix(self) -> Tensor:
        """0/1 float32 ``[B, M, N]``: which tokens are in which row."""
        rows = torch.arange(self.rep.shape[1], device=self.row.device)
        return (self.row[:, None] == rows[:, None]).float()

    def flat_rows(self) -> Tensor:
        """``row`` with the samples' rows numbered through, int64 ``[B * N]``; dropped = B * M."""
        batch, rows = self.rep.shape
        start = torch.arange(batch, device=self.row.device)[:, None] * rows
        flat = self.row + start
        if self.drops:
            flat = flat.masked_fill(self.row < 0, batch * rows)
        return flat.flatten()


def check_match(x: Tensor, a: Assignment) -> None:
    if x.shape[:2] != a.row.shape:
        raise InputError(
            f"This assignment is of {list(a.row.shape)} samples and tokens, got "
            f"{list(x.shape[:2])}: match the same tokens that you merge."
        )


def merge(
    x: Tensor, a: Assignment, *, size: Tensor | None = None, mode: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """Reduce the tokens of each row to one.

    Half precision is summed in float32. Padding rows are 0.

    Args:
        x: ``[B, N, D]``.
        size: ``[B, N, 1]``, how many original tokens each token already stands for; default 1.
        mode: "mean", "sum" and "amax" count every token once; "wavg" weighs with ``size``;
            "prune" keeps the representative alone.

    Returns:
        ``[B, M, D]``; "wavg" returns it with the new sizes, float32 ``[B, M, 1]``.
    """
    check_match(x, a)
    if mode not in MERGE_MODES:
        raise InputError(f'The merge mode "{mode}" is none of {", ".join(MERGE_MODES)}.')
    if mode == "prune":
        return _prune(x, a)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if mode == "amax":
        return _amax(wide, a).to(x.dtype)
    if mode == "wavg":
        if size is None:
            size = torch.ones_like(x[..., :1], dtype=wide.dtype)
        total = segment_sum(size.to(wide.dtype), a)
        y = segment_sum(wide * size, a) / total.masked_fill(total == 0, 1)
        return y.to(x.dtype), total.float()
    y = segment_sum(wide, a)
    if mode == "mean":
        y = y.div_(a.size.clamp(min=1)[..., None])
    return y.to(x.dtype)


def unmerge(y: Tensor, a: Assignment) -> Tensor:
    """A copy of its row for every token: ``[B, M, D]`` -> ``[B, N, D]``, dropped tokens 0."""
    if y.shape[:2] != a.rep.shape:
        raise InputError(
            f"This assignment has {list(a.rep.shape)} samples and rows, got {list(y.shape[:2])}."
        )
    batch, tokens = a.row.shape
    rows = y.flatten(0, 1)
    if not a.drops:
        return rows.index_select(0, a.flat_rows()).view(batch, tokens, -1)
    x = rows.index_select(0, a.flat_rows().clamp(max=len(rows) - 1)).view(batch, tokens, -1)
    return x.masked_fill((a.row < 0)[..., None], 0)


def segment_sum(x: Tensor, a: Assignment) -> Tensor:
    """Sum of the tokens of each row, ``[B, N, D]`` -> ``[B, M, D]``."""
    if x.is_cuda:
        from .triton import segment_sum as triton_segment_sum

        return triton_segment_sum(x, a.flat_rows(), *a.rep.shape)
    batch, rows = a.rep.shape
    # One more row takes the dropped tokens.
    y = x.new_zeros(batch * rows + a.drops, x.shape[-1])
    y = y.index_add_(0, a.flat_rows(), x.flatten(0, 1))
    return y[: batch * rows].view(batch, rows, -1)


def _prune(x: Tensor, a: Assignment) -> Tensor:
    index = a.rep.long().clamp(min=0)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, index).masked_fill(~a.valid[..., None], 0)


def _amax(x: Tensor, a: Assignment) -> Tensor:
    batch, rows = a.rep.shape
    index = a.flat_rows()[:, None].expand(-1, x.shape[-1])
    y = x.new_zeros(batch * rows + a.drops, x.shape[-1])
    y = y.scatter_reduce(0, index, x.flatten(0, 1), "amax", include_self=False)
    return y[: batch * rows].view(batch, rows, -1)


def compact(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid tokens to the front, in their order, and cut to the longest sample.

    Args:
        x: ``[B, N, D]``.
        valid: bool ``[B, N]``.

    Returns:
        ``[B, L, D]``, 0 beyond a sample's length, and bool ``[B, L]``.
    """
    if x.shape[:2] != valid.shape:
        raise InputError(f"x has {list(x.shape[:2])} tokens, the mask {list(valid.shape)}.")
    longest = int(valid.sum(1).max()) if valid.numel() else 0
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    front = valid.gather(1, order)
    x = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    return x.masked_fill(~front[..., None], 0), front
