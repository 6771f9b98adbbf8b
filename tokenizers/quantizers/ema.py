"""A codebook that follows the running means of the vectors it is given.

Papers: "Neural Discrete Representation Learning" (van den Oord et al., 2017), arXiv 1711.00937,
appendix A.1; k-means start and replacement of dead codes: "SoundStream" (Zeghidour et al., 2021),
arXiv 2107.03312, section III.C, as EnCodec and WavTokenizer use them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import linear
from .vq import gather_processes


class EMACodebook(nn.Module):
    """Nearest code by Euclidean distance; float32 whatever the model's dtype.

    Args:
        vocab_size: rows of the codebook.
        dim: width of a code.
        decay: of the running counts and sums.
        eps: Laplace smoothing of the counts.
        dead_code_threshold: running count a step below which a code is replaced by a vector of the
            batch. (The published code overwrites what it has replaced in the same step, which leaves
            its dead codes dead; here the running sums are replaced as well.)
        kmeans_iterations: rounds of k-means on the first training batch.

    Attributes:
        frozen: keep the codes as they are in training too.
    """

    frozen = False

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        decay: float = 0.99,
        eps: float = 1e-5,
        dead_code_threshold: float = 2.0,
        kmeans_iterations: int = 200,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.decay = decay
        self.eps = eps
        self.dead_code_threshold = dead_code_threshold
        self.kmeans_iterations = kmeans_iterations
        self.register_buffer("embed", torch.zeros(vocab_size, dim))
        # All zero until the codebook has been started.
        self.register_buffer("cluster_size", torch.zeros(vocab_size))

    def nearest(self, z: Tensor) -> Tensor:
        """Vectors ``[..., dim]`` -> ids int64 ``[...]``; of equally near codes the first."""
        embed = self.embed.float()
        return linear(z.float(), embed, -embed.square().sum(-1) / 2).argmax(-1)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[...]`` -> codes float32 ``[..., dim]``."""
        return F.embedding(ids, self.embed.float())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize ``[..., dim]``.

        Returns:
            codes with the gradient of z, ids int64 ``[...]``, and the commitment loss
            ``mean (z - code)^2``. In training the codebook then moves.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            learning = self.training and not self.frozen
            vectors = z.detach().flatten(0, -2)
            if learning and not bool(self.cluster_size.any()):
                self.start(gather_processes(vectors))
            ids = self.nearest(z.detach())
            codes = self.ids_to_codes(ids)
            loss = F.mse_loss(z, codes)
            if learning:
                self.update(gather_processes(vectors), gather_processes(ids.flatten()))
            return z + (codes - z).detach(), ids, loss

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """The centres that k-means finds among vectors ``[N, dim]`` become the codes."""
        centres, counts = kmeans(vectors, self.vocab_size, self.kmeans_iterations)
        self.embed.copy_(centres)
        # As if every step brought as many vectors as a fair share of this one.
        self.cluster_size.copy_(counts.clamp(min=1e-3))

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """Move the codes by vectors ``[N, dim]`` and their ids ``[N]``."""
        sums = self.embed * smoothed(self.cluster_size, self.eps)[:, None]
        embed, sums, size = ema_step(
            sums, self.cluster_size, vectors, ids, decay=self.decay, eps=self.eps
        )
        dead = size < self.dead_code_threshold
        # Spread over the batch, whose order is random: the same in every process without a draw.
        picked = torch.linspace(0, len(vectors) - 1, int(dead.sum()), device=ids.device).long()
        embed[dead] = vectors[picked]
        size[dead] = max(self.dead_code_threshold, self.eps)
        self.embed.copy_(embed)
        self.cluster_size.copy_(size)


def ema_step(
    sums: Tensor, cluster_size: Tensor, vectors: Tensor, ids: Tensor, decay: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the running means.

    Args:
        sums: running sums ``[K, D]`` of the vectors of each code.
        cluster_size: running counts ``[K]``.
        vectors: ``[N, D]``, with their codes' ids ``[N]``.

    Returns:
        codes ``[K, D]``, sums and counts after the step.
    """
    counts = torch.bincount(ids, minlength=len(cluster_size)).float()
    size = decay * cluster_size + (1 - decay) * counts
    new = torch.zeros_like(sums).index_add_(0, ids, vectors)
    sums = decay * sums + (1 - decay) * new
    return sums / smoothed(size, eps)[:, None], sums, size


def smoothed(cluster_size: Tensor, eps: float) -> Tensor:
    """Counts ``[K]`` under Laplace smoothing, of the same total."""
    total = cluster_size.sum()
    return (cluster_size + eps) / (total + len(cluster_size) * eps) * total


def kmeans(vectors: Tensor, k: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Centres ``[k, D]`` of vectors ``[N, D]`` and how many each has ``[k]`` (Lloyd's algorithm).

    It starts from vectors spread evenly over the list; with fewer vectors than centres some start
    (and stay) equal. A centre that loses all its vectors stays where it is.
    """
    picked = torch.linspace(0, len(vectors) - 1, k, device=vectors.device).long()
    centres = vectors[picked].clone()
    for _ in range(iterations):
        ids = linear(vectors, centres, -centres.square().sum(-1) / 2).argmax(-1)
        counts = torch.bincount(ids, minlength=k).float()
        sums = torch.zeros_like(centres).index_add_(0, ids, vectors)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    ids = linear(vectors, centres, -centres.square().sum(-1) / 2).argmax(-1)
    return centres, torch.bincount(ids, minlength=k).float()
