"""What can be trained: each task owns a model, makes its batches, draws samples, exports."""

from __future__ import annotations

import inspect
import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..generators.autoregressive.flexar import FlexAR
from ..generators.conditioning.clip import TextImageCLIP, train_bpe
from ..modalities.datasets import ImageTextDataset, StickerPack, open_dataset
from ..modalities.errors import InputError
from ..modalities.image import fit_image, image_grid, save_image, to_pil, to_tensor
from ..modalities.token_shards import TokenShards, is_token_folder
from ..tokenizers.base import Tokenizer
from ..tokenizers.image.flextok import FlexTok
from ..tokenizers.image.titok import TiTok
from ..weights.loading import check_complete
from .captions import open_captions
from .losses import AdversarialLoss, PatchDiscriminator, TokenizerLoss, perceptual_losses
from .warm_start import local_components

STARTS = ("random", "components")
Model = TypeVar("Model", bound=nn.Module)


class Task(ABC):
    """One kind of model in training.

    ``model(**batch)`` must return (loss, parts): a scalar, and scalars to report.

    Attributes:
        branches: whether some weights take no part in some batches.
    """

    model: nn.Module
    branches: ClassVar[bool] = False

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        self.recipe = recipe
        self.device = device

    @property
    def networks(self) -> list[nn.Module]:
        """The parts of the model whose gradients are clipped apart; the first one's norm is logged."""
        return [self.model]

    @abstractmethod
    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        """The given rows of batch ``index``; the draws from ``generator`` are for all its rows."""

    @abstractmethod
    def sample(self, path: Path) -> None:
        """Write a picture that shows what the model does now."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model in its loadable form."""


def load_pictures(settings: dict[str, Any], image_size: int) -> tuple[ImageTextDataset, Tensor]:
    """A dataset and all its pictures over white, uint8 ``[M, 3, S, S]``, kept in memory.

    Args:
        settings: ``root``, what `open_dataset` opens, and ``options`` for it.

    Raises:
        InputError: nothing there, or a picture that cannot be read.
    """
    root = settings["root"]
    if not Path(root).exists() and not root.endswith(".tar"):
        raise InputError(
            f'There are no pictures at "{root}": set data.root=FOLDER to the sticker pack or to '
            "pictures with captions of your own."
        )
    dataset = open_dataset(root, **settings["options"])
    pictures = torch.empty(len(dataset), 3, image_size, image_size, dtype=torch.uint8)
    for i in track(
        range(len(dataset)),
        "Reading pictures",
        console=Console(stderr=True),
        transient=True,
        disable=not PartialState().is_main_process,
    ):
        tensor = to_tensor(fit_image(dataset.image(i), image_size, background="white"))
        pictures[i] = ((tensor[0] + 1) * 127.5).round().to(torch.uint8)
    return dataset, pictures


def load_frozen(
    kind: type[Model], recipe: dict[str, Any], key: str, dtype: torch.dtype = torch.float32
) -> Model:
    """The model in the folder (or of the hub id) that the recipe names under ``key``."""
    folder = recipe[key]
    try:
        model = kind.from_pretrained(folder, dtype=dtype)
    except Exception as error:  # Each way of being no such model has an error class of its own.
        reason = "there is no such folder"
        if Path(folder).is_dir():
            reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f'No {kind.__name__} could be loaded from "{folder}" ({reason}): train it first, or '
            f"set {key}=FOLDER."
        ) from error
    check_complete(model, folder)
    return model


