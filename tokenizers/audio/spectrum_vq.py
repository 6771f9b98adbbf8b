"""SpectrumVQ: a sound's magnitudes as tokens, its phases by Griffin-Lim.

This project's own. Codecs such as WavTokenizer keep the phase in their tokens, so that those of a steady
tone change from frame to frame, and their decoders have to learn phases, which takes discriminators and
GPU-days. Magnitudes tell a sound neither from its mirror image nor from itself a moment later: tokens
of a steady tone stay the same and are easy to predict, and a decoder learns in minutes on a CPU. The
price is a little reverberation, and no sharp attack.

The quantizer is SoundStream's, the layers on both sides are Vocos' (arXiv 2306.00814). Phases: Griffin and
Lim, IEEE ASSP 32(2), 1984; with momentum, arXiv 1306.3094.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torchaudio.functional import griffinlim

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import AudioTokenizer
from ..quantizers.rvq import ResidualVQ
from ..quantizers.vq import codebook_use
from .wavtokenizer import ConvNeXtBlock

FLOOR = 1e-4  # Least amplitude, of full scale.
UNIT = 4.0  # Natural logarithms of a unit of a spectrum.
TOP = 3.0  # Most that a spectrum may hold: 24 dB above full scale.
LOUDNESS = 0.3  # A power of the amplitude, about what is heard.
LOUD = 8.0  # Weight of loudness in the loss beside that of the logarithm.


class SpectrumBackbone(nn.Module):
    """``[B, T, channels]`` -> ``[B, T, dim]``: Vocos' blocks, seven frames at a time after three."""

    def __init__(self, channels: int, dim: int, intermediate_dim: int, num_layers: int):
        super().__init__()
        self.embed = nn.Conv1d(channels, dim, 3, padding=1)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.blocks = nn.Sequential(
            *[ConvNeXtBlock(dim, intermediate_dim, 1 / num_layers) for _ in range(num_layers)]
        )
        self.final_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x.mT).mT)
        return self.final_norm(self.blocks(x.mT).mT)


