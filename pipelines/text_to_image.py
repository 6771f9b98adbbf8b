"""A sentence in, pictures out: text tower -> tokens -> decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generators.base import ImageGenerator
from ..generators.conditioning.clip import TextImageCLIP
from ..generators.conditioning.t5 import TextT5
from ..modalities.errors import InputError
from ..modalities.text import clean_prompt
from ..tokenizers.base import Tokenizer
from ..tokenizers.image import tatitok
from ..weights.registry import ModelInfo
from .editing import Blend, Edit, ends, mix, weights_of
from .image_generation import (
    ImageGenerationPipeline,
    ImagePipelineOutput,
    Partial,
    Run,
    check_output_type,
)


@dataclass
class PromptReport:
    """How much of a prompt the model reads: ``kept`` is read, ``cut`` (empty if all fits) is not."""

    words: int
    tokens: int
    limit: int
    kept: str
    cut: str


class TextToImagePipeline(ImageGenerationPipeline):
    """Text to pictures.

    Example:
        >>> pipe = TextToImagePipeline.from_pretrained("sticker")
        >>> pipe("a red fox", num_images_per_prompt=4).images[0].save("fox.png")

    Args:
        tokenizer, generator: the models.
        clip: the text tower that the generator was trained with, a CLIP or a T5.
        styles: style words that the model knows, comma-separated.
        default_num_tokens: tokens drawn where the call names none; default: all.
        preview_steps: steps of a preview, of a decoder that takes steps.
        num_steps, guidance_scale, temperature, top_k, top_p: defaults of the sampler in place of the
            generator's own.
        decoder_guidance_scale: of a flow decoder, in place of the tokenizer's own.
    """

    condition = "text"
    model_cpu_offload_seq = "clip->generator->tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: ImageGenerator,
        clip: TextImageCLIP | TextT5,
        styles: str = "",
        default_num_tokens: int | None = None,
        preview_steps: int = 3,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        decoder_guidance_scale: float | None = None,
    ):
        super().__init__()
        self.set_up(tokenizer, generator)
        generator.check_text_width(clip.text_dim)
        self.register_modules(tokenizer=tokenizer, generator=generator, clip=clip)
        self.register_to_config(
            styles=styles,
            default_num_tokens=default_num_tokens,
            preview_steps=preview_steps,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            decoder_guidance_scale=decoder_guidance_scale,
        )

    @classmethod
    def _further_parts(
        cls, name: str | Path, info: ModelInfo | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        clip = options.pop("clip", None)
        if clip is None:
            if info is None or info.text_tower is None:
                raise InputError(f'"{name}" holds a generator alone: pass its text tower, clip=.')
            kind, _, source = info.text_tower.partition(":")
            load = {
                "clip": lambda: TextImageCLIP.from_open_clip(source, "openai"),
                "t5": lambda: TextT5.from_hub(source),
            }
            clip = load[kind]()
        return {"clip": clip}

    @property
    def styles(self) -> list[str]:
        return [style for style in self.config.styles.split(",") if style]

    def prompt_report(self, prompt: str) -> PromptReport:
        """What of a prompt the text tower reads; it reads a limited number of tokens."""
        words = prompt.split()
        limit = self.clip.context_length
        kept = len(words)
        tokens = self.clip.count_tokens(prompt)
        if tokens > limit:
            low, high = 0, kept
            while low < high:
                middle = (low + high + 1) // 2
                if self.clip.count_tokens(" ".join(words[:middle])) <= limit:
                    low = middle
                else:
                    high = middle - 1
            kept = low
        return PromptReport(
            len(words), tokens, limit, " ".join(words[:kept]), " ".join(words[kept:])
        )

    def _check(
        self,
        height: int | None,
        width: int | None,
        style: str | None,
        negative_prompt: str | Sequence[str] | None,
        prompts: int,
    ) -> list[str]:
        """One negative prompt for each prompt.

        Raises:
            InputError: a size or style that this model has not, or another number of negatives.
        """
        if not prompts:
            raise InputError("The list of prompts is empty: give at least one prompt.")
        for side in (height, width):
            if side not in (None, self.image_size):
                raise InputError(
                    f"This model makes {self.image_size}x{self.image_size} pictures, got {side}."
                )
        if style is not None and style not in self.styles:
            known = (
                f"choose from {', '.join(self.styles)}" if self.styles else "this model has none"
            )
            raise InputError(f'Unknown style "{style}": {known}.')
        negatives = negative_prompt or ""
        negatives = [negatives] * prompts if isinstance(negatives, str) else list(negatives)
        if len(negatives) != prompts:
            raise InputError(
                f"{prompts} prompts need as many negative prompts, got {len(negatives)}."
            )
        return negatives

    def _texts(self, prompts: Sequence[Any], style: str | None, end: int) -> list[str]:
        """What the tower reads of the prompts, of blends of one end."""
        suffix = f", {style}" if style else ""
        # A long prompt must not push its style word over the limit.
        return [self.prompt_report(clean_prompt(ends(p)[end])).kept + suffix for p in prompts]

    def _encode(
        self, prompts: Sequence[Any], style: str | None, negatives: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Arguments of the generator's ``stream`` and of the tokenizer's ``decode``."""
        reads_text = "text_embeddings" in self._decoder_parameters
        first = self._texts(prompts, style, 0)
        blended = any(isinstance(prompt, Blend) for prompt in prompts)
        texts = [first, self._texts(prompts, style, 1)] if blended else [first]
        joined = [text for each in texts for text in each]
        both = self.generator.text_condition(self.clip, joined, negatives)
        decoding = {}
        if reads_text:
            embeddings = tatitok.embed_ids(self.clip.model, self.clip.tokenize(joined))
            decoding["text_embeddings"] = embeddings[: len(first)]
        if not blended:
            return both, decoding
        weights = torch.tensor(weights_of(prompts), device=self.device)
        null = {name: value for name, value in both.items() if name.startswith("null")}
        own = {name: value for name, value in both.items() if name not in null}
        n = len(first)
        mixed = mix(
            {name: value[:n] for name, value in own.items()},
            {name: value[n:] for name, value in own.items()},
            weights,
        )
        if reads_text:
            decoding = mix(decoding, {"text_embeddings": embeddings[n:]}, weights)
        return {**mixed, **null}, decoding

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Blend | Sequence[str | Blend],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_tokens: int | None = None,
        num_steps: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        style: str | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        edit: Edit | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
    ) -> Iterator[Partial]:
        """Yield a `Partial` after each step; closing the iterator cancels.

        Args:
            prompt: one or several, each a text or a `Blend` of two.
            negative_prompt: steers away from it, in place of the empty prompt.
            num_tokens: length of the sequence, for a generator that writes token by token: short is
                coarse and quick where tokens are ordered.
            num_steps: of the generator, for one that works in steps.
            num_inference_steps: of the decoder, where it takes any.
            guidance_scale: how strongly the prompt is followed; 1 is off and twice as quick.
            temperature, top_k, top_p: of the sampler; temperature 0 is greedy.
            style: one of `styles`.
            generator: a list, one a picture, makes each picture independent of the batch.
            tokens, token_mask: ids ``[B, n]`` kept where the mask is True (default: all n), for
                continuation and mixing.
            edit: what to keep of a picture, of `inpainting`, `outpainting` or `variation`.
            prompt_embeds: text features ``[B, L, text_dim]`` in place of those of the prompt, for a
                generator that reads nothing else of it.
            output_type: "pil", "np", "pt" or "tokens" (no decoding).

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        check_output_type(output_type)
        prompts = [prompt] if isinstance(prompt, str | Blend) else list(prompt)
        negatives = self._check(height, width, style, negative_prompt, len(prompts))
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
        seeds = self._seeds(generator, len(prompts), num_images_per_prompt)
        repeat = range(num_images_per_prompt)
        condition, decoding = self._encode(
            [text for text in prompts for _ in repeat],
            style,
            [text for text in negatives for _ in repeat],
        )
        if prompt_embeds is not None:
            condition = self._embedded(prompt_embeds, condition, len(seeds))
        yield from self._stream(
            Run(
                seeds,
                condition,
                settings,
                steps,
                decoding,
                self._edit(edit, tokens, token_mask),
                output_type,
            )
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Blend | Sequence[str | Blend],
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Make pictures.

        Args:
            prompt, options: see `stream`.
            callback_on_step_end: ``(pipeline, step, step, {"tokens": tokens})`` after each step; set
                ``pipeline._interrupt = True`` in it to stop with what there is.

        Raises:
            InputError: an argument out of range, or one that this model does not take.
        """
        return self._collect(self.stream(prompt, **options), return_dict, callback_on_step_end)

    def _embedded(
        self, prompt_embeds: Tensor, condition: dict[str, Tensor], batch: int
    ) -> dict[str, Tensor]:
        """The condition with other text features, all of whose positions count."""
        if "text_mask" not in condition:
            raise InputError(f"{type(self.generator).__name__} reads more than prompt_embeds.")
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != self.clip.text_dim:
            raise InputError(
                f"prompt_embeds must have the shape [{batch} or 1, length, {self.clip.text_dim}], "
                f"got {list(prompt_embeds.shape)}."
            )
        features = prompt_embeds.expand(batch, -1, -1)
        length = max(features.shape[1], condition["null_features"].shape[1])
        found = {
            "text_features": features,
            "text_mask": torch.ones(features.shape[:2], dtype=torch.bool, device=features.device),
            "null_features": condition["null_features"],
            "null_mask": condition["null_mask"],
        }
        return {
            name: F.pad(value, (0, 0) * (value.ndim - 2) + (0, length - value.shape[1]))
            for name, value in found.items()
        }
