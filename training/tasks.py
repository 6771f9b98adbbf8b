"""What can be trained: each task owns a model, makes its batches, draws samples, exports."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..modalities.datasets import StickerPack
from ..modalities.image import fit_image, image_grid, to_pil, to_tensor
from ..tokenizers.image.flextok import FlexTok


class Task(ABC):
    """One kind of model in training.

    ``model(**batch)`` must return (loss, parts). ``batch`` draws for the whole batch from the
    given generator and returns the given rows of it.
    """

    model: nn.Module

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        self.recipe = recipe
        self.device = device

    @abstractmethod
    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]: ...

    @abstractmethod
    def sample(self, path: Path) -> None:
        """Write a picture that shows what the model does now."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model in its loadable form."""


def load_pictures(settings: dict[str, Any], image_size: int) -> tuple[StickerPack, Tensor]:
    """A dataset and its pictures over white, uint8 ``[M, 3, S, S]``."""
    dataset = StickerPack(settings["root"], **settings.get("options", {}))
    pictures = torch.empty(len(dataset), 3, image_size, image_size, dtype=torch.uint8)
    for i in range(len(dataset)):
        tensor = to_tensor(fit_image(dataset.image(i), image_size, background="white"))
        pictures[i] = ((tensor[0] + 1) * 127.5).round().to(torch.uint8)
    return dataset, pictures


def from_uint8(pictures: Tensor) -> Tensor:
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
        vae = AutoencoderKL(**recipe["model"]).to(memory_format=torch.channels_last)
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
        images = from_uint8(self.pictures[:: len(self.pictures) // 16][:16]).to(self.device)
        decoded = self.model.vae.decode(self.model.vae.encode(images).latent_dist.mode()).sample
        save_grid(to_pil(images) + to_pil(decoded), 16, path)

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Save the VAE with the scaling factor that gives its latents unit variance."""
        vae = self.model.vae
        some = self.pictures[torch.randperm(len(self.pictures))[:512]]
        latents = torch.cat(
            [
                vae.encode(from_uint8(part).to(self.device)).latent_dist.mode()
                for part in some.split(64)
            ]
        )
        vae.register_to_config(scaling_factor=1 / float(latents.std()))
        vae.save_pretrained(folder)


class FlexTokTask(Task):
    """The ordered tokenizer, over cached latents of a frozen VAE (or over pixels)."""

    def __init__(self, recipe: dict[str, Any], device: torch.device):
        super().__init__(recipe, device)
        options = dict(recipe["model"])
        folder = recipe["vae"]
        if folder is not None:
            vae = AutoencoderKL.from_pretrained(folder)
            options["vae_config"] = {
                k: v for k, v in vae.config.items() if not k.startswith("_")
            }
        self.tokenizer = FlexTok(image_size=recipe["image_size"], **options).to(device)
        self.tokenizer.init_weights()
        if folder is not None:
            self.tokenizer.vae.load_state_dict(vae.state_dict())
            self.tokenizer.vae.requires_grad_(False)
        self.model = self.tokenizer
        _, self.pictures = load_pictures(recipe["data"], recipe["image_size"])
        self.latents = torch.cat(
            [
                self.tokenizer.encode_latents(from_uint8(part).to(device)).cpu()
                for part in self.pictures.split(64)
            ]
        )

    def batch(
        self, index: int, size: int, generator: torch.Generator, rows: slice
    ) -> dict[str, Any]:
        loss = self.recipe["loss"]
        picked = shuffled_index(index, size, len(self.latents), self.recipe["seed"])[rows]
        noise = torch.randn(size, *self.latents.shape[1:], generator=generator)[rows]
        # Logit-normal times, moved towards noise, where the tokens matter most.
        t = torch.sigmoid(torch.randn(size, generator=generator) + loss["time_shift"])[rows]
        drop = (torch.rand(size, generator=generator) < loss["condition_dropout"])[rows]
        lengths = loss["lengths"]
        choice = torch.multinomial(torch.tensor(loss["weights"]), 1, generator=generator)
        return {
            "latents": self.latents[picked],
            "noise": noise,
            "t": t,
            "drop": drop,
            "num_tokens": lengths[int(choice)],
        }

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Rows: pictures, then reconstructions from growing prefixes."""
        images = from_uint8(self.pictures[:: len(self.pictures) // 16][:16]).to(self.device)
        tokens = self.tokenizer.encode(images)
        rows = to_pil(images)
        for count in self.recipe["loss"]["lengths"]:
            generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
            rows += to_pil(self.tokenizer.decode(tokens[:, :count], generator=generators))
        save_grid(rows, 16, path)

    def export(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def save_grid(pictures: list[Any], columns: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(pictures, columns).save(path)


TASKS: dict[str, type[Task]] = {"autoencoder": AutoencoderTask, "flextok": FlexTokTask}