def load_tokens(
    data: dict[str, Any], tokenizer: Tokenizer, device: torch.device
) -> tuple[ImageTextDataset | TokenShards, Tensor]:
    """The recipe's data and its tokens ``[M, N]`` or ``[M, N, latent_dim]``, kept on the CPU: those
    of ``tessera tokenize``, or encoded now.

    Raises:
        InputError: nothing there, or the tokens of another tokenizer.
    """
    if is_token_folder(data["root"]):
        dataset = TokenShards(data["root"])
        for key in ("num_tokens", "vocab_size", "latent_dim"):
            found, wanted = dataset.index[key], getattr(tokenizer, key)
            if found != wanted:
                raise InputError(
                    f'The tokens in "{data["root"]}" have {key} {found}, the tokenizer '
                    f"{wanted}: tokenize the data with this tokenizer."
                )
        return dataset, torch.stack([dataset.tokens(i) for i in range(len(dataset))])
    dataset, pictures = load_pictures(data, tokenizer.image_size)
    tokens = [tokenizer.encode(from_uint8(part).to(device)).cpu() for part in pictures.split(64)]
    return dataset, torch.cat(tokens)


def build(kind: type[Model], **options: Any) -> Model:
    """A new model; an option that it does not have is an InputError."""
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise InputError(f"The recipe's model does not fit {kind.__name__}: {error}.") from error
    return kind(**options)


def from_uint8(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def shuffled_index(index: int, size: int, count: int, seed: int) -> Tensor:
    """Positions of batch ``index`` when every epoch visits all ``count`` items in a new order."""
    positions = torch.arange(index * size, (index + 1) * size)
    epochs, offsets = positions // count, positions % count
    picked = torch.empty_like(positions)
    for epoch in epochs.unique():
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + int(epoch)))
        here = epochs == epoch
        picked[here] = order[offsets[here]]
    return picked


class AutoencoderLoss(nn.Module):
    """A diffusers VAE with its training loss: L1 + MSE + a small KL term."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        l1, mse = (decoded - images).abs().mean(), (decoded - images).square().mean()
        kl = posterior.kl().mean() / images[0].numel()
        psnr = 10 * torch.log10(4 / mse.detach())
        return l1 + 2 * mse + self.kl_weight * kl, {"l1": l1.detach(), "psnr": psnr, "kl": kl}


class AutoencoderTask(Task):
    """The small VAE under the tokens."""

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        self.size = recipe["image_size"]
        _, self.pictures = load_pictures(recipe["data"], self.size)
        vae = build(AutoencoderKL, **recipe["model"]).to(memory_format=torch.channels_last)
        self.model = AutoencoderLoss(vae, recipe["loss"]["kl_weight"])

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        picked = shuffled_index(index, size, len(self.pictures), self.recipe["seed"])[rows]
        channels = self.model.vae.config.latent_channels
        side = self.size >> (len(self.model.vae.config.block_out_channels) - 1)
        noise = torch.randn(size, channels, side, side, generator=generator)[rows]
        return {"images": from_uint8(self.pictures[picked]), "noise": noise}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        images = from_uint8(spread(self.pictures, 16)).to(self.device)
        decoded = self.model.vae.decode(self.model.vae.encode(images).latent_dist.mode()).sample
        save_grid(to_pil(images) + to_pil(decoded), len(images), path)

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Save the VAE with the scaling factor that gives its latents unit variance."""
        vae = self.model.vae
        latents = torch.cat(
            [
                vae.encode(from_uint8(part).to(self.device)).latent_dist.mode()
                for part in spread(self.pictures, 512).split(64)
            ]
        )
        vae.register_to_config(scaling_factor=1 / float(latents.std()))
        vae.save_pretrained(folder)


