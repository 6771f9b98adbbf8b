"""A sentence in, pictures out: text tower -> ordered tokens -> flow decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..generators.autoregressive.flexar import FlexAR
from ..generators.conditioning.clip import TextImageCLIP
from ..modalities.errors import InputError
from ..modalities.image import to_pil
from ..modalities.text import clean_prompt
from ..tokenizers.image.flextok import FlexTok
from ..weights.loading import check_complete
from ..weights.registry import resolve_model
from .seeds import item_seeds, noise_stream, token_stream

OUTPUT_TYPES = ("pil", "np", "pt", "tokens")
# Pictures decoded together: enough to fill the cores, little enough to bound the memory.
DECODE_BATCH = 8


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Pictures (PIL list, ``[B, H, W, 3]`` array in [0, 1] or ``[B, 3, H, W]`` tensor in [-1, 1];
    None for "tokens"), tokens int64 ``[B, n]`` and the seed of each."""

    images: list[Image.Image] | np.ndarray | Tensor | None
    tokens: Tensor
    seeds: list[int]


@dataclass
class Partial:
    """What is there after ``step`` of ``total`` tokens.

    ``preview()`` decodes the tokens so far in few steps; ``output`` is set in the last one.
    """

    step: int
    total: int
    tokens: Tensor
    seeds: list[int]
    preview: Callable[[], list[Image.Image]]
    output: ImagePipelineOutput | None = None

    @property
    def images(self) -> list[Image.Image] | np.ndarray | Tensor | None:
        return None if self.output is None else self.output.images


@dataclass
class PromptReport:
    """How much of a prompt the model reads: ``kept`` is read, ``cut`` (empty if all fits) is not."""

    words: int
    tokens: int
    limit: int
    kept: str
    cut: str


@dataclass
class _Request:
    texts: list[str]
    null_texts: list[str]
    seeds: list[int]
    num_tokens: int


