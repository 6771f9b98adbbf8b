"""Losses of video tokenizers: every frame is compared, one frame of each clip is judged by networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..modalities.errors import InputError
from .losses import AdversarialLoss, TokenizerLoss

DISTANCES = ("l1", "l2")


class VideoTokenizerLoss(TokenizerLoss):
    """A video tokenizer with its training loss.

    Squared (Phenaki) or absolute error (LARP, NBP) of frames in [0, 1], plus the weighted loss of the
    quantizer; perceptual and adversarial losses of one random frame of each clip, as in the open
    reading of Phenaki (arXiv 2210.02399).

    Args:
        tokenizer: clips -> clips, a loss, values to report.
        weights, perceptual, adversarial, gan_start: as of `TokenizerLoss`.
        distance: "l1" or "l2".

    Raises:
        InputError: another distance.
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        weights: dict[str, float],
        perceptual: dict[str, Callable[[Tensor, Tensor], Tensor]],
        adversarial: AdversarialLoss | None,
        gan_start: int,
        distance: str = "l2",
    ):
        super().__init__(tokenizer, weights, perceptual, adversarial, gan_start)
        if distance not in DISTANCES:
            raise InputError(f'Unknown distance "{distance}": use one of {", ".join(DISTANCES)}.')
        self.distance = distance

    def forward(
        self,
        video: Tensor,
        step: int,
        num_frames: Tensor | None = None,
        generator: torch.Generator | None = None,
        **inputs: Tensor | float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Clips ``[B, 3, T, S, S]`` in [-1, 1] and the tokenizer's further inputs -> loss, values.

        Args:
            num_frames: int ``[B]``, 1 to T: frames of each clip that count; the others are padding.
                (The tokenizer and its own loss see them; it should be causal where lengths differ.)
            generator: of the frames that networks judge, on the video's device.
        """
        decoded, regularizer, parts = self.tokenizer(video, **inputs)
        decoded = decoded.float()
        batch, _, length = video.shape[:3]
        device = video.device
        if num_frames is None:
            num_frames = torch.full((batch,), length, device=device)
        counts = torch.arange(length, device=device) < num_frames[:, None]
        difference = (decoded - video).transpose(1, 2)[counts] / 2
        l1, l2 = difference.abs().mean(), difference.square().mean()
        parts |= {"l1": l1.detach(), "l2": l2.detach(), "psnr": -10 * l2.detach().log10()}
        loss = (l1 if self.distance == "l1" else l2) + self.weights["regularizer"] * regularizer
        picked = (torch.rand(batch, generator=generator, device=device) * num_frames).long()
        items = torch.arange(batch, device=device)
        return self.add_image_losses(
            loss, parts, decoded[items, :, picked], video[items, :, picked], step
        )
