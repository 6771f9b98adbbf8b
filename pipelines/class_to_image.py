"""A class in, pictures out: any class-conditional generator over its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generators.base import ImageGenerator
from ..modalities.errors import InputError
from ..tokenizers.base import Tokenizer
from .class_names import find_class, imagenet_names
from .editing import Blend, Edit, ends, weights_of
from .image_generation import (
    ImageGenerationPipeline,
    ImagePipelineOutput,
    Partial,
    Run,
    check_output_type,
)


class ClassToImagePipeline(ImageGenerationPipeline):
    """Classes to pictures.

    Example:
        >>> pipe = ClassToImagePipeline.from_pretrained("var-d16")
        >>> pipe("golden retriever", num_images_per_prompt=4).images[0].save("dog.png")

    Args:
        tokenizer, generator: the models.
        class_names: name of each class; default those of ImageNet, if there are 1000 classes.
    """

    condition = "class"
    model_cpu_offload_seq = "generator->tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: ImageGenerator,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        self.set_up(tokenizer, generator)
        self.register_modules(tokenizer=tokenizer, generator=generator)
        self.register_to_config(class_names=None if class_names is None else list(class_names))

    @property
    def num_classes(self) -> int:
        return self.generator.config.num_classes

    @cached_property
    def class_names(self) -> list[str]:
        """Name of each class; empty where they have none."""
        if self.config.class_names is not None:
            return list(self.config.class_names)
        return imagenet_names() if self.num_classes == 1000 else []

    def class_label(self, condition: int | str) -> int:
        """The number of a class by its number, its name, or a part of the name that no other has.

        Raises:
            InputError: no such class, or several.
        """
        return find_class(condition, self.num_classes, self.class_names)

    def class_name(self, label: int) -> str:
        """What a class is called; "class 7" where it has no name."""
        return self.class_names[label] if self.class_names else f"class {label}"

    def _labels(self, conditions: Sequence[Any]) -> Tensor:
        """int64 ``[B]``, or ``[B, num_classes + 1]`` weights if there is a blend among them."""
        pairs = [[self.class_label(end) for end in ends(c)] for c in conditions]
        labels = torch.tensor(pairs, device=self.device)
        if not any(isinstance(c, Blend) for c in conditions):
            return labels[:, 0]
        first, second = F.one_hot(labels, self.num_classes + 1).float().unbind(1)
        weights = torch.tensor(weights_of(conditions), device=self.device)
        return torch.lerp(first, second, weights[:, None])

    @torch.no_grad()
    def stream(
        self,
        class_labels: int | str | Blend | Sequence[int | str | Blend],
        num_tokens: int | None = None,
        num_steps: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        edit: Edit | None = None,
        output_type: str = "pil",
    ) -> Iterator[Partial]:
        """Yield a `Partial` after each step; closing the iterator cancels.

        Args:
            class_labels: one or several classes, each a number, a name ("golden retriever"), or a
                `Blend` of two.
            num_tokens: length of the sequence, for a generator that writes token by token.
            num_steps: of the generator, for one that works in steps (of a scale or cell, for FlowAR and
                xAR).
            num_inference_steps: of the decoder, where it takes any.
            guidance_scale: how strongly the class is followed; 1 is off and twice as quick.
            temperature, top_k, top_p: of the sampler.
            num_images_per_prompt: pictures of each class.
            generator: a list, one a picture, makes each picture independent of the batch.
            tokens, token_mask: ``[B, n]`` kept where the mask is True (default: all n).
            edit: what to keep of a picture, of `inpainting`, `outpainting` or `variation`.
            output_type: "pil", "np", "pt" or "tokens" (no decoding).

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        check_output_type(output_type)
        one = isinstance(class_labels, int | str | Blend)
        conditions = [class_labels] if one else list(class_labels)
        if not conditions:
            raise InputError("The list of classes is empty: give at least one class.")
        settings, steps = self.check_settings(
            {
                "num_tokens": num_tokens,
                "num_steps": num_steps,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
            }
        )
        seeds = self._seeds(generator, len(conditions), num_images_per_prompt)
        labels = self._labels([c for c in conditions for _ in range(num_images_per_prompt)])
        yield from self._stream(
            Run(
                seeds,
                {"labels": labels},
                settings,
                steps,
                edit=self._edit(edit, tokens, token_mask),
                output_type=output_type,
            )
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Blend | Sequence[int | str | Blend],
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Make pictures.

        Args:
            class_labels, options: see `stream`.
            callback_on_step_end: ``(pipeline, step, step, {"tokens": tokens})`` after each step; set
                ``pipeline._interrupt = True`` in it to stop with what there is.

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        partials = self.stream(class_labels, **options)
        return self._collect(partials, return_dict, callback_on_step_end)