class SpectrumVQ(ModelMixin, ConfigMixin, AudioTokenizer):
    """Sound <-> a token of each codebook every ``hop`` samples.

    Args:
        sample_rate: in Hz.
        hop, n_fft: samples between frames and of a window, a multiple of twice the hop. Long windows
            tell pitches apart, short ones times.
        latent_dim, vocab_size, num_codebooks: width and number of codes in each of the codebooks.
        dim, intermediate_dim: width and MLP width of both sides.
        encoder_layers, decoder_layers: blocks.
        codebook: further options of `EMACodebook`, for training.
        iterations: of Griffin-Lim.

    Raises:
        InputError: a window that is no multiple of twice the hop.
    """

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 16000,
        hop: int = 512,
        n_fft: int = 2048,
        latent_dim: int = 64,
        vocab_size: int = 1024,
        num_codebooks: int = 4,
        dim: int = 192,
        intermediate_dim: int = 576,
        encoder_layers: int = 4,
        decoder_layers: int = 6,
        codebook: dict[str, float] | None = None,
        iterations: int = 32,
    ):
        super().__init__()
        if n_fft % (2 * hop):
            raise InputError(f"n_fft must be a multiple of 2 * hop = {2 * hop}, got {n_fft}.")
        self.sample_rate, self.hop = sample_rate, hop
        self.vocab_size, self.num_codebooks = vocab_size, num_codebooks
        bins = n_fft // 2 + 1
        self.encoder = SpectrumBackbone(bins, dim, intermediate_dim, encoder_layers)
        self.to_latents = Linear(dim, latent_dim)
        self.quantizer = ResidualVQ(num_codebooks, vocab_size, latent_dim, **(codebook or {}))
        self.decoder = SpectrumBackbone(latent_dim, dim, intermediate_dim, decoder_layers)
        self.to_spectrum = Linear(dim, bins)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        # As wide as the ear's: Hz to mel.
        weight = 1 / (1 + torch.linspace(0, sample_rate / 2, bins) / 700)
        self.register_buffer("weight", weight / weight.mean(), persistent=False)

    def init_weights(self) -> None:
        """Vocos' start."""
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def spectrum(self, audio: Tensor) -> Tensor:
        """``[B, 1, L]`` -> log amplitudes float32 ``[B, ceil(L / hop), bins]``, 0 (silent) to 2.3.

        Frame t is that of the samples around the middle of hop t.
        """
        n_fft, frames = self.config.n_fft, self.num_frames(audio.shape[-1])
        before = (n_fft - self.hop) // 2
        after = (frames - 1) * self.hop + n_fft - before - audio.shape[-1]
        audio = F.pad(audio[:, 0].float(), (before, after))
        window = self.window.float()
        found = torch.stft(audio, n_fft, self.hop, window=window, center=False, return_complex=True)
        amplitudes = 2 * found.abs() / window.sum()
        return (amplitudes / FLOOR).clamp(min=1).log().mT / UNIT

    def sound(self, spectrum: Tensor) -> Tensor:
        """`spectrum` -> ``[B, 1, T * hop]``; the phase starts from 0, so it is always the same."""
        n_fft, window = self.config.n_fft, self.window.float()
        # What was raised to the floor was silent.
        amplitudes = (UNIT * spectrum.float().clamp(0, TOP)).expm1().mT
        amplitudes = amplitudes * FLOOR * window.sum() / 2
        # Frames are centred half a hop later here than there, where the first is at the first sample;
        # and no sound may be shorter than a window.
        frames = torch.cat([amplitudes[..., :1], amplitudes, amplitudes[..., -1:]], dim=-1)
        frames = F.pad(frames, (0, max(0, n_fft // self.hop - frames.shape[-1])))
        audio = griffinlim(
            frames,
            window,
            n_fft,
            self.hop,
            n_fft,
            power=1.0,
            n_iter=self.config.iterations,
            momentum=0.99,
            length=(frames.shape[-1] - 1) * self.hop,
            rand_init=False,
        )
        return audio[:, None, self.hop // 2 :][..., : spectrum.shape[1] * self.hop]

    def encode_latents(self, audio: Tensor) -> Tensor:
        """``[B, 1, L]`` -> latents ``[B, T, latent_dim]`` before quantization."""
        return self.to_latents(self.encoder(self.spectrum(audio).to(self.dtype)))

    def decode_spectrum(self, codes: Tensor) -> Tensor:
        """Codes ``[B, T, latent_dim]`` -> `spectrum`."""
        return self.to_spectrum(self.decoder(codes.to(self.dtype))).float()

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Sound ``[B, 1, L]`` in [-1, 1] -> tokens int64 ``[B, Q, ceil(L / hop)]``.

        Raises:
            InputError: another shape, no samples, or values that are not finite.
        """
        self.check_audio(audio)
        return self.quantizer.nearest(self.encode_latents(audio))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, Q, T]`` -> sound ``[B, 1, T * hop]``, about [-1, 1], not clamped.

        Raises:
            InputError: another shape, or ids outside the codebook.
        """
        self.check_tokens(tokens)
        return self.sound(self.decode_spectrum(self.quantizer.ids_to_codes(tokens)))

    def forward(
        self, audio: Tensor, quantize: bool = True, commitment: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of amplitudes, of their logarithms and as loud as they are heard, plus the
        commitment loss.

        Args:
            audio: ``[B, 1, L]``.
            quantize: without it the latents go to the decoder as they are.
            commitment: weight.

        Returns:
            the loss, and values to report: "distance" in natural logarithms of amplitudes, use of the
            first codebook.
        """
        wanted, latents = self.spectrum(audio), self.encode_latents(audio)
        parts: dict[str, Tensor] = {}
        loss = wanted.new_zeros(())
        if quantize:
            latents, ids, loss = self.quantizer(latents)
            parts = {"commitment": loss.detach(), **codebook_use(ids[:, 0], self.vocab_size)}
        made = self.decode_spectrum(latents)
        distance = ((made - wanted).abs() * self.weight).mean()
        # The logarithm counts what is hardly heard as much as the few bins of a tone.
        loudness = ((loudness_of(made) - loudness_of(wanted)).abs() * self.weight).mean()
        parts |= {"distance": UNIT * distance.detach(), "loudness": loudness.detach()}
        return distance + LOUD * loudness + commitment * loss, parts


def loudness_of(spectrum: Tensor) -> Tensor:
    """`SpectrumVQ.spectrum` -> a power of the amplitudes, 1 at full scale."""
    return FLOOR**LOUDNESS * (UNIT * LOUDNESS * spectrum.clamp(0, TOP)).exp()