class FlexTokTask(Task):
    """The ordered tokenizer, over cached latents of a frozen VAE (or over pixels).

    ``start: components`` writes the encoder down (see `warm_start`) and trains the decoder under it;
    ``start: random`` trains both.
    """

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        self.tokenizer = self.build().to(device)
        self.model = self.tokenizer
        _, self.pictures = load_pictures(recipe["data"], recipe["image_size"])
        self.latents = torch.cat(
            [
                self.tokenizer.encode_latents(from_uint8(part).to(device)).cpu()
                for part in self.pictures.split(64)
            ]
        )
        self.start()
        self.ids: Tensor | None = None

    def start(self) -> None:
        """Write the encoder down, where the recipe says so."""
        if self.recipe["start"] not in STARTS:
            raise InputError(
                f'Unknown start "{self.recipe["start"]}": choose from {", ".join(STARTS)}.'
            )
        if self.recipe["start"] == "components":
            local_components(self.tokenizer.cpu(), self.latents)
            self.tokenizer.to(self.device).encoder.requires_grad_(False)

    def frozen_ids(self) -> Tensor | None:
        """Tokens of all pictures ``[M, N]`` where the encoder does not change.

        Not before the first batch: a run that goes on has loaded its encoder by then.
        """
        frozen = not any(p.requires_grad for p in self.tokenizer.encoder.parameters())
        if frozen and self.ids is None:
            self.ids = encode_all(self.tokenizer, self.latents)
        return self.ids

    def build(self) -> FlexTok:
        """A new tokenizer over the frozen VAE of the recipe."""
        options = dict(self.recipe["model"])
        over_vae = self.recipe["vae"] is not None
        if over_vae:
            vae = load_frozen(AutoencoderKL, self.recipe, "vae")
            options["vae_config"] = {k: v for k, v in vae.config.items() if not k.startswith("_")}
        tokenizer = build(FlexTok, image_size=self.recipe["image_size"], **options)
        tokenizer.init_weights()
        if over_vae:
            tokenizer.vae.load_state_dict(vae.state_dict())
            tokenizer.vae.requires_grad_(False)
        return tokenizer

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        loss = self.recipe["loss"]
        picked = shuffled_index(index, size, len(self.latents), self.recipe["seed"])[rows]
        noise = torch.randn(size, *self.latents.shape[1:], generator=generator)[rows]
        # Logit-normal times; a share starts from pure noise, where all must come from the tokens.
        t = torch.sigmoid(torch.randn(size, generator=generator) + loss["time_shift"])
        pure = torch.rand(size, generator=generator) < loss["pure_noise"]
        t = t.masked_fill(pure, 1.0)[rows]
        drop = (torch.rand(size, generator=generator) < loss["condition_dropout"])[rows]
        lengths = loss["lengths"]
        choice = torch.multinomial(torch.tensor(loss["weights"]).float(), 1, generator=generator)
        ids = self.frozen_ids()
        return {
            "latents": self.latents[picked],
            "noise": noise,
            "t": t,
            "drop": drop,
            "num_tokens": lengths[int(choice)],
            "ids": None if ids is None else ids[picked],
        }

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Rows: pictures, then reconstructions from growing prefixes."""
        images = from_uint8(spread(self.pictures, 16)).to(self.device)
        tokens = self.tokenizer.encode(images)
        rows = to_pil(images)
        for count in self.recipe["loss"]["lengths"]:
            generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
            rows += to_pil(self.tokenizer.decode(tokens[:, :count], generator=generators))
        save_grid(rows, len(images), path)

    def export(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class FlexTokDecoderTask(FlexTokTask):
    """The flow decoder of a trained tokenizer, further, under a frozen encoder.

    The ids stay what they are, so a generator over them can be trained at the same time.
    """

    def build(self) -> FlexTok:
        tokenizer = load_frozen(FlexTok, self.recipe, "tokenizer")
        tokenizer.register_to_config(num_inference_steps=self.recipe["num_inference_steps"])
        tokenizer.encoder.requires_grad_(False)
        if tokenizer.vae is not None:
            tokenizer.vae.requires_grad_(False)
        return tokenizer

    def start(self) -> None:
        """Its encoder is there."""


class TiTokTask(Task):
    """Single-stage TiTok, discrete or continuous, from pictures."""

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        _, self.pictures = load_pictures(recipe["data"], recipe["image_size"])
        loss = recipe["loss"]
        options = {"image_size": recipe["image_size"], "two_stage": False, **recipe["model"]}
        self.tokenizer = build(TiTok, **options)
        self.tokenizer.init_weights()
        adversarial = None
        if loss["weights"]["gan"] > 0:
            discriminator = build(PatchDiscriminator, **recipe["discriminator"])
            adversarial = AdversarialLoss(discriminator, loss["lecam"])
        self.model = TokenizerLoss(
            self.tokenizer,
            loss["weights"],
            perceptual_losses(recipe["image_size"], device=device, **recipe["perceptual"]),
            adversarial,
            loss["gan_start"],
        )

    @property
    def networks(self) -> list[nn.Module]:
        adversarial = self.model.adversarial
        return [self.tokenizer] if adversarial is None else [self.tokenizer, adversarial]

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        picked = shuffled_index(index, size, len(self.pictures), self.recipe["seed"])
        images = jitter(from_uint8(self.pictures[picked]), generator)[rows]
        noise = None
        if self.tokenizer.latent_dim is not None:
            shape = (size, self.tokenizer.num_tokens, self.tokenizer.latent_dim)
            noise = torch.randn(shape, generator=generator)[rows]
        step = index // self.recipe["training"]["gradient_accumulation"]
        return {"images": images, "noise": noise, "step": step}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Pictures, and below them what their tokens decode to."""
        images = from_uint8(spread(self.pictures, 16)).to(self.device)
        decoded = self.tokenizer.decode(self.tokenizer.encode(images))
        save_grid(to_pil(images) + to_pil(decoded), len(images), path)

    def export(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class CLIPTask(Task):
    """The text tower that conditions, and the verifier."""

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        self.dataset, self.pictures = load_pictures(recipe["data"], recipe["image_size"])
        self.weights = item_weights(self.dataset, recipe["data"]["weights"])
        self.captions = open_captions(self.dataset, **recipe["captions"])
        self.model = build(TextImageCLIP, **recipe["model"])
        vocab_size = recipe["model"]["text_cfg"]["vocab_size"]
        self.model.bpe = train_bpe(self.captions.texts(), vocab_size)
        self.model.to(device)
        self.concepts = numbered(self.captions.concepts)
        self.styles = numbered(self.captions.styles)

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        if rows != slice(0, size):
            raise InputError(
                "The contrastive loss needs its whole batch in one process: train without torchrun."
            )
        picked = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        captions, styled = zip(*(self.captions.draw(int(i), rng) for i in picked), strict=True)
        same = self.concepts[picked][:, None] == self.concepts[picked][None]
        same_style = self.styles[picked][:, None] == self.styles[picked][None]
        images = jitter(from_uint8(self.pictures[picked]), generator)
        return {
            "images": images,
            "ids": self.model.tokenize(captions),
            "positives": same & (same_style | ~torch.tensor(styled)[None]),
        }

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """The 8 best pictures of 512 for each of 8 names."""
        some = torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(0))[:512]
        images = torch.cat(
            [
                self.model.encode_image(from_uint8(self.pictures[part]).to(self.device))
                for part in some.split(64)
            ]
        )
        names = [self.dataset.name(int(i)) for i in some[:8]]
        scores = self.model.encode_text(names) @ images.T
        count = min(8, len(some))
        best = scores.topk(count).indices.flatten().cpu()
        save_grid(to_pil(from_uint8(self.pictures[some[best]])), count, path)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


