"""TokenBridge's tokenizer: "Bridging Continuous and Discrete Tokens for Autoregressive Visual
Generation" (Wang et al., 2025).

Paper: arXiv 2503.16430. Code: MIT. The published one is KL-16 (vae/kl16.ckpt of Epiphqny/TokenBridge)
with 64 levels a channel; here any continuous tokenizer can be made discrete, without training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...modalities.errors import InputError
from ...weights.registry import import_class, tokenizer_classes
from ..base import Tokenizer
from ..quantizers.dimension_wise import DimensionWiseQuantizer


class TokenBridgeTokenizer(Tokenizer, ModelMixin, ConfigMixin):
    """A continuous tokenizer whose every channel is rounded to one of a few levels.

    Its ids are ``base.num_tokens * base.latent_dim`` a picture: token by token, and in a token channel
    by channel.

    Args:
        base_class: name of a registered continuous tokenizer.
        base_config: its arguments.
        levels, value_range, std_range: of `DimensionWiseQuantizer`; the range is in units of what the
            base's ``encode`` returns.

    Raises:
        InputError: no such class, or a tokenizer that is discrete already.
    """

    ordered = False
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantizer"]
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        base_class: str = "KL16VAE",
        base_config: Mapping[str, Any] | None = None,
        levels: int = 64,
        value_range: Sequence[float] = (-5.0, 5.0),
        std_range: float = 3.0,
    ):
        super().__init__()
        classes = tokenizer_classes()
        if base_class not in classes:
            known = ", ".join(sorted(classes))
            raise InputError(
                f'"{base_class}" is no tokenizer that is known here: use one of {known}.'
            )
        self.base = import_class(classes[base_class])(**(base_config or {}))
        if self.base.latent_dim is None:
            raise InputError(f"{base_class} is discrete already: quantize a continuous tokenizer.")
        self.quantizer = DimensionWiseQuantizer(levels, tuple(value_range), std_range)

    @classmethod
    def from_continuous(
        cls, tokenizer: Tokenizer, levels: int = 64, **options: Any
    ) -> TokenBridgeTokenizer:
        """Quantize a loaded tokenizer; the result shares its weights.

        Args:
            options: ``value_range`` and ``std_range``.
        """
        config = {k: v for k, v in tokenizer.config.items() if not k.startswith("_")}
        quantized = cls(type(tokenizer).__name__, config, levels, **options)
        quantized.base = tokenizer
        return quantized.to(tokenizer.device).eval()

    @property
    def image_size(self) -> int:
        return self.base.image_size

    @property
    def token_grid(self) -> int | None:
        return self.base.token_grid

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def num_tokens(self) -> int:
        return self.base.num_tokens * self.base.latent_dim

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, image_size, image_size]`` in [-1, 1] -> ids int64 ``[B, num_tokens]``."""
        return self.quantizer(self.base.encode(images))[1].flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Ids ``[B, num_tokens]`` -> pictures ``[B, 3, H, W]``, about [-1, 1].

        Raises:
            InputError: another number of ids, or one outside 0 to levels - 1.
        """
        self.check_tokens(tokens)
        return self.base.decode(
            self.quantizer.ids_to_codes(tokens.unflatten(1, (-1, self.base.latent_dim)))
        )
