"""Any generator of pictures over any tokenizer that it fits, from a folder of pictures."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generators.autoregressive.flexar import FlexAR, FlexARClass
from ..generators.autoregressive.rar import RAR
from ..generators.autoregressive.token_shuffle import TokenShuffleAR
from ..generators.autoregressive.tokenbridge import TokenBridge
from ..generators.autoregressive.xar import XAR
from ..generators.base import ImageGenerator
from ..generators.conditioning.clip import TextImageCLIP
from ..generators.masked.enat import ENAT
from ..generators.masked.himar import HiMAR
from ..generators.masked.maskgen import MaskGenKL, MaskGenVQ
from ..generators.masked.maskgit import MaskGIT
from ..generators.next_scale.flowar import FlowAR
from ..generators.next_scale.var import VAR
from ..modalities.datasets import ImageTextDataset, ImageTextFolder, StickerPack
from ..modalities.errors import InputError
from ..modalities.image import to_pil
from ..modalities.token_shards import TokenShards
from ..tokenizers.auto import AutoTokenizer
from ..tokenizers.base import Tokenizer
from ..weights.registry import find_model
from .captions import open_captions
from .tasks import (
    Task,
    build,
    from_uint8,
    item_weights,
    load_frozen,
    load_pictures,
    load_tokens,
    numbered,
    save_grid,
)

CLASSES = "classes.json"
SAMPLES = 4  # Pictures of each prompt or class in a sample.


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"vocab_size": tokenizer.vocab_size, "num_tokens": tokenizer.num_tokens}


def _latents(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"latent_dim": tokenizer.latent_dim, "num_tokens": tokenizer.num_tokens}


def _side(tokenizer: Tokenizer) -> int:
    side = math.isqrt(tokenizer.num_tokens)
    if side * side != tokenizer.num_tokens:
        raise InputError(
            f"This generator needs tokens on a square grid, the tokenizer makes "
            f"{tokenizer.num_tokens}: choose a tokenizer of patches."
        )
    return side


def _himar(tokenizer: Tokenizer) -> dict[str, Any]:
    return {**_latents(tokenizer), "num_pivots": (_side(tokenizer) // 2) ** 2}


def _flowar(tokenizer: Tokenizer) -> dict[str, Any]:
    """Scales of twice the side of the one before, as the published ones."""
    side = _side(tokenizer)
    scales = [side >> k for k in reversed(range(side.bit_length()))]
    return {"latent_dim": tokenizer.latent_dim, "patch_nums": scales}


def _xar(tokenizer: Tokenizer) -> dict[str, Any]:
    side = _side(tokenizer)
    return {"latent_dim": tokenizer.latent_dim, "grid_size": side, "cell_size": side // 2}


def _token_shuffle(tokenizer: Tokenizer) -> dict[str, Any]:
    side = _side(tokenizer)
    return {"vocab_size": tokenizer.vocab_size, "grid": [side, side], "prompt_dropout": 0.0}


def _var(tokenizer: Tokenizer) -> dict[str, Any]:
    quantizer = tokenizer.quantizer
    scales = {"code_dim": quantizer.codebook.dim, "patch_nums": list(quantizer.patch_nums)}
    return {"vocab_size": tokenizer.vocab_size, **scales}


def _tokenbridge(tokenizer: Tokenizer) -> dict[str, Any]:
    quantizer, base = tokenizer.quantizer, tokenizer.base
    order = {} if base.latent_dim == 16 else {"channel_order": list(range(base.latent_dim))}
    return {
        "num_tokens": base.num_tokens,
        "channels": base.latent_dim,
        "levels": quantizer.vocab_size,
        "value_range": [quantizer.low, quantizer.high],
        "std_range": quantizer.std_range,
        **order,
    }


# By the name that recipes give: the class, and the arguments that the tokenizer decides.
GENERATORS: dict[str, tuple[type, Callable[[Tokenizer], dict[str, Any]]]] = {
    "rar": (RAR, _ids),
    "flexar": (FlexAR, _ids),
    "flexar-class": (FlexARClass, _ids),
    "token-shuffle": (TokenShuffleAR, _token_shuffle),
    "tokenbridge": (TokenBridge, _tokenbridge),
    "xar": (XAR, _xar),
    "maskgit": (MaskGIT, _ids),
    "enat": (ENAT, _ids),
    "maskgen-vq": (MaskGenVQ, _ids),
    "maskgen-kl": (MaskGenKL, _latents),
    "himar": (HiMAR, _himar),
    "var": (VAR, _var),
    "flowar": (FlowAR, _flowar),
}


class GeneratorTask(Task):
    """A generator over cached tokens of a frozen tokenizer, from texts or classes.

    The recipe names it under ``generator`` and gives under ``model`` the arguments that neither
    tokenizer nor data decide. Masks, noise and dropped classes are drawn by the model itself,
    from a state that the batch's index seeds.
    """

    branches = True

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        if recipe["generator"] not in GENERATORS:
            raise InputError(
                f'Unknown generator "{recipe["generator"]}": choose from {", ".join(GENERATORS)}.'
            )
        kind, fit = GENERATORS[recipe["generator"]]
        self.tokenizer = AutoTokenizer.from_pretrained(recipe["tokenizer"]).to(device)
        self.tokenizer.requires_grad_(False)
        if self.tokenizer.adaptive:
            raise InputError(
                f"A {type(self.tokenizer).__name__} gives each picture a number of tokens of its own, "
                "which no generator here writes: choose another tokenizer."
            )
        try:
            options = fit(self.tokenizer)
        except AttributeError as error:
            raise InputError(
                f"{kind.__name__} cannot be trained over a {type(self.tokenizer).__name__}: choose "
                "the kind of tokenizer that its paper uses."
            ) from error
        for name in ("vocab_size", "latent_dim"):
            if name in options and options[name] is None:
                tokens = "ids" if name == "vocab_size" else "continuous tokens"
                raise InputError(
                    f"{kind.__name__} writes {tokens}, which a {type(self.tokenizer).__name__} does "
                    "not make: choose another tokenizer."
                )
        self.dataset, self.tokens = load_tokens(recipe["data"], self.tokenizer, device)
        self.weights = item_weights(self.dataset, recipe["data"]["weights"])
        if "scale_factor" in inspect.signature(kind).parameters:
            options["scale_factor"] = 1 / float(self.tokens.std())
        self.pivots = self.half_size(recipe["data"]) if kind is HiMAR else None
        if kind.condition == "text":
            self.clip = load_clip(recipe["clip"]).to(device).eval()
            self.clip.requires_grad_(False)
            self.captions = open_captions(self.dataset, **recipe["captions"])
            options |= text_options(kind, self.clip)
        else:
            names = class_names(self.dataset)
            self.classes = sorted(set(names))
            self.labels = numbered([*self.classes, *names])[len(self.classes) :]
            options["num_classes"] = len(self.classes)
        self.model: ImageGenerator = build(kind, **{**options, **recipe["model"]})
        self.model.check_tokenizer(self.tokenizer)
        self.model.init_weights()

    @torch.no_grad()
    def half_size(self, data: dict[str, Any]) -> Tensor:
        """Tokens ``[M, N / 4, latent_dim]`` of the pictures at half the size."""
        if isinstance(self.dataset, TokenShards):
            raise InputError("HiMAR also reads pictures of half the size: give data.root=PICTURES.")
        _, pictures = load_pictures(data, self.tokenizer.image_size)
        parts = (F.avg_pool2d(from_uint8(part).to(self.device), 2) for part in pictures.split(64))
        return torch.cat(
            [self.tokenizer.encode_latents(p).flatten(2).transpose(1, 2).cpu() for p in parts]
        )

    @torch.no_grad()
    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        picked = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        tokens = self.tokens[picked][rows]
        training = self.recipe["training"]
        step = index // training["gradient_accumulation"]
        batch = {next(iter(inspect.signature(self.model.forward).parameters)): tokens}
        batch |= annealed(self.model, step / training["steps"])
        if isinstance(self.model, VAR):
            batch["inputs"] = self.tokenizer.quantizer.next_inputs(tokens.to(self.device))
        if self.pivots is not None:
            batch["pivots"] = self.pivots[picked][rows]
        if self.model.condition == "class":
            return batch | {"labels": self.labels[picked][rows]}
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        captions = [self.captions.draw(int(i), rng)[0] for i in picked]
        dropped = torch.rand(size, generator=generator) < self.recipe["loss"]["condition_dropout"]
        captions = ["" if empty else text for text, empty in zip(captions, dropped, strict=True)]
        with torch.autocast(self.device.type, torch.bfloat16):
            texts = self.model.text_condition(self.clip, captions[rows], [])
        return batch | {name: texts[name] for name in texts if not name.startswith("null")}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Four seeds of each of the recipe's prompts, or of the first classes."""
        if self.model.condition == "text":
            prompts = [p for p in self.recipe["prompts"] for _ in range(SAMPLES)]
            condition = self.model.text_condition(self.clip, prompts, [""] * len(prompts))
            count = len(prompts)
        else:
            labels = torch.arange(min(8, len(self.classes)), device=self.device)
            condition = {"labels": labels.repeat_interleave(SAMPLES)}
            count = SAMPLES * len(labels)
        for drawn in self.model.stream(
            **condition,
            **self.model.tokenizer_arguments(self.tokenizer),
            **self.recipe["sampling"],
            generators=[torch.Generator().manual_seed(i % SAMPLES) for i in range(count)],
        ):
            tokens = drawn
        options = {}
        if "generator" in inspect.signature(self.tokenizer.decode).parameters:
            seeds = [torch.Generator().manual_seed(i % SAMPLES) for i in range(count)]
            options["generator"] = seeds
        save_grid(to_pil(self.tokenizer.decode(tokens, **options)), 2 * SAMPLES, path)

    def export(self, folder: Path) -> None:
        """The model; beside one of classes their names in the order of the labels."""
        self.model.save_pretrained(folder)
        if self.model.condition == "class":
            text = json.dumps(self.classes, ensure_ascii=False, indent=2)
            (folder / CLASSES).write_text(text + "\n", encoding="utf8")


