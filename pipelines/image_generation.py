"""What the pipelines from text and from classes share: tokens step by step, pictures out of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..generators.auto import AutoGenerator
from ..generators.base import SETTINGS, ImageGenerator
from ..modalities.errors import InputError
from ..modalities.image import fit_image, load_image, to_pil, to_tensor
from ..tokenizers.auto import AutoTokenizer
from ..tokenizers.base import Tokenizer
from ..weights.registry import (
    ModelInfo,
    find_model,
)
from . import editing
from .editing import Edit
from .loading import load_folder
from .seeds import item_seeds, noise_stream, token_stream

OUTPUT_TYPES = ("pil", "np", "pt", "tokens")
# Pictures decoded together: enough to fill the cores, little enough to bound the memory.
DECODE_BATCH = 8
PREVIEW_STEPS = 3


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Pictures (PIL list, ``[B, H, W, 3]`` array in [0, 1] or ``[B, 3, H, W]`` tensor in [-1, 1];
    None for "tokens"), tokens int64 ``[B, n]`` or float ``[B, n, latent_dim]``, the seed of each."""

    images: list[Image.Image] | np.ndarray | Tensor | None
    tokens: Tensor
    seeds: list[int]


@dataclass
class Partial:
    """What is there after ``step`` of ``total`` steps, each a token, a scale or one of the sampler's.

    ``decode(rows, num_inference_steps)`` makes pictures of the tokens so far, ``finish()`` what a call
    returns that ends here; ``output`` is set in the last one.
    """

    step: int
    total: int
    tokens: Tensor
    seeds: list[int]
    decode: Callable[[slice, int | None], list[Image.Image]]
    finish: Callable[[], ImagePipelineOutput]
    preview_steps: int | None = None
    output: ImagePipelineOutput | None = None

    @property
    def images(self) -> list[Image.Image] | np.ndarray | Tensor | None:
        return None if self.output is None else self.output.images

    def preview(self) -> list[Image.Image]:
        """All pictures as far as they are, decoded in few steps."""
        return self.decode(slice(None), self.preview_steps)


@dataclass
class Run:
    """One call, checked and ready to sample.

    Attributes:
        condition: arguments of the generator's ``stream``.
        decoding: arguments of the tokenizer's ``decode``, ``[B, ...]`` each.
        settings: of the generator, all with their values.
        num_inference_steps: of the decoder.
    """

    seeds: list[int]
    condition: dict[str, Any]
    settings: dict[str, Any]
    num_inference_steps: int | None = None
    decoding: dict[str, Tensor] = field(default_factory=dict)
    edit: Edit | None = None
    output_type: str = "pil"


