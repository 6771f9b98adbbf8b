"""Multi-scale residual vector quantization: each scale quantizes what the coarser ones left over.

Paper: "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (Tian et
al., NeurIPS 2024), arXiv 2404.02905, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vq import VectorQuantizer


class MultiScaleResidualVQ(nn.Module):
    """One codebook for all scales; a map of ids a scale, upsampled, refined by phi and summed.

    Everything is float32, whatever the dtype of the weights: the residual is a small difference.

    Args:
        vocab_size: codes.
        dim: width of a code.
        patch_nums: side of each scale's map, coarse to fine; the last is the side of the latents.
        num_phi: refining convolutions, shared by neighbouring scales.
        phi_ratio: share of the convolution in ``phi(h) = (1 - ratio) h + ratio conv(h)``.
        beta: weight of the commitment loss.
        revive: in training, move codes that are hardly used (see `VectorQuantizer`).
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        patch_nums: Sequence[int],
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        revive: bool = False,
    ):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.phi_ratio = phi_ratio
        self.beta = beta
        self.codebook = VectorQuantizer(vocab_size, dim, revive=revive)
        self.phi = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(num_phi))
        # Which phi serves which scale: the nearest tick, in float64, since there are near ties.
        edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
        ticks = np.linspace(edge, 1 - edge, num_phi)
        last = max(len(self.patch_nums) - 1, 1)
        self.phi_of_scale = [
            int(np.argmin(np.abs(ticks - k / last))) for k in range(len(self.patch_nums))
        ]

    @property
    def vocab_size(self) -> int:
        return self.codebook.vocab_size

    @property
    def num_tokens(self) -> int:
        return sum(p * p for p in self.patch_nums)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """``[B, n, ...]`` -> the maps of the scales that are whole in it, ``[B, p * p, ...]`` each."""
        maps, start = [], 0
        for side in self.patch_nums:
            if start + side * side > tokens.shape[1]:
                break
            maps.append(tokens[:, start : start + side * side])
            start += side * side
        return maps

    def shrink(self, x: Tensor, scale: int) -> Tensor:
        """Latents ``[B, dim, H, W]`` -> their means over the cells of a scale, ``[B, dim, p, p]``."""
        side = self.patch_nums[scale]
        return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="area")

    def residual(self, ids: Tensor, scale: int) -> Tensor:
        """What ids ``[B, p * p]`` of one scale add to the latents, ``[B, dim, H, W]``."""
        side, full = self.patch_nums[scale], self.patch_nums[-1]
        h = self.codebook.ids_to_codes(ids).transpose(1, 2).unflatten(2, (side, side))
        if side != full:
            h = F.interpolate(h, size=(full, full), mode="bicubic", align_corners=False)
        phi = self.phi[self.phi_of_scale[scale]]
        refined = F.conv2d(h, phi.weight.float(), phi.bias.float(), padding=1)
        return (1 - self.phi_ratio) * h + self.phi_ratio * refined

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[B, n]`` -> latents float32 ``[B, dim, H, W]``, of the scales that are whole in n."""
        return sum(self.residual(part, scale) for scale, part in enumerate(self.split(ids)))

    def next_inputs(self, ids: Tensor) -> Tensor:
        """Ids ``[B, n]`` -> what a next-scale generator reads at scales 2, 3, ...

        Float32 ``[B, n', dim]``: after each whole scale but the last, the latents so far, shrunk to
        the scale that follows (section 3.2, teacher forcing).
        """
        latents, inputs = 0, []
        for scale, part in enumerate(self.split(ids)[: len(self.patch_nums) - 1]):
            latents = latents + self.residual(part, scale)
            inputs.append(self.shrink(latents, scale + 1).flatten(2).transpose(1, 2))
        return torch.cat(inputs, dim=1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize latents ``[B, dim, H, W]``, H = W = the last of ``patch_nums``.

        Returns:
            the latents that the ids decode to, float32 ``[B, dim, H, W]``, whose gradient passes
            straight through to ``z``; ids int64 ``[B, num_tokens]``; the loss, the mean over scales
            of codebook loss and ``beta`` times commitment loss.
        """
        z = z.float()
        rest = z.detach()
        codes, loss = torch.zeros_like(rest), z.new_zeros(())
        vectors, ids = [], []
        for scale in range(len(self.patch_nums)):
            vectors.append(self.shrink(rest, scale).flatten(2).transpose(1, 2))
            ids.append(self.codebook.nearest(vectors[-1]))
            h = self.residual(ids[-1], scale)
            codes = codes + h
            rest = rest - h.detach()
            loss = loss + F.mse_loss(codes, z.detach()) + self.beta * F.mse_loss(z, codes.detach())
        if z.requires_grad:
            codes = z + (codes - z).detach()
        vectors, ids = torch.cat(vectors, dim=1), torch.cat(ids, dim=1)
        if self.training and self.codebook.usage is not None:
            self.codebook.update(vectors.flatten(0, 1), ids.flatten())
        return codes, ids, loss / len(self.patch_nums)
