"""Vector quantization: each vector becomes the nearest row of a codebook.

Papers: "Neural Discrete Representation Learning" (van den Oord et al., 2017), arXiv 1711.00937, with
its appendix A.1 for the moving-average codebook; cosine distance: "Vector-quantized Image Modeling
with Improved VQGAN" (Yu et al., 2022), arXiv 2110.04627; revival of unused codes: "Online Clustered
Codebook" (Zheng & Vedaldi, 2023), arXiv 2307.15139.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import linear


class VectorQuantizer(nn.Module):
    """Nearest-code lookup with a straight-through gradient; float32 whatever the model's dtype.

    Args:
        vocab_size: rows of the codebook.
        dim: width of a code.
        l2_norm: compare directions (cosine distance): vectors and codes are divided by their norms.
        commitment: weight of the loss that pulls vectors to their codes.
        ema: move each code to the running mean of its vectors; otherwise the codebook is learned by
            gradient.
        revive: in training, pull each code that is hardly used to the vector nearest to it.
        decay: of the running averages of `ema` and `revive`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2_norm: bool = False,
        commitment: float = 0.25,
        ema: bool = False,
        revive: bool = False,
        decay: float = 0.99,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.dim = dim
        self.l2_norm = l2_norm
        self.commitment = commitment
        self.ema = ema
        self.revive = revive
        self.decay = decay
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)
        self.embedding.weight.requires_grad_(not ema)
        # Running share of the vectors that each code gets.
        self.register_buffer("usage", torch.zeros(vocab_size) if ema or revive else None)

    def normalize(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-12) if self.l2_norm else x

    def nearest(self, z: Tensor) -> Tensor:
        """Ids int64 ``[...]`` of the codes nearest to ``[..., dim]``; of equal ones the first."""
        codebook = self.normalize(self.embedding.weight.float())
        return _nearest(self.normalize(z.float()), codebook)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[...]`` -> codes float32 ``[..., dim]``, of length 1 under `l2_norm`."""
        return self.normalize(F.embedding(ids, self.embedding.weight).float())

    def forward(self, z: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize ``[..., dim]`` to the nearest codes, or to the codes ``ids [...]``.

        Returns:
            codes ``[..., dim]`` with the gradient of z, ids int64 ``[...]``, and the loss: commitment
            plus, for a codebook learned by gradient, the squared distance from codes to vectors.
        """
        with torch.autocast(z.device.type, enabled=False):
            vectors = z.float()
            z = self.normalize(vectors)
            ids = self.nearest(vectors.detach()) if ids is None else ids
            codes = self.ids_to_codes(ids)
            loss = self.commitment * F.mse_loss(z, codes.detach())
            if not self.ema:
                loss = loss + F.mse_loss(codes, z.detach())
            if self.training and self.usage is not None:
                self.update(vectors.detach().flatten(0, -2), ids.flatten())
            return z + (codes - z).detach(), ids, loss

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """Move the codebook by the vectors ``[N, dim]`` of all processes and their ids ``[N]``."""
        vectors, ids = gather_processes(vectors), gather_processes(ids)
        share = torch.bincount(ids, minlength=self.vocab_size).float() / len(ids)
        self.usage.lerp_(share, 1 - self.decay)
        codebook = self.embedding.weight.float()
        if self.ema:
            # The running mean, written as a step: the running sum is usage * code.
            means = torch.zeros_like(codebook).index_add_(0, ids, self.normalize(vectors))
            step = means / len(ids) - share[:, None] * codebook
            rate = (1 - self.decay) / self.usage.clamp(min=1e-12)
            codebook = codebook + rate[:, None] * step
        if self.revive:
            nearest = _nearest(self.normalize(codebook), self.normalize(vectors))
            # 1 for a code without use, nearly 0 from some thousandths of a fair share on.
            pull = torch.exp(-10 * self.vocab_size * self.usage / (1 - self.decay) - 1e-3)
            codebook = codebook.lerp(vectors[nearest], pull[:, None])
        self.embedding.weight.copy_(codebook)


def codebook_use(ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """How much of a codebook some ids use.

    Returns:
        "perplexity": 1 (one code) to vocab_size (all alike); "codebook_usage": share of the codes
        that occur at all.
    """
    counts = torch.bincount(ids.flatten(), minlength=vocab_size).float()
    shares = counts / counts.sum()
    entropy = -torch.xlogy(shares, shares).sum()
    return {"perplexity": entropy.exp(), "codebook_usage": (counts > 0).float().mean()}


def _nearest(queries: Tensor, points: Tensor) -> Tensor:
    """Index of the point ``[M, C]`` nearest to each query ``[..., C]``."""
    # |q - p|^2 is smallest where q.p - |p|^2 / 2 is largest.
    return linear(queries, points, -points.square().sum(-1) / 2).argmax(-1)


def gather_processes(x: Tensor) -> Tensor:
    """The rows of every process, in order."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