class FlexARTask(Task):
    """Text to tokens, over cached tokens of a frozen tokenizer and a frozen text tower.

    ``start: FOLDER`` goes on with a trained generator over the same tokenizer in place of a new one.
    """

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        self.tokenizer = load_frozen(FlexTok, recipe, "tokenizer").to(device).eval()
        self.clip = load_frozen(TextImageCLIP, recipe, "clip").to(device).eval()
        self.tokenizer.requires_grad_(False)
        self.clip.requires_grad_(False)
        self.dataset, self.tokens = load_tokens(recipe["data"], self.tokenizer, device)
        self.weights = item_weights(self.dataset, recipe["data"]["weights"])
        self.captions = open_captions(self.dataset, **recipe["captions"])
        if recipe["start"] is not None:
            self.model = load_frozen(FlexAR, recipe, "start")
            self.model.check_tokenizer(self.tokenizer)
            self.model.check_text_width(self.clip.text_dim)
            return
        self.model = build(
            FlexAR,
            vocab_size=self.tokenizer.vocab_size,
            num_tokens=self.tokenizer.num_tokens,
            text_dim=self.clip.text_dim,
            **recipe["model"],
        )
        self.model.init_weights()

    @torch.no_grad()
    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        loss = self.recipe["loss"]
        picked = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        captions = [self.captions.draw(int(i), rng)[0] for i in picked]
        drop = torch.rand(size, generator=generator) < loss["condition_dropout"]
        captions = ["" if empty else text for text, empty in zip(captions, drop, strict=True)]
        choice = torch.multinomial(torch.tensor(loss["weights"]).float(), 1, generator=generator)
        length = loss["lengths"][int(choice)]
        with torch.autocast(self.device.type, torch.bfloat16):
            features, mask = self.clip.text_features(captions)
        return {
            "tokens": self.tokens[picked, :length][rows],
            "text_features": features[rows].float(),
            "text_mask": mask[rows],
        }

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """The prompts of the recipe, four seeds each."""
        prompts = [p for p in self.recipe["prompts"] for _ in range(4)]
        features, mask = self.clip.text_features(prompts)
        null_features, null_mask = self.clip.text_features([""])
        length = features.shape[1]
        pad = length - null_features.shape[1]
        ids = self.model.generate(
            features,
            mask,
            [torch.Generator().manual_seed(i % 4) for i in range(len(prompts))],
            num_tokens=min(self.recipe["loss"]["lengths"][0], self.tokenizer.num_tokens),
            null_features=F.pad(null_features, (0, 0, 0, pad)),
            null_mask=F.pad(null_mask, (0, pad)),
            top_k=self.recipe["loss"]["sample_top_k"],
        )
        generators = [torch.Generator().manual_seed(i % 4) for i in range(len(prompts))]
        save_grid(to_pil(self.tokenizer.decode(ids, generator=generators)), 8, path)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


