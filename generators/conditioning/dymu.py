"""DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs (Wang et al., NeurIPS 2025): encoders.

Paper: arXiv 2504.17040. Published code: MikeWangWZHL/dymu (MIT-style). Checkpoints: mikewang/DyMU, vision
towers of CLIP and SigLIP (upstream licences) with a learnt threshold in every block.

A picture becomes as many vectors as it needs: pairs of tokens above a block's threshold merge
(kernels/tokens/dymu.py), so plain pictures get few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...kernels.tokens.assignment import Assignment
from ...kernels.tokens.dymu import match_batch, match_threshold, merge_batch
from ...kernels.tokens.vit import ReducedTokens, encode_reduced, weighted_average


class DyMUEncoder(ModelMixin, ConfigMixin):
    """A ViT of timm whose tokens merge above a threshold for each block.

    Args:
        architecture: name of timm's model.
        settings: arguments of that model that differ from its own.
        image_mean, image_std: normalisation of pictures in [0, 1].
    """

    @register_to_config
    def __init__(
        self,
        architecture: str = "vit_large_patch14_clip_quickgelu_336",
        settings: dict[str, Any] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.vit = timm.create_model(architecture, pretrained=False, **(settings or {}))
        # 1 never merges.
        self.register_buffer("thresholds", torch.ones(len(self.vit.blocks)))

    def forward(self, images: Tensor) -> ReducedTokens:
        """Pictures in [-1, 1], ``[B, 3, H, W]`` -> their tokens, before the last norm.

        Tokens are averages; a sample with fewer than the others is padded (``assignment.valid``).
        """
        mean, std = (
            images.new_tensor(values)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        one = len(images) == 1

        def match(layer: int, metric: Tensor, valid: Tensor) -> Assignment:
            threshold = float(self.thresholds[layer])
            if one:
                return match_threshold(metric, threshold, cls=self.vit.has_class_token)
            cls = self.vit.has_class_token
            return match_batch(metric, threshold=threshold, cls=cls, valid=valid)[0]

        average = weighted_average if one else merge_batch
        return encode_reduced(self.vit, ((images + 1) / 2 - mean) / std, match, average=average)
