"""WavTokenizer: an Efficient Acoustic Discrete Codec Tokenizer for Audio Language Modeling (2024).

Paper: Ji et al., arXiv 2408.16532. Its encoder is EnCodec's (Défossez et al., arXiv 2210.13438), its
decoder Vocos (Siuzdak, arXiv 2306.00814) with a residual and attention stack in front. Code: MIT;
weights: MIT by the hub cards (WavTokenizer_{small,medium,large}_{600,320}_24k_4096).

One codebook of 4096 codes, 40 or 75 tokens a second of 24 kHz mono sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
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
    phase of each frame's spectrum; the frames are 4 hops long (Vocos, section 3.2)."""

    def __init__(self, dim: int, hop: int):
        super().__init__()
        self.hop = hop
        self.out = Linear(dim, 4 * hop + 2)
        self.register_buffer("window", torch.hann_window(4 * hop), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            log_magnitude, phase = self.out(x).float().chunk(2, -1)
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
    ):
        super().__init__()
        self.sample_rate = sample_rate
        self.hop = math.prod(strides)
        self.vocab_size = vocab_size
        self.encoder = SEANetEncoder(filters, strides, latent_dim, lstm_layers)
        self.quantizer = EMACodebook(vocab_size, latent_dim, **(codebook or {}))
        self.backbone = VocosBackbone(latent_dim, dim, intermediate_dim, num_layers)
        self.head = ISTFTHead(dim, self.hop)

    def init_weights(self) -> None:
        """Vocos' start in the decoder; in the encoder weights that keep the variance.

        Under PyTorch's own start the signal shrinks from layer to layer below the biases, and all
        latents are alike.
        """
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.backbone.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

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