@torch.no_grad()
def encode_all(tokenizer: FlexTok, latents: Tensor) -> Tensor:
    """Latents ``[M, C, h, w]`` -> ids ``[M, N]``, kept on the CPU."""
    parts = latents.split(64)
    return torch.cat([tokenizer.encode_from_latents(p.to(tokenizer.device)).cpu() for p in parts])


def item_weights(dataset: ImageTextDataset, groups: dict[str, float]) -> Tensor:
    """Sampling weight of each picture: that of its sticker group; 1 where it has none."""
    if not isinstance(dataset, StickerPack):
        return torch.ones(len(dataset))
    return torch.tensor([groups.get(sticker.group, 1.0) for sticker in dataset.stickers])


def numbered(labels: list[str]) -> Tensor:
    """Equal labels -> equal numbers, int64 ``[M]``."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([numbers[label] for label in labels])


def spread(items: Tensor, count: int) -> Tensor:
    """At most ``count`` items at even distances."""
    return items[:: max(1, len(items) // count)][:count]


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each picture by up to 1/16 of its side over white, and mirror none (text, arrows)."""
    size = images.shape[-1]
    reach = size // 16
    padded = F.pad(images, (reach,) * 4, value=1.0)
    shifts = torch.randint(0, 2 * reach + 1, (len(images), 2), generator=generator)
    return torch.stack(
        [padded[i, :, y : y + size, x : x + size] for i, (y, x) in enumerate(shifts.tolist())]
    )


def save_grid(pictures: list[Image.Image], columns: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(image_grid(pictures, columns), path)
