"""Log-mel spectra as continuous tokens: no weights, and a simple way back.

Frames are those of Vocos and BigVGAN at 24 kHz (100 bands, hop 256), whose networks turn them into sound
far better; here the bands are spread by least squares and the phase is found by the Griffin-Lim
algorithm (IEEE ASSP 32(2), 1984; with momentum, arXiv 1306.3094).
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torchaudio.functional import griffinlim, melscale_fbanks

from ...modalities.audio import log_mel
from ...modalities.errors import InputError
from ..base import AudioTokenizer


class LogMel(ModelMixin, ConfigMixin, AudioTokenizer):
    """Sound ``[B, 1, L]`` <-> natural logarithms of mel amplitudes ``[B, T, n_mels]``.

    Args:
        sample_rate: in Hz.
        n_mels: bands from 0 to half the rate.
        n_fft, hop: samples of a window and between frames.
        floor: least amplitude.
        iterations: of Griffin-Lim.
    """

    vocab_size = None

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 24000,
        n_mels: int = 100,
        n_fft: int = 1024,
        hop: int = 256,
        floor: float = 1e-4,
        iterations: int = 60,
    ):
        super().__init__()
        with warnings.catch_warnings(
            action="ignore"
        ):  # Narrow bands between two bins are no fault.
            bands = melscale_fbanks(n_fft // 2 + 1, 0.0, sample_rate / 2, n_mels, sample_rate)
        # Saved, although it could be computed again: a model's folder must hold weights.
        self.register_buffer("inverse", torch.linalg.pinv(bands))
        self.sample_rate, self.hop, self.latent_dim = sample_rate, hop, n_mels

    def encode(self, audio: Tensor) -> Tensor:
        """Float ``[B, 1, L]`` in [-1, 1] -> ``[B, T, n_mels]``, a frame centred at every hop.

        Raises:
            InputError: not such sound.
        """
        self.check_audio(audio)
        c, frames = self.config, self.num_frames(audio.shape[-1])
        # The window reaches half its width over both ends.
        audio = F.pad(audio, (0, max(frames * c.hop, c.n_fft) - audio.shape[-1]))
        mel = log_mel(
            audio[:, 0],
            c.sample_rate,
            c.floor,
            n_fft=c.n_fft,
            hop_length=c.hop,
            n_mels=c.n_mels,
        )
        return mel[..., :frames].mT

    def decode(self, tokens: Tensor) -> Tensor:
        """``[B, T, n_mels]`` -> float ``[B, 1, T * hop]``; the phase starts from 0, so it is always the
        same.

        Raises:
            InputError: not such frames.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.latent_dim or not tokens.shape[1]:
            raise InputError(
                f"This tokenizer decodes frames [batch, 1 or more, {self.latent_dim}], got "
                f"{list(tokens.shape)}."
            )
        c = self.config
        mel = tokens.mT.exp()
        # One frame more for the end of the last hop, and no less than a window.
        mel = F.pad(mel, (0, max(1, c.n_fft // c.hop + 1 - mel.shape[-1])), mode="replicate")
        amplitudes = (mel.mT @ self.inverse).clamp(min=0).mT
        sound = griffinlim(
            amplitudes,
            window=torch.hann_window(c.n_fft, device=mel.device),
            n_fft=c.n_fft,
            hop_length=c.hop,
            win_length=c.n_fft,
            power=1.0,
            n_iter=c.iterations,
            momentum=0.99,
            length=None,
            rand_init=False,
        )
        return sound[:, None, : tokens.shape[1] * c.hop]
