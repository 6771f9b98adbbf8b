"""C-ViViT, the tokenizer of Phenaki: Variable Length Video Generation From Open Domain Textual
Descriptions (Villegas et al., ICLR 2023).

Paper: arXiv 2210.02399. Neither code nor weights were published; the layers are those of an open reading
(lucidrains/phenaki-pytorch, MIT), whose temporal positions are corrected here.

The first frame is cut into patches, the others into patches of several frames. Transformers mix first
inside each frame, then along time without seeing the future, so that the tokens of a prefix are the
prefix of the tokens: clips of any length, and pictures as clips of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import Tokenizer
from ..quantizers.fsq import FSQ
from ..quantizers.lfq import LFQ
from ..quantizers.vq import VectorQuantizer, codebook_use

QUANTIZATIONS = ("lookup-free", "cosine", "fsq")
SCALE = 8  # of the logits of normalised queries and keys


class PositionBias(nn.Module):
    """A bias of attention logits from relative places on a grid, by a small network.

    Args:
        axes: of the grid.
        dim: width of the network.
    """

    def __init__(self, axes: int, dim: int, heads: int):
        super().__init__()
        self.net = nn.Sequential(
            Linear(axes, dim),
            nn.LeakyReLU(0.1),
            Linear(dim, dim),
            nn.LeakyReLU(0.1),
            Linear(dim, heads),
        )

    def forward(self, *grid: int) -> Tensor:
        """Sides of the grid -> ``[heads, n, n]`` (query, key), n places in raster order.

        The network sees every offset once, as ``sign(o) log(1 + |o|)``.
        """
        device, dtype = self.net[0].weight.device, self.net[0].weight.dtype
        axes = [torch.arange(1 - side, side, device=device, dtype=dtype) for side in grid]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        table = self.net(offsets.sign() * (offsets.abs() + 1).log())
        return table.T[:, offset_index(grid, device)]


@lru_cache(maxsize=16)
def offset_index(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Row int64 ``[n, n]``, in the table of all offsets of a grid, of each pair's (query - key)."""
    axes = [torch.arange(side, device=device) for side in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    index = torch.zeros(len(places), len(places), dtype=torch.int64, device=device)
    for axis, side in enumerate(grid):
        place = places[:, axis]
        index = index * (2 * side - 1) + place[:, None] - place + side - 1
    return index


@lru_cache(maxsize=16)
def causal_bias(heads: int, length: int, device: torch.device) -> Tensor:
    """ALiBi (arXiv 2108.12409): ``-slope |i - j|`` for keys j <= i, -inf for later ones; ``[heads, n, n]``."""
    slopes = alibi_slopes(heads)
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    bias = -torch.tensor(slopes, device=device)[:, None, None] * distance
    return bias.masked_fill(distance < 0, -torch.inf)


def alibi_slopes(heads: int) -> list[float]:
    """``2^(-8 k / H)`` for a power of two H; else those of the next lower one, then every second one of
    the next higher."""
    lower = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / lower) for k in range(1, lower + 1)]
    return slopes + [2 ** (-4 * k / lower) for k in range(1, 2 * (heads - lower), 2)]


class Attention(nn.Module):
    """Attention of normalised queries and keys; queries are made of the LayerNorm of x, keys and values
    of x itself or of the LayerNorm of a context.

    Args:
        context_dim: width of the context of cross-attention; None is self-attention.
        null_keys: learned keys and values that are always seen.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        null_keys: int = 0,
    ):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.norm = nn.LayerNorm(dim, bias=False)
        self.context_norm = None if context_dim is None else nn.LayerNorm(context_dim, bias=False)
        self.q = Linear(dim, inner, bias=False)
        self.kv = Linear(context_dim or dim, 2 * inner, bias=False)
        self.proj = Linear(inner, dim, bias=False)
        self.q_scale = nn.Parameter(torch.ones(head_dim))
        self.k_scale = nn.Parameter(torch.ones(head_dim))
        self.null_kv = None
        if null_keys:
            self.null_kv = nn.Parameter(torch.empty(2, heads, null_keys, head_dim))
            nn.init.normal_(self.null_kv)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, L, D]`` -> ``[B, heads, null_keys + L, head_dim]`` each."""
        if self.context_norm is not None:
            context = self.context_norm(context)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.null_kv is not None:
            null_k, null_v = self.null_kv.to(k.dtype)[:, None].expand(-1, len(k), -1, -1, -1)
            k, v = torch.cat([null_k, k], dim=2), torch.cat([null_v, v], dim=2)
        return F.normalize(k, dim=-1) * self.k_scale, v

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``[B, n, D]`` -> the same shape.

        Args:
            bias: added to the logits (bool: True = sees), broadcasts against ``[B, heads, n, keys]``.
            keys_values: of a context; default those of x.
        """
        k, v = self.keys_values(x) if keys_values is None else keys_values
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q = F.normalize(q, dim=-1) * self.q_scale
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)
        return self.proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """LayerNorm, then GEGLU without biases; the rows of the first layer are ordered (value, gate)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = int(dim * 8 / 3)
        self.norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, 2 * hidden, bias=False)
        self.fc2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(self.norm(x)).chunk(2, dim=-1)
        return self.fc2(value * F.gelu(gate))