class ImageGenerationPipeline(DiffusionPipeline):
    """A generator over a tokenizer; see `TextToImagePipeline` and `ClassToImagePipeline`."""

    condition: ClassVar[str]

    def set_up(self, tokenizer: Tokenizer, generator: ImageGenerator) -> None:
        """Raise InputError unless the two fit each other and this kind of pipeline."""
        if generator.condition != self.condition:
            raise InputError(
                f"{type(generator).__name__} draws from a {generator.condition}, not from a "
                f"{self.condition}: load it as a {generator.condition.capitalize()}ToImagePipeline."
            )
        generator.check_tokenizer(tokenizer)
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls, name: str | Path, files: str | Path | None = None, **options: Any
    ) -> ImageGenerationPipeline:
        """Load a model by name, ready to draw.

        Args:
            name: a shipped model by its plain name; a published generator by its registered name or
                hub id, with the tokenizer that belongs to it; a folder of ``save_pretrained``, of a
                pipeline or of a generator alone; or the hub id of a saved pipeline.
            files: folder with the published files of the generator; default: the hub's cache, then a
                download.
            options: parts in place of the model's own, ``tokenizer=`` (also by name or folder) and
                ``clip=``; or others of diffusers' ``from_pretrained``.

        Raises:
            InputError: nothing of that name, another kind of model, damaged files, or parts that do not
                fit each other.
        """
        info = find_model(str(name), "-to-image")
        folder = Path(name) if Path(name).is_dir() and (info is None or not info.shipped) else None
        alone = folder is not None and not (folder / "model_index.json").is_file()
        if files is not None or (alone and (folder / "config.json").is_file()):
            pipeline = cls._from_generator(name, files, info, options)
        elif folder is None and info is not None and not info.shipped:
            pipeline = cls._from_generator(info.name, None, info, options)
        else:
            pipeline = load_folder(cls, super().from_pretrained, name, **options)
        pipeline.name = str(name)
        return pipeline

    @classmethod
    def _from_generator(
        cls,
        name: str | Path,
        files: str | Path | None,
        info: ModelInfo | None,
        options: dict[str, Any],
    ) -> ImageGenerationPipeline:
        if info is not None and not info.task.startswith(cls.condition):
            raise InputError(f'"{info.name}" is a {info.task} model, not {cls.condition}-to-image.')
        tokenizer = options.pop("tokenizer", None) or (info and info.tokenizer)
        if tokenizer is None:
            raise InputError(
                f'"{name}" holds a generator alone: pass its tokenizer too, tokenizer="NAME" or a '
                "folder."
            )
        generator = AutoGenerator.from_pretrained(name, files)
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        parts = {"tokenizer": tokenizer, "generator": generator}
        parts |= cls._further_parts(name, info, options)
        dtype = options.pop("dtype", None)
        pipeline = cls(**parts, **options)
        return pipeline if dtype is None else pipeline.to(dtype)

    @classmethod
    def _further_parts(
        cls, name: str | Path, info: ModelInfo | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """What the pipeline has beside tokenizer and generator; taken out of the options if there."""
        return {}

    @property
    def num_tokens(self) -> int:
        """The longest sequence."""
        return self.generator.num_tokens

    @property
    def default_num_tokens(self) -> int:
        return self.config.get("default_num_tokens") or self.num_tokens

    @property
    def image_size(self) -> int:
        return self.tokenizer.image_size

    @property
    def preview_steps(self) -> int | None:
        """Steps of a preview's decoder; None where it takes none."""
        if "num_inference_steps" not in self._decoder_parameters:
            return None
        return self.config.get("preview_steps") or PREVIEW_STEPS

    @property
    def _decoder_parameters(self) -> set[str]:
        return set(inspect.signature(self.tokenizer.decode).parameters)

    @property
    def settings(self) -> dict[str, Any]:
        """What a call may set, with the values that it has otherwise: of the generator those of
        `SETTINGS` that it takes, and ``num_inference_steps`` of a decoder that takes steps."""
        found = type(self.generator).settings(self.generator.config)
        own = {name: self.config.get(name) for name in found}
        found |= {name: value for name, value in own.items() if value is not None}
        if "num_tokens" in found:
            found["num_tokens"] = self.default_num_tokens
        if "num_inference_steps" in self._decoder_parameters:
            found["num_inference_steps"] = self.tokenizer.config.get("num_inference_steps")
        return found

    # What to keep of a picture or of tokens, for `edit=`.

    def inpainting(self, picture: Any, mask: Any) -> Edit:
        """Keep a picture but for what a mask paints over.

        Args:
            picture: path, bytes or PIL; its middle square is used.
            mask: of the same size, white where to draw anew.

        Raises:
            InputError: see `editing.inpainting`.
        """
        picture, mask = load_image(picture), load_image(mask)
        if mask.size != picture.size:
            raise InputError(
                f"The mask must be as large as the picture, {picture.width}x{picture.height} pixels, "
                f"got {mask.width}x{mask.height}."
            )
        pixels, painted = (
            to_tensor(fit_image(each, self.image_size)).to(self.device) for each in (picture, mask)
        )
        redraw = painted.mean(1, keepdim=True) > 0
        return editing.inpainting(self.generator, self.tokenizer, pixels, redraw)

    def outpainting(self, picture: Any, side: str, amount: int | None = None) -> Edit:
        """Go on beyond one side of a picture; the results are that much larger.

        Args:
            picture: path, bytes or PIL; it is scaled so that it is as long along that side as the
                model's pictures.
            side: "left", "right", "top" or "bottom".
            amount: pixels to add, in whole tokens; default: half a picture.

        Raises:
            InputError: see `editing.outpainting`.
        """
        picture, size = load_image(picture), self.image_size
        along = picture.height if side in ("left", "right") else picture.width
        scaled = [max(size, round(length * size / along)) for length in picture.size]
        pixels = to_tensor(picture.resize(scaled, Image.Resampling.LANCZOS)).to(self.device)
        return editing.outpainting(self.generator, self.tokenizer, pixels, side, amount)

    def variation(self, tokens: Tensor, keep: int) -> Edit:
        """Keep the first of the ordered tokens ``[N]`` of a picture and draw the others anew."""
        return editing.variation(self.tokenizer, tokens.to(self.device), keep)

    # Sampling

    def check_settings(self, given: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
        """All settings of the generator, and the decoder's steps, where None was given the default.

        Raises:
            InputError: a setting that this model does not take, or a number of tokens that it has not.
        """
        found, model = self.settings, type(self.generator).__name__
        for name, value in given.items():
            if value is None:
                continue
            if name not in found:
                whose = type(self.tokenizer).__name__ if name not in SETTINGS else model
                raise InputError(
                    f"{whose} takes no {name}: leave it out. "
                    f"This model takes {', '.join(found) or 'none'}."
                )
            found[name] = value
        count = found.get("num_tokens")
        if count is not None and not 1 <= count <= self.num_tokens:
            raise InputError(
                f"This model makes 1 to {self.num_tokens} tokens, got {count}. "
                f"Use {min(max(count, 1), self.num_tokens)}."
            )
        steps = found.pop("num_inference_steps", None)
        if steps is not None and steps < 1:
            raise InputError(f"The decoder takes 1 step or more, got {steps}.")
        return found, steps

    def _seeds(self, generator: Any, conditions: int, each: int) -> list[int]:
        if each < 1:
            raise InputError(f"The number of pictures must be at least 1, got {each}.")
        return item_seeds(generator, conditions * each)

    def _edit(self, edit: Edit | None, tokens: Tensor | None, token_mask: Tensor | None) -> Any:
        """``tokens`` and ``token_mask`` of a call as an edit."""
        if tokens is None:
            return edit
        if edit is not None:
            raise InputError("Give either an edit or tokens, not both.")
        if token_mask is None:
            token_mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if token_mask.shape != tokens.shape[:2]:
            raise InputError(
                f"tokens and token_mask must have the same batch and count, got "
                f"{list(tokens.shape)} and {list(token_mask.shape)}."
            )
        if self.tokenizer.vocab_size is None:
            self.tokenizer.check_latents(tokens)
        else:
            self.tokenizer.check_tokens(tokens)
        return Edit("vary", tokens, token_mask)

    def _stream(self, run: Run) -> Iterator[Partial]:
        """Yield a `Partial` after each step of the generator."""
        batch, edit = len(run.seeds), run.edit
        arguments = {**run.condition, **run.settings}
        arguments |= self.generator.tokenizer_arguments(self.tokenizer)
        if edit is not None:
            kept = {"tokens": edit.tokens, "token_mask": edit.token_mask, **edit.arguments}
            if len(edit.tokens) not in (1, batch):
                raise InputError(
                    f"Given tokens must be of 1 or {batch} pictures, got {len(edit.tokens)}."
                )
            arguments |= {
                name: value.to(self.device).expand(batch, *value.shape[1:])
                for name, value in kept.items()
            }
        streams = [token_stream(seed) for seed in run.seeds]
        total = self.generator.num_yields(
            run.settings.get("num_tokens"), run.settings.get("num_steps")
        )
        for step, tokens in enumerate(
            self.generator.stream(generators=streams, **arguments), start=1
        ):

            def decode(rows: slice, steps: int | None, tokens: Tensor = tokens) -> list:
                return to_pil(self._decode(tokens, run, rows, steps))

            def finish(tokens: Tensor = tokens) -> ImagePipelineOutput:
                return self._output(tokens, run)

            partial = Partial(step, total, tokens, run.seeds, decode, finish, self.preview_steps)
            if step == total:
                partial.output = finish()
            yield partial

    def _collect(
        self,
        partials: Iterator[Partial],
        return_dict: bool,
        callback: Callable[[Any, int, int, dict], dict] | None,
    ) -> ImagePipelineOutput | tuple:
        self._interrupt = False
        first = next(partials)
        with self.progress_bar(total=first.total) as bar:
            for partial in chain([first], partials):
                bar.update()
                if callback is not None:
                    callback(self, partial.step, partial.step, {"tokens": partial.tokens})
                if self._interrupt:
                    break
        output = partial.output or partial.finish()
        return output if return_dict else (output.images, output.tokens, output.seeds)

    @torch.no_grad()
    def decode_tokens(
        self, tokens: Tensor, seeds: Sequence[int], num_inference_steps: int | None = None
    ) -> list[Image.Image]:
        """Tokens ``[B, k]`` of any length, and the seed of each picture, -> pictures."""
        run = Run(list(seeds), {}, {})
        return to_pil(self._decode(tokens, run, slice(None), num_inference_steps))

    @torch.no_grad()
    def _decode(self, tokens: Tensor, run: Run, rows: slice, steps: int | None) -> Tensor:
        """Pictures ``[B, 3, S, S]`` of some rows of the batch, with the pixels that an edit keeps."""
        known = self._decoder_parameters
        tokens, seeds = tokens[rows], run.seeds[rows]
        decoding = {name: value[rows] for name, value in run.decoding.items() if name in known}
        pictures = []
        for start in range(0, len(tokens), DECODE_BATCH):
            part = slice(start, start + DECODE_BATCH)
            options: dict[str, Any] = {
                "num_inference_steps": steps or run.num_inference_steps,
                "guidance_scale": self.config.get("decoder_guidance_scale"),
                "generator": [noise_stream(seed) for seed in seeds[part]],
            }
            options = {name: value for name, value in options.items() if name in known}
            options |= {name: value[part] for name, value in decoding.items()}
            pictures.append(self._decode_some(tokens[part], options))
        whole = torch.cat(pictures).clamp(-1, 1)
        return whole if run.edit is None else run.edit.finish(whole)

    def _decode_some(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        tokenizer = self.tokenizer
        count, missing = tokens.shape[1], tokenizer.num_tokens - tokens.shape[1]
        if not missing or tokenizer.ordered:
            return tokenizer.decode(tokens, **options)
        size = (self.image_size, self.image_size)
        if tokens.ndim == 3:  # Those of a smaller picture.
            side = math.isqrt(count)
            small = tokenizer.decode_latents(tokens.mT.unflatten(2, (side, side)))
            return F.interpolate(small, size=size)
        pictures = tokenizer.decode(F.pad(tokens, (0, missing)), **options)
        side = tokenizer.token_grid
        if side is None:
            return pictures
        # White where no token is yet.
        there = torch.arange(side * side, device=tokens.device) < count
        there = F.interpolate(there.view(1, 1, side, side).float(), size=size) > 0.5
        return torch.where(there, pictures, torch.ones_like(pictures))

    def _output(self, tokens: Tensor, run: Run) -> ImagePipelineOutput:
        images = None
        if run.output_type != "tokens":
            images = self._decode(tokens, run, slice(None), None)
        if run.output_type == "pil":
            images = to_pil(images)
        elif run.output_type == "np":
            images = ((images + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=images, tokens=tokens, seeds=run.seeds)


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise InputError(
            f'Unknown output_type "{output_type}": choose from {", ".join(OUTPUT_TYPES)}.'
        )
