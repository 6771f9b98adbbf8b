"""What a pipeline asks of every generator of pictures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..modalities.errors import InputError
from ..tokenizers.base import Tokenizer
from .conditioning.classes import drop_labels

# What users may set of `ImageGenerator.stream`, where it takes it.
SETTINGS = ("num_tokens", "num_steps", "guidance_scale", "temperature", "top_k", "top_p")


class ImageGenerator:
    """Writes the tokens of one picture; a model inherits from this and from diffusers' classes.

    ``stream(labels, generators, **settings)``, or for texts ``stream(**text_condition(...),
    generators=..., **settings)``, yields the tokens after every step: ids int64 ``[B, n]``, or
    ``[B, n, latent_dim]`` of continuous ones. Its ``tokens`` and ``token_mask`` keep given ones.

    Attributes:
        condition: what it draws from: "class" (labels of ``num_classes``) or "text".
        unit: what one yield of `stream` adds.
        num_tokens: of a whole picture.
        vocab_size: number of ids; None where tokens are continuous.
        latent_dim: width of a continuous token; None where tokens are ids.
    """

    condition: ClassVar[Literal["class", "text"]] = "class"
    unit: ClassVar[Literal["token", "step", "scale"]] = "step"

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def vocab_size(self) -> int | None:
        return self.config.get("vocab_size")

    @property
    def latent_dim(self) -> int | None:
        return self.config.get("latent_dim")

    def stream(self, *condition: Any, **settings: Any) -> Iterator[Tensor]:
        raise TypeError(f"{type(self).__name__} does not say how it samples.")

    def num_yields(self, num_tokens: int | None = None, num_steps: int | None = None) -> int:
        """How often `stream` yields with these settings."""
        return self.config.num_steps if num_steps is None else num_steps

    @classmethod
    def settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The `SETTINGS` that this class takes, with the values of a model of that configuration."""
        given = {p.name: p.default for p in inspect.signature(cls.__init__).parameters.values()}
        given |= config
        found = {}
        for name, parameter in inspect.signature(cls.stream).parameters.items():
            if name in SETTINGS:
                default = parameter.default
                found[name] = given.get(name) if default is None else default
        return found

    def token_mask(self, mask: Tensor) -> Tensor:
        """A map ``[B, p, p]`` over the grid of the picture's tokens, True = keep -> bool
        ``[B, num_tokens]``."""
        return mask.flatten(1)

    def edit_arguments(
        self, tokenizer: Tokenizer, picture: Tensor, kept: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """What `stream` needs beside tokens and mask to keep parts of a picture.

        Args:
            picture: ``[B, 3, S, S]`` in [-1, 1].
            kept: bool ``[B, 1, S, S]``, its known pixels.
            mask: the same over the grid of its tokens, bool ``[B, p, p]``.
        """
        return {}

    def drop_labels(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        """In training a share ``label_dropout`` of labels ``[B]`` becomes the null class."""
        if not self.training:
            return labels
        return drop_labels(labels, self.config.num_classes, self.config.label_dropout, generator)

    def tokenizer_arguments(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What `stream` needs of the tokenizer."""
        return {}

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise InputError unless the tokenizer decodes what this generator writes."""

        def describe(model: Any) -> str:
            kind = (
                f"numbers of width {model.latent_dim}"
                if model.vocab_size is None
                else f"ids below {model.vocab_size}"
            )
            return f"{model.num_tokens} tokens, {kind}"

        ours, theirs = describe(self), describe(tokenizer)
        if ours != theirs:
            raise InputError(
                f"{type(self).__name__} writes {ours}; {type(tokenizer).__name__} decodes {theirs}: "
                "they do not fit, choose the tokenizer that the generator was trained on."
            )

    def check_text_width(self, width: int) -> None:
        """Raise InputError unless this generator of texts reads features of this width."""
        if width != self.config.text_dim:
            raise InputError(
                f"{type(self).__name__} reads text features of width {self.config.text_dim}, the text "
                f"tower makes {width}: they do not fit."
            )
