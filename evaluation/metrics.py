"""Metrics of pictures, and of the features that a CLIP has for them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from ..modalities.errors import InputError

# Where two pictures are equal; keeps the mean over pictures finite.
MAX_PSNR = 100.0
# AlexNet's last stage must keep at least one position.
LPIPS_MIN_SIZE = 64


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, at most 100.

    Args:
        images, references: ``[B, C, H, W]`` in [-1, 1]; images are clamped to it.

    Returns:
        ``[B]``.
    """
    values = peak_signal_noise_ratio(
        images.clamp(-1, 1), references, data_range=2.0, dim=(1, 2, 3), reduction="none"
    )
    return values.clamp(max=MAX_PSNR)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al., 2004; 11x11 Gaussian, sigma 1.5).

    Args:
        images, references: ``[B, C, H, W]`` in [-1, 1]; images are clamped to it.

    Returns:
        ``[B]``, 1 where both are equal.
    """
    values = structural_similarity_index_measure(
        images.clamp(-1, 1), references, data_range=2.0, reduction="none"
    )
    return values.reshape(len(images))


def load_lpips(backbone: str | Path) -> nn.Module:
    """LPIPS v0.1 over AlexNet (Zhang et al., arXiv 1801.03924).

    Called with two ``[B, 3, H, W]`` in [-1, 1], it gives ``[B, 1, 1, 1]``; 0 where both are equal.

    Args:
        backbone: torchvision's state dict of AlexNet trained on ImageNet
            (``alexnet-owt-7be5be79.pth``); the linear heads come with torchmetrics.

    Raises:
        InputError: the file is missing or holds something else.
    """
    # torchmetrics' public class always downloads the backbone.
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import alexnet

    network = alexnet(weights=None)
    try:
        network.load_state_dict(torch.load(backbone, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise InputError(f'There is no file "{backbone}": check the path.') from error
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(
            f'"{backbone}" is not torchvision\'s AlexNet: give alexnet-owt-7be5be79.pth.'
        ) from error
    model = _LPIPS(net="alex", pnet_rand=True)
    for stage in model.net.children():
        for position, layer in stage.named_children():
            layer.load_state_dict(network.features[int(position)].state_dict())
    return model


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (Heusel et al., 2017).

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``. It grows as the sets get smaller, so only
    distances between sets of the same sizes compare.

    Args:
        first, second: ``[N, D]`` and ``[M, D]``, of one extractor.

    Raises:
        InputError: a set of fewer than two.
    """
    if len(first) < 2 or len(second) < 2:
        raise InputError(
            f"A Frechet distance needs at least 2 pictures a side, got {len(first)} and "
            f"{len(second)}."
        )
    distance = (first.double().mean(0) - second.double().mean(0)).square().sum()
    factors = []
    for features in (first.double(), second.double()):
        centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
        distance = distance + centred.square().sum()
        factors.append(torch.linalg.qr(centred, mode="r").R)
    # With C1 = A'A and C2 = B'B, the trace of (C1 C2)^(1/2) is the sum of the singular values of
    # AB': no square root of a singular covariance, whatever the number of pictures.
    shared = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return max(float(distance - 2 * shared), 0.0)


def diversity(features: Tensor) -> float:
    """Mean pairwise ``1 - cosine`` within each group: 0 = all the same.

    Args:
        features: ``[P, S, D]``, S >= 2 pictures of each of P prompts, L2-normalised.
    """
    similarities = features.double() @ features.double().mT
    count = features.shape[1]
    pairs = similarities.sum((1, 2)) - similarities.diagonal(dim1=1, dim2=2).sum(1)
    return float((1 - pairs / (count * (count - 1))).mean())


def retrieval_ranks(queries: Tensor, candidates: Tensor, matches: Tensor) -> Tensor:
    """Rank of the right candidate of each query by dot product, 1 = best.

    A candidate as near as the right one counts as nearer: features that tell nothing rank last.

    Args:
        queries: ``[N, D]``.
        candidates: ``[M, D]``.
        matches: int64 ``[N]``, the position of each query's right candidate.

    Returns:
        int64 ``[N]`` in 1..M.
    """
    similarities = queries @ candidates.T
    right = similarities.gather(1, matches[:, None])
    return (similarities >= right).sum(1)
