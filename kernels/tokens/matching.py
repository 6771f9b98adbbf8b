"""The inner loops of matching, in tiles: cosine scores of all pairs, of which none is stored.

On a CPU they are products of tiles that stay in the cache; on a GPU the kernels of triton.py. Both
accumulate in float32 (float64 stays) whatever the dtype: half-precision scores tie, which changes
who merges with whom. Equal scores go to the lowest index.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.errors import InputError
from ..linear import linear

SOURCE_TILE, TARGET_TILE = 1024, 512


def check_metric(metric: Tensor, name: str = "metric") -> None:
    if metric.ndim != 3 or not metric.is_floating_point():
        raise InputError(
            f"The {name} must be floating point [B, N, C], got {metric.dtype} {list(metric.shape)}."
        )


def length(x: Tensor) -> Tensor:
    """Euclidean norm over the last axis, at least 1e-12, in float32 or wider: ``[..., 1]``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).clamp(min=1e-12)


def unit(x: Tensor) -> Tensor:
    """Tokens divided by their norm, in float32 or wider."""
    return x / length(x)


def tile_product(x: Tensor, y: Tensor) -> Tensor:
    """``[b, s, C]`` times ``[b, t, C]`` transposed -> ``[b, s, t]``."""
    if len(x) == 1:
        return linear(x[0], y[0])[None]
    return x @ y.transpose(1, 2)


@torch.library.custom_op("tessera::best_match", mutates_args=())
def _best_match(
    metric: Tensor, sources: Tensor, targets: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    if metric.is_cuda:
        from .triton import best_match as triton_best_match

        return triton_best_match(metric, sources, targets, valid)
    return best_match_torch(metric, sources, targets, valid)


@_best_match.register_fake
def _(metric, sources, targets, valid):
    dtype = torch.promote_types(metric.dtype, torch.float32)
    shape = sources.shape
    return metric.new_empty(shape, dtype=dtype), sources.new_empty(shape, dtype=torch.int64)


def best_match(
    metric: Tensor, sources: Tensor, targets: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each source token the target of the largest cosine.

    Args:
        metric: ``[B, N, C]``.
        sources, targets: tokens, int64 ``[S]`` and ``[T]``, or one list a sample, ``[B, S]``.
        valid: bool ``[B, N]``; a pair that touches another token scores -inf.

    Returns:
        The largest cosine, ``[B, S]``, and where in ``targets`` it is, int64 ``[B, S]``.
    """
    batch = len(metric)
    return _best_match(metric.detach(), sources.expand(batch, -1), targets.expand(batch, -1), valid)


def best_match_torch(
    metric: Tensor, sources: Tensor, targets: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`best_match` in tiles of plain torch; short samples go several at a time."""
    (batch, count), total = sources.shape, targets.shape[1]
    dtype = torch.promote_types(metric.dtype, torch.float32)
    best = metric.new_full((batch, count), -torch.inf, dtype=dtype)
    where = torch.zeros(batch, count, dtype=torch.int64, device=metric.device)
    step = samples_at_once(count, total)
    for b in range(0, batch, step):
        item, chosen = metric[b : b + step], targets[b : b + step]
        y = take_unit(item, chosen)
        seen = None if valid is None else valid[b : b + step].gather(1, chosen)
        for s in range(0, count, SOURCE_TILE):
            x = take_unit(item, sources[b : b + step, s : s + SOURCE_TILE])
            top = best[b : b + step, s : s + SOURCE_TILE]
            place = where[b : b + step, s : s + SOURCE_TILE]
            for t in range(0, total, TARGET_TILE):
                scores = tile_product(x, y[:, t : t + TARGET_TILE])
                if seen is not None:
                    scores.masked_fill_(~seen[:, None, t : t + TARGET_TILE], -torch.inf)
                value, index = scores.max(dim=2)
                better = value > top
                torch.where(better, value, top, out=top)
                torch.where(better, index.add_(t), place, out=place)
                del scores  # Before the next tile is made.
    if valid is not None:
        best.masked_fill_(~valid.gather(1, sources), -torch.inf)
    return best, where


def samples_at_once(rows: int, columns: int) -> int:
    """How many samples' scores fit into one tile."""
    return max(1, SOURCE_TILE * TARGET_TILE // max(rows * columns, 1))


def take_unit(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``[B, S]`` of ``[B, N, C]``, divided by their norm, in float32 or wider."""
    start = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    rows = x.reshape(-1, x.shape[2]).index_select(0, (index + start).flatten())
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    return rows.div_(length(rows)).view(*index.shape, x.shape[2])


@torch.library.custom_op("tessera::similarity_energy", mutates_args=())
def _similarity_energy(metric: Tensor, kernel: str, margin: float, alpha: float) -> Tensor:
    if metric.is_cuda:
        from .triton import similarity_energy as triton_similarity_energy

        return triton_similarity_energy(metric, kernel, margin, alpha)
    return similarity_energy_torch(metric, kernel, margin, alpha)


@_similarity_energy.register_fake
def _(metric, kernel, margin, alpha):
    return metric.new_empty(
        metric.shape[:2], dtype=torch.promote_types(metric.dtype, torch.float32)
    )


def similarity_energy(
    metric: Tensor, kernel: str = "elu", margin: float = 0.5, alpha: float = 1.0
) -> Tensor:
    """Mean of a function of the cosine to every token, itself included: ``[B, N, C]`` -> ``[B, N]``.

    Args:
        kernel: "elu" is ``ELU(cosine - margin)`` with ``alpha``; "gauss" the normal density of
            ``1 - cosine`` with deviation ``1 - margin``.
    """
    return _similarity_energy(metric.detach(), kernel, margin, alpha)


def energy_kernel(scores: Tensor, kernel: str, margin: float, alpha: float) -> Tensor:
    """The function of `similarity_energy`, in place."""
    if kernel == "elu":
        return F.elu(scores.sub_(margin), alpha, inplace=True)
    deviation = 1 - margin
    scores.sub_(1).square_().mul_(-0.5 / deviation**2).exp_()
    return scores.div_(deviation * (2 * torch.pi) ** 0.5)


def similarity_energy_torch(metric: Tensor, kernel: str, margin: float, alpha: float) -> Tensor:
    """`similarity_energy` in tiles of plain torch."""
    batch, tokens, _ = metric.shape
    dtype = torch.promote_types(metric.dtype, torch.float32)
    energy = metric.new_zeros(batch, tokens, dtype=dtype)
    step = samples_at_once(tokens, tokens)
    for b in range(0, batch, step):
        normed = unit(metric[b : b + step])
        for s in range(0, tokens, SOURCE_TILE):
            x = normed[:, s : s + SOURCE_TILE]
            for t in range(0, tokens, TARGET_TILE):
                scores = tile_product(x, normed[:, t : t + TARGET_TILE])
                scores = energy_kernel(scores, kernel, margin, alpha)
                energy[b : b + step, s : s + SOURCE_TILE] += scores.sum(dim=2)
    return energy.div_(max(tokens, 1))


def stable_order(values: Tensor) -> Tensor:
    """Indices by descending value, equal ones by ascending index, over the last axis."""
    return values.sort(dim=-1, descending=True, stable=True).indices
