"""Residual vector quantization: each codebook quantizes what those before it left over.

Paper: "SoundStream: An End-to-End Neural Audio Codec" (Zeghidour et al., 2021), arXiv 2107.03312,
section III.C, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ema import EMACodebook


class ResidualVQ(nn.Module):
    """Vectors ``[B, T, dim]`` <-> ids ``[B, Q, T]``, coarse codebooks first.

    Args:
        num_codebooks: Q.
        vocab_size, dim: of each codebook.
        options: further ones of `EMACodebook`.
    """

    def __init__(self, num_codebooks: int, vocab_size: int, dim: int, **options: float):
        super().__init__()
        self.codebooks = nn.ModuleList(
            EMACodebook(vocab_size, dim, **options) for _ in range(num_codebooks)
        )

    def nearest(self, z: Tensor) -> Tensor:
        """``[B, T, dim]`` -> ids int64 ``[B, Q, T]``."""
        rest, ids = z.float(), []
        for codebook in self.codebooks:
            ids.append(codebook.nearest(rest))
            rest = rest - codebook.ids_to_codes(ids[-1])
        return torch.stack(ids, dim=1)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[B, Q, T]`` -> float32 ``[B, T, dim]``."""
        rows = zip(self.codebooks, ids.unbind(1), strict=True)
        return sum(codebook.ids_to_codes(row) for codebook, row in rows)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize ``[B, T, dim]``.

        Returns:
            codes with the gradient of z, ids int64 ``[B, Q, T]``, and the sum of the codebooks'
            commitment losses. In training the codebooks then move.
        """
        z = z.float()
        rest, ids, losses = z, [], []
        for codebook in self.codebooks:
            codes, row, loss = codebook(rest)
            # Of the codes only: z takes the commitment's gradient, as in one codebook.
            rest = rest - codes.detach()
            ids.append(row)
            losses.append(loss)
        return z - rest.detach(), torch.stack(ids, dim=1), sum(losses)