class TextToImagePipeline(DiffusionPipeline):
    """Text to pictures over ordered tokens.

    Example:
        >>> pipe = TextToImagePipeline.from_pretrained("sticker")
        >>> pipe("a red fox", num_images_per_prompt=4).images[0].save("fox.png")

    Args:
        tokenizer, generator, clip: the models.
        styles: style words that the model knows, comma-separated.
        default_num_tokens: tokens drawn where the call names none.
        preview_steps: flow steps of a preview.
        guidance_scale, temperature, top_k, top_p: defaults of the token sampler.
        decoder_guidance_scale: guidance of the flow decoder.
    """

    model_cpu_offload_seq = "clip->generator->tokenizer"

    def __init__(
        self,
        tokenizer: FlexTok,
        generator: FlexAR,
        clip: TextImageCLIP,
        styles: str = "",
        default_num_tokens: int = 64,
        preview_steps: int = 3,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        decoder_guidance_scale: float = 1.0,
    ):
        super().__init__()
        if (generator.config.vocab_size, generator.config.num_tokens) != (
            tokenizer.vocab_size,
            tokenizer.num_tokens,
        ):
            raise InputError(
                f"The generator writes {generator.config.num_tokens} tokens of "
                f"{generator.config.vocab_size} ids, the tokenizer reads {tokenizer.num_tokens} of "
                f"{tokenizer.vocab_size}: they do not fit."
            )
        self.register_modules(tokenizer=tokenizer, generator=generator, clip=clip)
        self.register_to_config(
            styles=styles,
            default_num_tokens=default_num_tokens,
            preview_steps=preview_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            decoder_guidance_scale=decoder_guidance_scale,
        )
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> TextToImagePipeline:
        """A shipped model by its plain name, a folder, or a hub id (as in diffusers).

        Raises:
            InputError: nothing of that name, or a folder that is not such a pipeline.
        """
        path = resolve_model(name)
        options.setdefault("dtype", torch.float32)
        try:
            pipeline = super().from_pretrained(path, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f'"{name}" could not be loaded as a text-to-image model: {reason}'
            ) from error
        except Exception as error:  # safetensors raises its own error for a damaged file
            raise InputError(
                f'"{name}" could not be loaded: a weight file is damaged ({error}). Copy it again.'
            ) from error
        if not isinstance(pipeline, cls):
            raise InputError(f'"{name}" holds a {type(pipeline).__name__}, not a {cls.__name__}.')
        for part, model in pipeline.components.items():
            check_complete(model, f"{name}/{part}")
        pipeline.name = str(name)
        return pipeline

    @property
    def styles(self) -> list[str]:
        return [style for style in self.config.styles.split(",") if style]

    @property
    def num_tokens(self) -> int:
        """The longest sequence."""
        return self.tokenizer.num_tokens

    @property
    def default_num_tokens(self) -> int:
        return self.config.default_num_tokens

    @property
    def image_size(self) -> int:
        return self.tokenizer.image_size

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

    def encode_prompt(self, texts: Sequence[str], null_texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Features and masks of prompts and of their negatives, padded to one length L.

        Returns:
            ``[B, L, text_dim]``, bool ``[B, L]``, and the same for the negatives.
        """
        features, mask = self.clip.text_features([*texts, *null_texts])
        count = len(texts)
        return features[:count], mask[:count], features[count:], mask[count:]

    def _request(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None,
        height: int | None,
        width: int | None,
        num_tokens: int | None,
        style: str | None,
        num_images_per_prompt: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> _Request:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [clean_prompt(text) for text in prompts]
        if not prompts:
            raise InputError("The list of prompts is empty: give at least one prompt.")
        for side in (height, width):
            if side not in (None, self.image_size):
                raise InputError(
                    f"This model makes {self.image_size}x{self.image_size} pictures, got {side}."
                )
        if style is not None and style not in self.styles:
            raise InputError(f'Unknown style "{style}": choose from {", ".join(self.styles)}.')
        if num_images_per_prompt < 1:
            raise InputError(
                f"The number of pictures must be at least 1, got {num_images_per_prompt}."
            )
        count = self.default_num_tokens if num_tokens is None else num_tokens
        if not 1 <= count <= self.num_tokens:
            raise InputError(
                f"This model makes 1 to {self.num_tokens} tokens, got {count}. "
                f"Use {min(max(count, 1), self.num_tokens)}."
            )
        negatives = negative_prompt or ""
        negatives = [negatives] * len(prompts) if isinstance(negatives, str) else list(negatives)
        if len(negatives) != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts need as many negative prompts, got {len(negatives)}."
            )
        suffix = f", {style}" if style else ""
        # A long prompt must not push its style word over the limit.
        texts = [self.prompt_report(text).kept + suffix for text in prompts]
        repeat = num_images_per_prompt
        return _Request(
            texts=[text for text in texts for _ in range(repeat)],
            null_texts=[text for text in negatives for _ in range(repeat)],
            seeds=item_seeds(generator, len(prompts) * repeat),
            num_tokens=count,
        )

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_tokens: int | None = None,
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
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
    ) -> Iterator[Partial]:
        """Like ``__call__``, yielding a `Partial` after each token; closing the iterator cancels."""
        if output_type not in OUTPUT_TYPES:
            raise InputError(
                f'Unknown output_type "{output_type}": choose from {", ".join(OUTPUT_TYPES)}.'
            )
        request = self._request(
            prompt,
            negative_prompt,
            height,
            width,
            num_tokens,
            style,
            num_images_per_prompt,
            generator,
        )
        batch = len(request.texts)
        features, mask, null_features, null_mask = self.encode_prompt(
            request.texts, request.null_texts
        )
        if prompt_embeds is not None:
            features, mask, null_features, null_mask = self._embedded(
                prompt_embeds, batch, null_features, null_mask
            )
        tokens, token_mask = self._given_tokens(tokens, token_mask, batch)
        default = self.config
        drawn = self.generator.stream(
            features,
            mask,
            [token_stream(seed) for seed in request.seeds],
            num_tokens=request.num_tokens,
            null_features=null_features,
            null_mask=null_mask,
            guidance_scale=default.guidance_scale if guidance_scale is None else guidance_scale,
            temperature=default.temperature if temperature is None else temperature,
            top_k=default.top_k if top_k is None else top_k,
            top_p=default.top_p if top_p is None else top_p,
            tokens=tokens,
            token_mask=token_mask,
        )
        for step, ids in enumerate(drawn, start=1):
            partial = Partial(
                step,
                request.num_tokens,
                ids,
                request.seeds,
                lambda ids=ids: self.decode_tokens(ids, request.seeds, self.config.preview_steps),
            )
            if step == request.num_tokens:
                partial.output = self._output(ids, request.seeds, num_inference_steps, output_type)
            yield partial

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_tokens: int | None = None,
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
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make pictures.

        Args:
            prompt: one or several.
            negative_prompt: steers away from it, in place of the empty prompt.
            num_tokens: length of the sequence, 1 to `num_tokens`: short is coarse and quick.
            num_inference_steps: steps of the flow decoder.
            guidance_scale: how strongly the prompt is followed; 1 is off and twice as quick.
            temperature, top_k, top_p: of the token sampler; temperature 0 is greedy.
            style: one of `styles`.
            generator: a list, one a picture, makes each picture independent of the batch.
            tokens, token_mask: ids ``[B, n]`` kept where the mask is True (default: all n), for
                continuation and mixing.
            prompt_embeds: text features ``[B, L, text_dim]`` in place of those of the prompt.
            output_type: "pil", "np", "pt" or "tokens" (no decoding).
            callback_on_step_end: ``(pipeline, step, step, {"tokens": ids})`` after each token; set
                ``pipeline._interrupt = True`` in it to stop with what there is.

        Raises:
            InputError: an argument out of range, with its value.
        """
        self._interrupt = False
        partials = self.stream(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_tokens=num_tokens,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            style=style,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            tokens=tokens,
            token_mask=token_mask,
            prompt_embeds=prompt_embeds,
            output_type=output_type,
        )
        first = next(partials)
        with self.progress_bar(total=first.total) as bar:
            for partial in chain([first], partials):
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(
                        self, partial.step, partial.step, {"tokens": partial.tokens}
                    )
                if self._interrupt:
                    break
        output = partial.output or self._output(
            partial.tokens, partial.seeds, num_inference_steps, output_type
        )
        return output if return_dict else (output.images, output.tokens, output.seeds)

    @torch.no_grad()
    def decode_tokens(
        self, tokens: Tensor, seeds: Sequence[int], num_inference_steps: int | None = None
    ) -> list[Image.Image]:
        """Tokens ``[B, k]`` of any length, and the seed of each picture, -> pictures."""
        return to_pil(self._decode(tokens, seeds, num_inference_steps))

    def _decode(self, tokens: Tensor, seeds: Sequence[int], steps: int | None) -> Tensor:
        pictures = []
        for start in range(0, len(tokens), DECODE_BATCH):
            part = slice(start, start + DECODE_BATCH)
            pictures.append(
                self.tokenizer.decode(
                    tokens[part],
                    num_inference_steps=steps,
                    guidance_scale=self.config.decoder_guidance_scale,
                    generator=[noise_stream(seed) for seed in seeds[part]],
                )
            )
        return torch.cat(pictures).clamp(-1, 1)

    def _output(
        self, tokens: Tensor, seeds: list[int], steps: int | None, output_type: str
    ) -> ImagePipelineOutput:
        images = None
        if output_type != "tokens":
            images = self._decode(tokens, seeds, steps)
        if output_type == "pil":
            images = to_pil(images)
        elif output_type == "np":
            images = ((images + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=images, tokens=tokens, seeds=seeds)

    def _embedded(
        self, prompt_embeds: Tensor, batch: int, null_features: Tensor, null_mask: Tensor
    ) -> tuple[Tensor, ...]:
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != self.clip.text_dim:
            raise InputError(
                f"prompt_embeds must have the shape [{batch} or 1, length, {self.clip.text_dim}], "
                f"got {list(prompt_embeds.shape)}."
            )
        features = prompt_embeds.expand(batch, -1, -1)
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        length = max(features.shape[1], null_features.shape[1])
        pad = length - features.shape[1], length - null_features.shape[1]
        return (
            F.pad(features, (0, 0, 0, pad[0])),
            F.pad(mask, (0, pad[0])),
            F.pad(null_features, (0, 0, 0, pad[1])),
            F.pad(null_mask, (0, pad[1])),
        )

    def _given_tokens(
        self, tokens: Tensor | None, token_mask: Tensor | None, batch: int
    ) -> tuple[Tensor | None, Tensor | None]:
        if tokens is None:
            return None, None
        self.tokenizer.check_tokens(tokens)
        if token_mask is None:
            token_mask = torch.ones_like(tokens, dtype=torch.bool)
        if len(tokens) not in (1, batch) or token_mask.shape != tokens.shape:
            raise InputError(
                f"tokens and token_mask must have the shape [{batch} or 1, count], got "
                f"{list(tokens.shape)} and {list(token_mask.shape)}."
            )
        return tokens.expand(batch, -1), token_mask.expand(batch, -1)
