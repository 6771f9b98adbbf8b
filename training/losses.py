"""Losses of picture tokenizers: perceptual, adversarial, and their sum for TiTok and TA-TiTok."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..evaluation.metrics import LPIPS_MIN_SIZE, load_lpips
from ..modalities.errors import InputError
from ..tokenizers.image.titok import TiTokBase
from ..weights.loading import load_strict, read_state_dict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ConvNeXtLoss(nn.Module):
    """Mean squared difference of a ConvNeXt-S's ImageNet logits at 224 pixels (arXiv 2501.07730).

    Args:
        backbone: torchvision's state dict (``convnext_small-0c510722.pth``).

    Raises:
        InputError: the file is missing or holds something else.
    """

    def __init__(self, backbone: str | Path):
        super().__init__()
        from torchvision.models import convnext_small

        self.network = convnext_small(weights=None)
        load_strict(self.network, read_state_dict(backbone))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    def logits(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [-1, 1] -> ``[B, 1000]``."""
        images = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
        return self.network(((images + 1) / 2 - self.mean) / self.std)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Two ``[B, 3, H, W]`` in [-1, 1] -> a scalar."""
        return F.mse_loss(self.logits(images), self.logits(references))


def perceptual_losses(
    image_size: int, lpips: str | Path | None, convnext: str | Path | None, device: torch.device
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The frozen networks whose weight files are given: names -> functions of two batches.

    Functions, not modules: a model that keeps them does not save them with its own weights.

    Args:
        lpips: torchvision's AlexNet, see `load_lpips`.
        convnext: torchvision's ConvNeXt-S.

    Raises:
        InputError: a file is missing or holds something else, or pictures too small for LPIPS.
    """
    networks: dict[str, nn.Module] = {}
    if lpips is not None:
        if image_size < LPIPS_MIN_SIZE:
            raise InputError(
                f"LPIPS needs pictures of at least {LPIPS_MIN_SIZE} pixels, got {image_size}."
            )
        networks["lpips"] = load_lpips(lpips)
    if convnext is not None:
        networks["convnext"] = ConvNeXtLoss(convnext)
    return {
        name: network.to(device).eval().requires_grad_(False).forward
        for name, network in networks.items()
    }


class BlurPool(nn.Module):
    """Halve the side under a fixed 1-3-3-1 blur (Zhang, "Making Convolutional Networks
    Shift-Invariant Again", arXiv 1904.11486)."""

    def __init__(self, channels: int):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = (taps[:, None] * taps).expand(channels, 1, 4, 4)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.to(x.dtype), stride=2, padding=1, groups=x.shape[1])


class PatchDiscriminator(nn.Module):
    """Real or reconstructed, a logit for each cell of a grid.

    Args:
        channels: of the first level; each further level doubles them.
        levels: each halves the side.
        grid: side of the grid of logits.
    """

    def __init__(self, channels: int = 128, levels: int = 3, grid: int = 16):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1)]
        width = channels
        for level in range(levels):
            layers += [
                nn.Conv2d(width, channels << level, 3, padding=1),
                BlurPool(channels << level),
                nn.GroupNorm(32, channels << level),
                nn.LeakyReLU(0.1),
            ]
            width = channels << level
        layers += [nn.AdaptiveMaxPool2d(grid), nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1)]
        layers += [nn.Conv2d(width, 1, 5, padding=2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [-1, 1] -> logits float32 ``[B, 1, grid, grid]``."""
        return self.layers(images).float()


class AdversarialLoss(nn.Module):
    """Hinge GAN with LeCam regularisation (Tseng et al., arXiv 2104.03310), for one joint backward.

    The generator's loss passes through a discriminator that counts as constant, the discriminator's
    loss takes the reconstructions as constant. So the gradient of their sum is, for each of the two,
    that of its own loss, and one optimizer steps both.

    Args:
        lecam: weight of the regularisation.
        decay: of the running means of the logits that it uses.
    """

    def __init__(
        self, discriminator: PatchDiscriminator, lecam: float = 0.001, decay: float = 0.999
    ):
        super().__init__()
        self.discriminator = discriminator
        self.lecam = lecam
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Pictures and their reconstructions ``[B, 3, H, W]`` in [-1, 1].

        Returns:
            the generator's loss (weight 1), the discriminator's loss, values to report.
        """
        constant = {n: p.detach() for n, p in self.discriminator.named_parameters()}
        generator = -functional_call(self.discriminator, constant, (fake,)).mean()
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake.detach()])).chunk(2)
        hinge = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        lecam = F.relu(real_logits - self.fake_mean).square().mean()
        lecam = lecam + F.relu(self.real_mean - fake_logits).square().mean()
        if self.training:
            for mean, logits in ((self.real_mean, real_logits), (self.fake_mean, fake_logits)):
                mean.lerp_(_mean_of_processes(logits.detach().mean()), 1 - self.decay)
        parts = {"gan": generator.detach(), "hinge": hinge.detach(), "lecam": lecam.detach()}
        return generator, 0.5 * hinge + self.lecam * lecam, parts


def _mean_of_processes(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


class TokenizerLoss(nn.Module):
    """A TiTok (or TA-TiTok) with its single-stage training loss.

    Squared error of pictures in [0, 1], plus the weighted loss of the quantizer (or KL divergence),
    perceptual losses and, from a step on, the adversarial loss.

    Args:
        weights: of "regularizer", "gan" and each perceptual loss.
        perceptual: of `perceptual_losses`.
        adversarial: None trains without a discriminator.
        gan_start: step at which discriminator and adversarial loss set in.
    """

    def __init__(
        self,
        tokenizer: TiTokBase,
        weights: dict[str, float],
        perceptual: dict[str, Callable[[Tensor, Tensor], Tensor]],
        adversarial: AdversarialLoss | None,
        gan_start: int,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.weights = weights
        self.perceptual = perceptual
        self.adversarial = adversarial
        self.gan_start = gan_start

    def forward(
        self, images: Tensor, step: int, **inputs: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures ``[B, 3, S, S]`` in [-1, 1] and the tokenizer's further inputs -> loss, values."""
        decoded, regularizer, parts = self.tokenizer(images, **inputs)
        decoded = decoded.float()
        l2 = F.mse_loss(decoded, images) / 4
        parts |= {"l2": l2.detach(), "psnr": -10 * l2.detach().log10()}
        loss = l2 + self.weights["regularizer"] * regularizer
        return self.add_image_losses(loss, parts, decoded, images, step)

    def add_image_losses(
        self, loss: Tensor, parts: dict[str, Tensor], decoded: Tensor, images: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss and values with those of the perceptual and adversarial networks on pictures."""
        for name, function in self.perceptual.items():
            value = function(decoded, images).mean()
            loss = loss + self.weights[name] * value
            parts[name] = value.detach()
        if self.adversarial is None:
            return loss, parts
        if step < self.gan_start:
            # Zero gradients, since two processes wait for those of every weight.
            idle = sum(p.sum() for p in self.adversarial.parameters())
            return loss + 0 * idle, parts
        generator, discriminator, values = self.adversarial(images, decoded)
        return loss + self.weights["gan"] * generator + discriminator, parts | values
