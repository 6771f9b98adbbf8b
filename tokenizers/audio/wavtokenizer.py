"""WavTokenizer: an Efficient Acoustic Discrete Codec Tokenizer for Audio Language Modeling (2024).

Paper: Ji et al., arXiv 2408.16532. Its encoder is EnCodec's (Défossez et al., arXiv 2210.13438), its
decoder Vocos (Siuzdak, arXiv 2306.00814) with a residual and attention stack in front. Code: MIT;
weights: MIT by the hub cards (WavTokenizer_{small,medium,large}_{600,320}_24k_4096).

One codebook of 4096 codes, 40 or 75 tokens a second of 24 kHz mono sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.audio import log_mel
from ...modalities.errors import InputError
from ..base import AudioTokenizer
from ..quantizers.ema import EMACodebook
from ..quantizers.vq import codebook_use


class SEANetConv(nn.Conv1d):
    """A convolution under reflected padding, by which L samples become ceil(L / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        length, (kernel,), (stride,), (dilation,) = (
            x.shape[-1],
            self.kernel_size,
            self.stride,
            self.dilation,
        )
        total = (kernel - 1) * dilation + 1 - stride
        right = total // 2
        left = total - right
        right += -length % stride  # so that the last window is full
        return super().forward(reflect_pad(x, left, right))


def reflect_pad(x: Tensor, left: int, right: int) -> Tensor:
    """Mirror ``[..., L]`` at both ends; a signal that is too short gets zeros behind it first."""
    zeros = max(0, max(left, right) - x.shape[-1] + 1)
    if not zeros:
        return F.pad(x, (left, right), "reflect")
    return F.pad(F.pad(x, (0, zeros)), (left, right), "reflect")[..., :-zeros]


class SEANetBlock(nn.Module):
    """Residual block at width c; its shortcut is a convolution too."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = SEANetConv(channels, channels // 2, 3)
        self.conv2 = SEANetConv(channels // 2, channels, 1)
        self.shortcut = SEANetConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(F.elu(self.conv1(F.elu(x))))


class SEANetEncoder(nn.Module):
    """Samples ``[B, 1, L]`` -> latents ``[B, latent_dim, ceil(L / hop)]``.

    Args:
        filters: channels after the first convolution; every stride doubles them.
        strides: in the order in which they are applied.
        lstm_layers: of the LSTM at the end, which looks backwards only.
    """

    def __init__(self, filters: int, strides: Sequence[int], latent_dim: int, lstm_layers: int):
        super().__init__()
        self.conv_in = SEANetConv(1, filters, 7)
        self.blocks, self.downs = nn.ModuleList(), nn.ModuleList()
        for stride in strides:
            self.blocks.append(SEANetBlock(filters))
            self.downs.append(SEANetConv(filters, 2 * filters, 2 * stride, stride))
            filters *= 2
        self.lstm = nn.LSTM(filters, filters, lstm_layers, batch_first=True)
        self.conv_out = SEANetConv(filters, latent_dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block, down in zip(self.blocks, self.downs, strict=True):
            x = down(F.elu(block(x)))
        x = x + self.lstm(x.mT)[0].mT
        return self.conv_out(F.elu(x))


class ResBlock(nn.Module):
    """Two convolutions ``[B, C, T]``, each after a group norm over channels and all times."""

    def __init__(self, dim: int, dropout: float = 0.1):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, dim, eps=1e-6)
        self.conv1 = nn.Conv1d(dim, dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv1d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.silu(self.norm2(h))))


class AttentionBlock(nn.Module):
    """One head over all times, without positions or a mask."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x).mT)[:, None].chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0]).mT


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, then an MLP at each time: ``[B, C, T]`` (Vocos, section 3.1)."""

    def __init__(self, dim: int, intermediate_dim: int, layer_scale: float):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = Linear(dim, intermediate_dim)
        self.fc2 = Linear(intermediate_dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim))
        nn.init.constant_(self.gamma, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc2(F.gelu(self.fc1(self.norm(self.dwconv(x).mT))))
        return x + (self.gamma * h).mT


class MelEncoder(nn.Module):
    """Samples ``[B, 1, L]`` -> latents ``[B, latent_dim, ceil(L / hop)]`` by way of log-mel spectra.

    This project's own: Vocos' blocks over what its decoder has to give back. Magnitudes do not tell
    a sound from its mirror image or from itself a fraction of a frame later, which SEANet does: the
    tokens of a steady tone stay the same from frame to frame, and are that much easier to predict.

    Args:
        windows: lengths of the spectra's windows, in samples; long ones tell pitches apart, short
            ones times.
        n_mels: bands at the longest window, fewer in proportion to the root of shorter ones.
        dim, intermediate_dim, num_layers: width, MLP width and number of the blocks.

    Raises:
        InputError: windows that are no multiples of the hop.
    """

    def __init__(
        self,
        sample_rate: int,
        hop: int,
        latent_dim: int,
        windows: Sequence[int] = (512, 2048),
        n_mels: int = 128,
        dim: int = 192,
        intermediate_dim: int = 576,
        num_layers: int = 4,
    ):
        super().__init__()
        if any(n_fft % hop for n_fft in windows):
            raise InputError(
                f"Windows must be multiples of the hop of {hop} samples, got {list(windows)}."
            )
        self.sample_rate, self.hop = sample_rate, hop
        self.bands = {n: round(n_mels * (n / max(windows)) ** 0.5) for n in windows}
        self.embed = nn.Conv1d(sum(self.bands.values()), dim, 7, padding=3)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.blocks = nn.Sequential(
            *[ConvNeXtBlock(dim, intermediate_dim, 1 / num_layers) for _ in range(num_layers)]
        )
        self.final_norm = nn.LayerNorm(dim, eps=1e-6)
        self.out = Linear(dim, latent_dim)

    def features(self, audio: Tensor) -> Tensor:
        """``[B, 1, L]`` -> log-mel bands of all windows ``[B, bands, ceil(L / hop)]``, about -1 to 2.

        Frame t is that of the samples around the middle of hop t.
        """
        frames = -(-audio.shape[-1] // self.hop)
        audio = F.pad(audio[:, 0].float(), (0, frames * self.hop - audio.shape[-1]))
        spectra = []
        for n_fft, n_mels in self.bands.items():
            # Enough silence that no frame reaches beyond it, where the transform would mirror.
            padded = F.pad(audio, (n_fft - self.hop // 2, n_fft))
            mel = log_mel(
                padded, self.sample_rate, 1e-4, n_fft=n_fft, hop_length=self.hop, n_mels=n_mels
            )
            spectra.append(mel[..., n_fft // self.hop :][..., :frames])
        return torch.cat(spectra, dim=1) / 4 + 1

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            mel = self.features(x)
        x = self.norm(self.embed(mel.to(self.embed.weight.dtype)).mT).mT
        return self.out(self.final_norm(self.blocks(x).mT)).mT


class VocosBackbone(nn.Module):
    """Codes ``[B, latent_dim, T]`` -> features ``[B, T, dim]``.

    The published layer norms take their scale and shift from one row of a table, always the first
    one at inference: here they are plain layer norms, which the converter gives that row.
    """

    def __init__(self, latent_dim: int, dim: int, intermediate_dim: int, num_layers: int):
        super().__init__()
        self.embed = nn.Conv1d(latent_dim, dim, 7, padding=3)
        self.pos_net = nn.Sequential(
            ResBlock(dim),
            ResBlock(dim),
            AttentionBlock(dim),
            ResBlock(dim),
            ResBlock(dim),
            nn.GroupNorm(32, dim, eps=1e-6),
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.blocks = nn.Sequential(
            *[ConvNeXtBlock(dim, intermediate_dim, 1 / num_layers) for _ in range(num_layers)]
        )
        self.final_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pos_net(self.embed(x)).mT).mT
        return self.final_norm(self.blocks(x).mT)


class ISTFTHead(nn.Module):
    """Features ``[B, T, dim]`` -> samples ``[B, T * hop]``: a linear layer gives log magnitude and
    phase of each frame's spectrum; the frames are 4 hops long (Vocos, section 3.2).

    Args:
        running: phases go on from frame to frame, each bin at its own frequency or near it, and the
            layer gives that small difference too. Features that stay the same are then a steady
            sound; under phases of Vocos' kind they repeat one frame, a buzz at the frame rate. (The
            idea is GANSynth's: "GANSynth: Adversarial Neural Audio Synthesis", Engel et al., 2019,
            arXiv 1902.08710, section 2.)
    """

    def __init__(self, dim: int, hop: int, running: bool = False):
        super().__init__()
        self.hop, self.running = hop, running
        self.out = Linear(dim, (3 if running else 2) * (2 * hop + 1))
        self.register_buffer("window", torch.hann_window(4 * hop), persistent=False)

    def run(self, phase: Tensor, change: Tensor) -> Tensor:
        """Phases in the middle of each frame and changes of the pace -> phases at its start."""
        bins = torch.arange(phase.shape[-1], device=phase.device)
        frames = torch.arange(phase.shape[1], device=phase.device)[:, None]
        # A quarter turn a frame and bin, and half a turn a bin from the middle to the start.
        turns = (frames * bins + 2 * bins) % 4 * (math.pi / 2)
        # At most one bin away.
        return phase + turns + (math.pi / 2 * change.tanh()).cumsum(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            log_magnitude, phase, *change = self.out(x).float().split(2 * self.hop + 1, -1)
            if self.running:
                phase = self.run(phase, *change)
            spectrum = torch.polar(log_magnitude.exp().clamp(max=1e2), phase)
            frames = torch.fft.irfft(spectrum, 4 * self.hop) * self.window
            envelope = overlap_add(self.window.square().expand(1, x.shape[1], -1), self.hop)
            audio = overlap_add(frames, self.hop)
            trim = 3 * self.hop // 2
            return audio[:, trim:-trim] / envelope[:, trim:-trim]


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Frames ``[B, T, 4 * hop]``, each a hop after the one before -> their sum ``[B, (T + 3) hop]``."""
    batch, count, _ = frames.shape
    out = frames.new_zeros(batch, count + 3, hop)
    for j, part in enumerate(frames.unflatten(-1, (4, hop)).unbind(2)):
        out[:, j : j + count] += part
    return out.flatten(1)


