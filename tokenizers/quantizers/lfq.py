"""Lookup-free quantization: each latent dimension becomes its sign, the signs are the bits of the id.

Paper: "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (Yu et al., ICLR 2024),
arXiv 2310.05737, section 3.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LFQ(nn.Module):
    """Signs with a straight-through gradient; the codebook is implicit.

    Args:
        bits: width of a latent; there are ``2 ** bits`` ids.
        commitment: weight of the squared distance from latents to their codes.
        entropy: weight of the loss that makes each token certain of its code and all codes used alike.
        temperature: of the soft assignment that this loss looks at.
    """

    def __init__(
        self,
        bits: int,
        commitment: float = 0.25,
        entropy: float = 0.1,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.bits = bits
        self.vocab_size = 2**bits
        self.commitment, self.entropy, self.temperature = commitment, entropy, temperature
        # The first dimension is the most significant bit.
        self.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)

    @property
    def dim(self) -> int:
        return self.bits

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., bits]`` -> codes of -1 and 1 ``[..., bits]`` with the gradient of z, ids int64
        ``[...]``, and the loss; float32."""
        z = z.float()
        positive = z > 0
        codes = torch.where(positive, 1.0, -1.0)
        loss = self.commitment * F.mse_loss(z, codes) + self.entropy * self.entropy_loss(z)
        return z + (codes - z).detach(), (positive * self.basis).sum(-1), loss

    def entropy_loss(self, z: Tensor) -> Tensor:
        """Mean entropy of a token's soft assignment minus the entropy of their mean, in nats.

        The softmax over ``-|z - c|^2 / temperature`` is a product over bits, so the mean over tokens
        of the joint distribution is one matrix product of the two halves of the bits.
        """
        logits = 4 * z.flatten(0, -2) / self.temperature
        p = logits.sigmoid()
        each = F.binary_cross_entropy_with_logits(logits, p, reduction="none").sum(-1).mean()
        high, low = (
            _joint(part) for part in p.split([self.bits // 2, self.bits - self.bits // 2], 1)
        )
        mean = (high.T @ low) / len(p)
        return each + (mean * mean.clamp(min=1e-12).log()).sum()

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[...]`` -> codes float32 ``[..., bits]`` of -1 and 1."""
        return torch.where((ids[..., None] & self.basis) > 0, 1.0, -1.0)


def _joint(p: Tensor) -> Tensor:
    """Probabilities of independent bits ``[N, b]`` -> of their ``2 ** b`` joint values ``[N, 2 ** b]``."""
    joint = p.new_ones(len(p), 1)
    for bit in p.T:
        joint = (joint[..., None] * torch.stack([1 - bit, bit], dim=-1)[:, None]).flatten(1)
    return joint
