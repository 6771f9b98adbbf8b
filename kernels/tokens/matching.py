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

SOURCE_TILE, TARGET_TILE = 256, 512


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
    if len(x) == 1 and x.shape[1] >= 64 and _use_onednn(x):
        return F.linear(x[0].to_mkldnn(), y[0].to_mkldnn()).to_dense()[None]
    return x @ y.transpose(1, 2)


def _use_onednn(x: Tensor) -> bool:
    # torch.mm calls MKL, which keeps to AVX2 on CPUs that are not Intel's; oneDNN uses AVX-512.
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )


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
    (batch, count), tokens = sources.shape, metric.shape[1]
    dtype = torch.promote_types(metric.dtype, torch.float32)
    best = metric.new_full((batch, count), -torch.inf, dtype=dtype)
    where = torch.zeros(batch, count, dtype=torch.int64, device=metric.device)
    pairs = min(count, SOURCE_TILE) * min(targets.shape[1], TARGET_TILE)
    step = max(1, SOURCE_TILE * TARGET_TILE // max(pairs, 1))
    for b in range(0, batch, step):
        item = metric[b : b + step]
        start = torch.arange(len(item), device=metric.device)[:, None] * tokens
        flat = item.reshape(-1, metric.shape[2])
        norms = length(flat)
        usable = None if valid is None else valid[b : b + step]
        for t in range(0, targets.shape[1], TARGET_TILE):
            chosen = targets[b : b + step, t : t + TARGET_TILE]
            y = flat[chosen + start] / norms[chosen + start]
            for s in range(0, count, SOURCE_TILE):
                index = sources[b : b + step, s : s + SOURCE_TILE] + start
                scores = tile_product(flat[index] / norms[index], y)
                if usable is not None:
                    scores.masked_fill_(~usable.gather(1, chosen)[:, None], -torch.inf)
                value, place = scores.max(dim=2)
                old = best[b : b + step, s : s + SOURCE_TILE]
                better = value > old
                old.copy_(torch.where(better, value, old))
                old = where[b : b + step, s : s + SOURCE_TILE]
                old.copy_(torch.where(better, place + t, old))
    if valid is not None:
        best.masked_fill_(~valid.gather(1, sources), -torch.inf)
    return best, where


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
    pairs = min(tokens, SOURCE_TILE) * min(tokens, TARGET_TILE)
    step = max(1, SOURCE_TILE * TARGET_TILE // max(pairs, 1))
    for b in range(0, batch, step):
        normed = unit(metric[b : b + step])
        for t in range(0, tokens, TARGET_TILE):
            y = normed[:, t : t + TARGET_TILE]
            for s in range(0, tokens, SOURCE_TILE):
                scores = tile_product(normed[:, s : s + SOURCE_TILE], y)
                scores = energy_kernel(scores, kernel, margin, alpha)
                energy[b : b + step, s : s + SOURCE_TILE] += scores.sum(dim=2)
    return energy / max(tokens, 1)


def stable_order(values: Tensor) -> Tensor:
    """Indices by descending value, equal ones by ascending index, over the last axis."""
    return values.sort(dim=-1, descending=True, stable=True).indices
