"""Losses of C-ViViT: every frame is compared, one frame of each clip is judged by networks."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import TokenizerLoss


class CViViTLoss(TokenizerLoss):
    """A `CViViT` with its training loss; arguments as of `TokenizerLoss`.

    Squared error of frames in [0, 1], plus the weighted loss of the quantizer; perceptual and
    adversarial losses of one random frame of each clip, as in the open reading of Phenaki (arXiv
    2210.02399). The paper weighs them 0.1, the others 1, and has a perceptual loss of clips besides.
    """

    def forward(
        self,
        video: Tensor,
        step: int,
        num_frames: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Clips ``[B, 3, T, S, S]`` in [-1, 1] -> loss, values.

        Args:
            num_frames: int ``[B]``, 1 to T: frames of each clip that count; the others are padding.
                They change no frame before them; the quantizer's loss does see them.
            generator: of the frames that networks judge, on the video's device.
        """
        decoded, regularizer, parts = self.tokenizer(video)
        decoded = decoded.float()
        batch, _, length = video.shape[:3]
        device = video.device
        if num_frames is None:
            num_frames = torch.full((batch,), length, device=device)
        counts = torch.arange(length, device=device) < num_frames[:, None]
        difference = (decoded - video).transpose(1, 2)[counts] / 2
        l2 = difference.square().mean()
        parts |= {"l2": l2.detach(), "psnr": -10 * l2.detach().log10()}
        loss = l2 + self.weights["regularizer"] * regularizer
        picked = (torch.rand(batch, generator=generator, device=device) * num_frames).long()
        items = torch.arange(batch, device=device)
        return self.add_image_losses(
            loss, parts, decoded[items, :, picked], video[items, :, picked], step
        )