class PositionGenerator(nn.Module):
    """Depthwise 3x3x3 convolution over (t, h, w) (PEG, arXiv 2102.10882)."""

    def __init__(self, dim: int, causal: bool):
        super().__init__()
        self.padding = (1, 1, 1, 1, 2, 0) if causal else (1, 1, 1, 1, 1, 1)
        self.conv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, H, W, D]`` -> the same shape."""
        return self.conv(F.pad(x.movedim(-1, 1), self.padding)).movedim(1, -1)


class Block(nn.Module):
    """Residual parts: positions, self-attention, cross-attention, feed-forward.

    Args:
        axis: along which tokens attend: "space" (inside a frame), "time" (at one site, causal) or "all".
        context_dim: width of a text to attend to.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, axis: str, context_dim: int | None):
        super().__init__()
        self.axis = axis
        self.peg = None if axis == "space" else PositionGenerator(dim, causal=axis == "time")
        self.attn = Attention(dim, heads, head_dim)
        self.cross = None
        if context_dim is not None:
            self.cross = Attention(dim, heads, head_dim, context_dim, null_keys=2)
        self.mlp = FeedForward(dim)

    def fold(self, x: Tensor) -> Tensor:
        """``[B, T, H, W, D]`` -> sequences ``[B', n, D]``."""
        if self.axis == "space":
            return x.flatten(2, 3).flatten(0, 1)
        return x.permute(0, 2, 3, 1, 4).flatten(0, 2) if self.axis == "time" else x.flatten(1, 3)

    def unfold(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        b, t, h, w, d = shape
        return (
            y.view(b, h, w, t, d).permute(0, 3, 1, 2, 4) if self.axis == "time" else y.view(shape)
        )

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        context: tuple[Tensor, Tensor] | None = None,
        context_mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """``[B, T, H, W, D]`` -> the same shape.

        Args:
            bias: of the self-attention.
            context, context_mask: keys and values of the text, bool ``[B, 1, 1, keys]``.
            valid: bool ``[B, T, H, W, 1]``: places that the convolution may see.
        """
        if self.peg is not None:
            x = x + self.peg(x if valid is None else x * valid)
        x = x + self.unfold(self.attn(self.fold(x), bias), x.shape)
        if self.cross is not None:
            y = self.cross(x.flatten(1, 3), context_mask, context)
            x = x + y.view(x.shape)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Blocks along one axis of a video's tokens, and a last LayerNorm; arguments as of `Block`."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        head_dim: int,
        axis: str,
        context_dim: int | None = None,
    ):
        super().__init__()
        self.heads, self.axis = heads, axis
        self.blocks = nn.ModuleList(
            Block(dim, heads, head_dim, axis, context_dim) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, bias=False)

    def keys_values(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A text ``[B, L, D]`` -> what each block reads of it; it serves all passes."""
        return [block.cross.keys_values(context) for block in self.blocks]

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        contexts: Sequence[tuple[Tensor, Tensor]] | None = None,
        context_mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """``[B, T, H, W, D]`` -> the same shape; along time the bias is `causal_bias`."""
        if self.axis == "time":
            bias = causal_bias(self.heads, x.shape[1], x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, bias, None if contexts is None else contexts[i], context_mask, valid)
        return self.norm(x)


class PatchEmbed(nn.Sequential):
    """Patch vectors -> LayerNorm, Linear, LayerNorm."""

    def __init__(self, patch_dim: int, dim: int):
        super().__init__(nn.LayerNorm(patch_dim), Linear(patch_dim, dim), nn.LayerNorm(dim))


def patchify(video: Tensor, size: Sequence[int]) -> Tensor:
    """``[B, C, T, H, W]`` -> vectors ordered (channel, frame, row, column), ``[B, t, h, w, C f p q]``.

    Args:
        size: (f, p, q), frames, rows and columns of a patch.
    """
    for axis, step in enumerate(size, start=2):
        video = video.unfold(axis, step, step)
    return video.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


def unpatchify(x: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `patchify`, for three channels."""
    x = x.unflatten(-1, (3, *size)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class CViViT(ModelMixin, ConfigMixin, Tokenizer):
    """Clips of ``1 + k temporal_patch_size`` frames <-> ids in the raster order (t, h, w).

    The defaults are the paper's, but for the quantizer, which is the open reading's.

    Args:
        image_size: side of a frame in pixels. (`quantize_video` and `decode_grid` take frames of any
            size that patches divide.)
        num_frames: of the clips in training; others are read and written as well.
        patch_size: pixels along the side of a patch, or its rows and columns.
        temporal_patch_size: its frames.
        spatial_depth, temporal_depth: layers, in the encoder and in the decoder.
        quantization: "lookup-free" (signs), "cosine" (the paper's learned codebook of normalised codes)
            or "fsq".
        vocab_size: of "cosine" and, a power of two, of "lookup-free".
        code_dim: width of the codes of "cosine".
        fsq_levels: of "fsq".
    """

    ordered = False
    causal = True

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        num_frames: int = 11,
        patch_size: int | Sequence[int] = 8,
        temporal_patch_size: int = 2,
        dim: int = 512,
        spatial_depth: int = 4,
        temporal_depth: int = 4,
        heads: int = 8,
        head_dim: int = 64,
        quantization: str = "lookup-free",
        vocab_size: int = 8192,
        code_dim: int = 32,
        fsq_levels: Sequence[int] = (8, 8, 8, 5, 5),
    ):
        super().__init__()
        if quantization == "lookup-free":
            bits = vocab_size.bit_length() - 1
            if vocab_size != 2**bits:
                raise InputError(f"Lookup-free ids are a power of two in number, got {vocab_size}.")
            self.quantizer = LFQ(bits)
        elif quantization == "cosine":
            self.quantizer = VectorQuantizer(vocab_size, code_dim, l2_norm=True)
        elif quantization == "fsq":
            self.quantizer = FSQ(fsq_levels)
        else:
            raise InputError(
                f'Unknown quantization "{quantization}": use one of {", ".join(QUANTIZATIONS)}.'
            )
        first_dim = 3 * math.prod(self.patch_sizes)
        patch_dim = first_dim * temporal_patch_size
        layers = (heads, head_dim)
        self.embed_first = PatchEmbed(first_dim, dim)
        self.embed = PatchEmbed(patch_dim, dim)
        self.position_bias = PositionBias(2, dim, heads)
        self.encoder_space = Transformer(dim, spatial_depth, *layers, "space")
        self.encoder_time = Transformer(dim, temporal_depth, *layers, "time")
        self.to_codes = Linear(dim, self.quantizer.dim)
        self.from_codes = Linear(self.quantizer.dim, dim)
        self.decoder_time = Transformer(dim, temporal_depth, *layers, "time")
        self.decoder_space = Transformer(dim, spatial_depth, *layers, "space")
        self.to_pixels_first = Linear(dim, first_dim)
        self.to_pixels = Linear(dim, patch_dim)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_frames(self) -> int:
        return self.config.num_frames

    @property
    def temporal_patch_size(self) -> int:
        return self.config.temporal_patch_size

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def num_tokens(self) -> int:
        """Of a clip of ``num_frames``."""
        return math.prod(self.grid)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the tokens of a clip of ``num_frames``."""
        return self.grid_of(self.num_frames)

    @property
    def patch_sizes(self) -> tuple[int, int]:
        """Rows and columns of a patch."""
        size = self.config.patch_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def grid_of(self, frames: int) -> tuple[int, int, int]:
        """(t, h, w) of the tokens of so many frames."""
        rows, columns = self.patch_sizes
        steps = 1 + (frames - 1) // self.temporal_patch_size
        return steps, self.image_size // rows, self.image_size // columns

    def encode_latents(self, video: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` in [-1, 1] -> ``[B, t, h, w, D]`` before the quantizer."""
        video = (video + 1) / 2
        x = self.embed_first(patchify(video[:, :, :1], (1, *self.patch_sizes)))
        if video.shape[2] > 1:
            size = (self.temporal_patch_size, *self.patch_sizes)
            rest = self.embed(patchify(video[:, :, 1:], size))
            x = torch.cat([x, rest], dim=1)
        x = self.encoder_space(x, self.position_bias(*x.shape[2:4]))
        return self.encoder_time(x)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., D]`` -> codes with a straight-through gradient, ids int64 ``[...]``, a loss."""
        codes, ids, *loss = self.quantizer(self.to_codes(latents))
        return codes, ids, loss[0] if loss else codes.new_zeros(())

    def quantize_video(self, video: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` in [-1, 1] of any size that patches divide -> ids ``[B, t, h, w]``."""
        return self.quantize(self.encode_latents(video))[1]

    def decode_codes(self, codes: Tensor) -> Tensor:
        """``[B, t, h, w, code width]`` -> ``[B, 3, T, H, W]``, about [-1, 1]."""
        x = self.decoder_time(self.from_codes(codes.to(self.dtype)))
        x = self.decoder_space(x, self.position_bias(*x.shape[2:4]))
        video = unpatchify(self.to_pixels_first(x[:, :1]), (1, *self.patch_sizes))
        if x.shape[1] > 1:
            size = (self.temporal_patch_size, *self.patch_sizes)
            rest = unpatchify(self.to_pixels(x[:, 1:]), size)
            video = torch.cat([video, rest], dim=2)
        return video * 2 - 1

    def decode_grid(self, ids: Tensor) -> Tensor:
        """Ids ``[B, t, h, w]`` of any grid -> ``[B, 3, 1 + (t - 1) f, h p, w q]``."""
        return self.decode_codes(self.quantizer.ids_to_codes(ids))

    @torch.no_grad()
    def encode(self, media: Tensor) -> Tensor:
        """Clips ``[B, 3, T, S, S]`` or pictures ``[B, 3, S, S]`` in [-1, 1] -> ids int64 ``[B, N]``.

        Raises:
            InputError: frames of another size, or a number of them that is not ``1 + k f``.
        """
        if media.ndim == 4:
            media = media[:, :, None]
        self.check_video(media)
        return self.quantize_video(media.to(self.dtype)).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Ids ``[B, N]``, whole frames of them -> ``[B, 3, T, S, S]``, about [-1, 1], not clamped.

        Raises:
            InputError: ids out of range, or a number that fills no whole frames.
        """
        self.check_tokens(tokens)
        _, rows, columns = self.grid
        return self.decode_grid(tokens.unflatten(1, (-1, rows, columns)))

    def check_tokens(self, tokens: Tensor) -> None:
        """As the base class, for any number of whole frames."""
        _, rows, columns = self.grid
        if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.shape[1] % (rows * columns):
            raise InputError(
                f"This tokenizer decodes tokens of shape [batch, {rows * columns} k], whole frames "
                f"of {rows}x{columns}, got {list(tokens.shape)}."
            )
        super().check_tokens(tokens[:, :1].expand(-1, self.num_tokens))
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            raise InputError(
                f"Token ids must lie in 0 to {self.vocab_size - 1}, got {int(tokens.min())} to "
                f"{int(tokens.max())}."
            )

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruct, for training.

        Args:
            video: ``[B, 3, 1 + k f, S, S]`` in [-1, 1]; k = 0 trains on pictures, as the paper does first.

        Returns:
            clips float32, the quantizer's loss (to which squared error, perceptual and adversarial
            losses are added: ``training.video_losses``), values to report.
        """
        self.check_video(video)
        codes, ids, loss = self.quantize(self.encode_latents(video))
        return self.decode_codes(codes).float(), loss, codebook_use(ids, self.vocab_size)