class WavTokenizer(ModelMixin, ConfigMixin, AudioTokenizer):
    """Sound <-> one token every ``hop`` samples.

    Neither side is causal: the decoder's norms and attention see the whole sound, so a piece of it
    decodes a little differently alone. Items of one batch must have one length, since padding
    would be heard by the others.

    Args:
        sample_rate: in Hz.
        filters: channels of the encoder's first convolution.
        strides: of the encoder, in the order in which they are applied; their product is the hop.
        lstm_layers: of the encoder.
        latent_dim: width of a code.
        vocab_size: number of codes.
        dim, intermediate_dim, num_layers: width, MLP width and blocks of the decoder.
        codebook: further options of `EMACodebook`, for training.
        mel_encoder: options of a `MelEncoder`, which then stands in the place of the published
            encoder (``filters`` and ``lstm_layers`` mean nothing).
        running_phase: of the `ISTFTHead`; wanted with a `MelEncoder`, whose tokens hold no phase.
    """

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 24000,
        filters: int = 32,
        strides: Sequence[int] = (2, 4, 5, 8),
        lstm_layers: int = 2,
        latent_dim: int = 512,
        vocab_size: int = 4096,
        dim: int = 768,
        intermediate_dim: int = 2304,
        num_layers: int = 12,
        codebook: dict[str, float] | None = None,
        mel_encoder: dict[str, Any] | None = None,
        running_phase: bool = False,
    ):
        super().__init__()
        self.sample_rate = sample_rate
        self.hop = math.prod(strides)
        self.vocab_size = vocab_size
        if mel_encoder is None:
            self.encoder = SEANetEncoder(filters, strides, latent_dim, lstm_layers)
        else:
            self.encoder = MelEncoder(sample_rate, self.hop, latent_dim, **mel_encoder)
        self.quantizer = EMACodebook(vocab_size, latent_dim, **(codebook or {}))
        self.backbone = VocosBackbone(latent_dim, dim, intermediate_dim, num_layers)
        self.head = ISTFTHead(dim, self.hop, running_phase)

    def init_weights(self) -> None:
        """Vocos' start in the decoder; in the encoder weights that keep the variance.

        Under PyTorch's own start the signal shrinks from layer to layer below the biases, and all
        latents are alike.
        """
        vocos = [self.backbone]
        if isinstance(self.encoder, MelEncoder):
            vocos.append(self.encoder)
        else:
            for module in self.encoder.modules():
                if isinstance(module, nn.Conv1d):
                    nn.init.kaiming_normal_(module.weight)
                    nn.init.zeros_(module.bias)
        for part in vocos:
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Linear)):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        if self.head.running:
            # The bins begin at their own frequencies.
            bins = 2 * self.hop + 1
            nn.init.zeros_(self.head.out.weight[bins:])
            nn.init.zeros_(self.head.out.bias[bins:])

    def encode_latents(self, audio: Tensor) -> Tensor:
        """Samples ``[B, 1, L]`` -> latents ``[B, latent_dim, T]`` before quantization."""
        return self.encoder(audio)

    def decode_features(self, features: Tensor) -> Tensor:
        """Codes ``[B, latent_dim, T]`` -> samples ``[B, 1, T * hop]``."""
        return self.head(self.backbone(features))[:, None]

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Sound ``[B, 1, L]`` in [-1, 1] -> tokens int64 ``[B, 1, ceil(L / hop)]``.

        Raises:
            InputError: another shape, no samples, or values that are not finite.
        """
        self.check_audio(audio)
        latents = self.encode_latents(audio.to(self.dtype))
        return self.quantizer.nearest(latents.mT)[:, None]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, 1, T]`` -> sound ``[B, 1, T * hop]``, about [-1, 1], not clamped.

        Raises:
            InputError: another shape, or ids outside the codebook.
        """
        self.check_tokens(tokens)
        features = self.quantizer.ids_to_codes(tokens[:, 0]).to(self.dtype)
        return self.decode_features(features.mT)

    def forward(
        self, audio: Tensor, quantize: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruct ``[B, 1, L]``.

        Args:
            quantize: without it the latents go to the decoder as they are.

        Returns:
            the reconstruction ``[B, 1, L]``, the commitment loss, and values to report.
        """
        latents = self.encode_latents(audio).mT
        loss, parts = latents.new_zeros(()), {}
        if quantize:
            latents, ids, loss = self.quantizer(latents)
            parts = {"commitment": loss.detach(), **codebook_use(ids, self.vocab_size)}
        return self.decode_features(latents.mT)[..., : audio.shape[-1]], loss, parts