def load_clip(name: str, dtype: torch.dtype = torch.float32) -> TextImageCLIP:
    """The text tower in a folder, or that of a shipped or assembled model."""
    info = find_model(name)
    folder = Path(info.folder if info is not None and info.shipped else name)
    if (folder / "model_index.json").is_file():
        folder = folder / "clip"
    return load_frozen(TextImageCLIP, {"clip": str(folder)}, "clip", dtype)


def text_options(kind: type, clip: TextImageCLIP) -> dict[str, Any]:
    """The arguments that the text tower decides."""
    if kind is TokenShuffleAR:
        return {"text_vocab_size": clip.model.vocab_size}
    if kind in (MaskGenVQ, MaskGenKL) and clip.encode_text([""]).shape[1] != clip.text_dim:
        raise InputError(
            f"{kind.__name__} needs a CLIP whose features are as wide as its embeddings, got "
            f"{clip.text_dim} and {clip.encode_text(['']).shape[1]}: choose another clip."
        )
    return {"text_dim": clip.text_dim}


def class_names(dataset: ImageTextDataset | TokenShards) -> list[str]:
    """The class of each item: a sticker's group, else a picture's sub-folder, else its first caption."""
    if isinstance(dataset, StickerPack):
        return [sticker.group for sticker in dataset.stickers]
    if isinstance(dataset, ImageTextFolder):
        folders = [file.parent.relative_to(dataset.root).as_posix() for file in dataset.files]
        if "." not in folders:
            return folders
    return [dataset.name(index) for index in range(len(dataset))]


def annealed(model: ImageGenerator, progress: float) -> dict[str, float]:
    """What changes with the share of training that is done, as published.

    RAR (section 3.2): random orders for half of training, fewer and fewer up to three quarters, then
    none. Hi-MAR: its second phase sees pivots ever more often, for 100 of 800 epochs.
    """
    if isinstance(model, RAR):
        return {"random_ratio": min(1.0, max(0.0, 4 * (0.75 - progress)))}
    if isinstance(model, HiMAR):
        return {"pivot_rate": 0.25 * min(1.0, 8 * progress)}
    return {}
