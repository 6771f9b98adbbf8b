"""Losses of audio codecs: log-mel distance and GANs on waveforms and spectra.

Sources: multi-period discriminator: "HiFi-GAN" (Kong et al., 2020), arXiv 2010.05646, section 2.3;
multi-resolution discriminator, hinge loss and weights: "Vocos" (Siuzdak, 2023), arXiv 2306.00814,
section 3.4; "WavTokenizer" (Ji et al., 2024), arXiv 2408.16532, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from ..modalities.audio import log_mel
from ..tokenizers.audio.wavtokenizer import WavTokenizer


class PeriodDiscriminator(nn.Module):
    """2D convolutions over the samples folded into rows of one period."""

    def __init__(self, period: int, channels: int):
        super().__init__()
        self.period = period
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels]
        self.convs = nn.ModuleList(
            weight_norm(
                nn.Conv2d(widths[i], widths[i + 1], (5, 1), (3 if i < 4 else 1, 1), padding=(2, 0))
            )
            for i in range(5)
        )
        self.conv_out = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, audio: Tensor) -> list[Tensor]:
        """``[B, 1, L]`` -> what each layer gives; the last one is the score."""
        audio = F.pad(audio, (0, -audio.shape[-1] % self.period), "reflect")
        x, features = audio.unflatten(-1, (-1, self.period)), []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return [*features, self.conv_out(x)]


class ResolutionDiscriminator(nn.Module):
    """2D convolutions over the magnitudes of a short-time Fourier transform (rectangular window)."""

    def __init__(self, n_fft: int, channels: int):
        super().__init__()
        self.n_fft = n_fft
        shapes = [
            ((7, 5), (2, 2)),
            ((5, 3), (2, 1)),
            ((5, 3), (2, 2)),
            ((3, 3), (2, 1)),
            ((3, 3), (2, 2)),
        ]
        self.convs = nn.ModuleList(
            weight_norm(
                nn.Conv2d(1 if i == 0 else channels, channels, kernel, stride, _half(kernel))
            )
            for i, (kernel, stride) in enumerate(shapes)
        )
        self.conv_out = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, audio: Tensor) -> list[Tensor]:
        """``[B, 1, L]`` -> what each layer gives; the last one is the score."""
        spectrum = torch.stft(
            audio[:, 0],
            self.n_fft,
            self.n_fft // 4,
            window=torch.ones(self.n_fft, device=audio.device),
            return_complex=True,
        )
        magnitude = (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-14).sqrt()
        x, features = magnitude[:, None], []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return [*features, self.conv_out(x)]


def _half(kernel: tuple[int, int]) -> tuple[int, int]:
    return kernel[0] // 2, kernel[1] // 2


class AudioDiscriminators(nn.Module):
    """Several discriminators side by side.

    Args:
        periods: of the period discriminators.
        period_channels: of their first layer, 32 in the papers.
        resolutions: window lengths of the resolution discriminators.
        resolution_channels: 64 in the papers.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        period_channels: int = 32,
        resolutions: Sequence[int] = (1024, 2048, 512),
        resolution_channels: int = 64,
    ):
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(p, period_channels) for p in periods)
        self.resolutions = nn.ModuleList(
            ResolutionDiscriminator(n, resolution_channels) for n in resolutions
        )

    def forward(self, audio: Tensor) -> list[list[Tensor]]:
        """``[B, 1, L]`` -> for each discriminator what its layers give."""
        return [d(audio) for d in (*self.periods, *self.resolutions)]


class AudioAdversarialLoss(nn.Module):
    """Hinge GAN with feature matching, for one joint backward.

    The generator's loss passes through discriminators that count as constant, theirs takes the
    reconstruction as constant: the gradient of the sum is for each side that of its own loss.
    """

    def __init__(self, discriminators: AudioDiscriminators):
        super().__init__()
        self.discriminators = discriminators

    def forward(
        self, real: Tensor, fake: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Sounds and their reconstructions ``[B, 1, L]``.

        Returns:
            the generator's loss, the feature matching loss, the discriminators' loss, and values to
            report.
        """
        constant = {n: p.detach() for n, p in self.discriminators.named_parameters()}
        judged = functional_call(self.discriminators, constant, (fake,))
        both = self.discriminators(torch.cat([real, fake.detach()]))
        count = len(judged)
        generator = sum(F.relu(1 - layers[-1]).mean() for layers in judged) / count
        matching = sum(
            F.l1_loss(mine, theirs.detach().chunk(2)[0])
            for layers, other in zip(judged, both, strict=True)
            for mine, theirs in zip(layers[:-1], other[:-1], strict=True)
        )
        hinge = 0.0
        for layers in both:
            true, false = layers[-1].chunk(2)
            hinge = hinge + (F.relu(1 - true).mean() + F.relu(1 + false).mean()) / count
        parts = {"gan": generator.detach(), "hinge": hinge.detach()}
        return generator, matching / count, hinge, parts


class CodecLoss(nn.Module):
    """A codec with its training loss.

    L1 between log-mel spectra of several resolutions, the commitment loss, and, from a step on, the
    adversarial and feature matching losses.

    Args:
        windows: lengths of the mel windows; the hop is a quarter.
        n_mels: bands at the longest window, fewer in proportion at shorter ones.
        weights: of "mel", "commitment", "gan", "matching".
        adversarial: None trains without discriminators.
        gan_start: step at which they set in.
        quantize_start: step from which the latents are quantized; before it the codec learns as a
            plain autoencoder, so that k-means meets latents that mean something.
    """

    def __init__(
        self,
        codec: WavTokenizer,
        windows: Sequence[int],
        n_mels: int,
        weights: dict[str, float],
        adversarial: AudioAdversarialLoss | None,
        gan_start: int,
        quantize_start: int,
    ):
        super().__init__()
        self.codec = codec
        self.windows = windows
        self.n_mels = n_mels
        self.weights = weights
        self.adversarial = adversarial
        self.gan_start = gan_start
        self.quantize_start = quantize_start

    def mel_distance(self, fake: Tensor, real: Tensor) -> Tensor:
        total = 0.0
        for n_fft in self.windows:
            n_mels = max(5, self.n_mels * n_fft // max(self.windows))
            options = {"n_fft": n_fft, "hop_length": n_fft // 4, "n_mels": n_mels}
            total = total + F.l1_loss(
                *(log_mel(x, self.codec.sample_rate, **options) for x in (fake, real))
            )
        return total / len(self.windows)

    def forward(self, audio: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Sounds ``[B, 1, L]`` -> loss and values to report."""
        fake, commitment, parts = self.codec(audio, quantize=step >= self.quantize_start)
        fake = fake.float()
        mel = self.mel_distance(fake, audio)
        loss = self.weights["mel"] * mel + self.weights["commitment"] * commitment
        parts |= {"mel": mel.detach()}
        if self.adversarial is None:
            return loss, parts
        if step < self.gan_start:
            # Zero gradients, since two processes wait for those of every weight.
            return loss + 0 * sum(p.sum() for p in self.adversarial.parameters()), parts
        generator, matching, discriminator, values = self.adversarial(audio, fake)
        loss = loss + self.weights["gan"] * generator + self.weights["matching"] * matching
        return loss + discriminator, parts | values
