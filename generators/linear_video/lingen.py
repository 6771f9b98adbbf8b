"""LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear Computational
Complexity (Wang et al., CVPR 2025).

Paper: arXiv 2412.09856. Neither code nor weights were published; what the paper leaves open is decided
here and in `..layers.mate`. Sizes (dim, depth): 256, 8 for a CPU; 512, 12; 1024, 24; 3072, 32 (the paper's
4B).

A diffusion transformer whose self-attention is replaced by MATE, so that time and memory grow linearly
with the number of tokens. No table depends on the grid: pictures, short and long clips share all
weights, and clips longer than those of training can be asked for. Beyond the paper a clip can go on from
given frames (``known``, and ``known_share`` in training).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..conditioning.text import check_text
from ..flow.samplers import euler, hold
from ..layers.adaln import modulate
from ..layers.attention_mixer import angles_of
from ..layers.mate import MATE
from ..layers.mixer import linear_flops
from ..layers.mlp import GatedMLP
from ..layers.rope_adaln import rms_norm
from ..layers.time import TimeEmbedding
from ..sampling import check_generators, draw, guide
from ..schedules import check_guidance, check_steps


@dataclass(frozen=True)
class Stage:
    """A part of progressive training (section 3.4): short and small first, long and large last.

    Attributes:
        steps: that it lasts.
        frames, size: of the videos, in latent frames and latent pixels along a side.
        image_share: of the batches that hold pictures (one frame) in place of videos.
    """

    steps: int
    frames: int
    size: int
    image_share: float = 0.25


def training_shape(
    stages: Sequence[Stage], step: int, generator: torch.Generator
) -> tuple[int, int]:
    """Frames and size of the batch of a step; after the last stage that stage goes on.

    Args:
        generator: decides whether the batch holds pictures; on the CPU.
    """
    end = 0
    for stage in stages:
        end += stage.steps
        if step < end:
            break
    picture = torch.rand((), generator=generator) < stage.image_share
    return 1 if picture else stage.frames, stage.size


def linear_quadratic_times(num_steps: int, fine_steps: int = 1000) -> list[float]:
    """``num_steps + 1`` times from 1 to 0: the first half in steps of ``1 / fine_steps``, then growing.

    The schedule of Movie Gen (arXiv 2410.13720, section 3.4), which LinGen follows: where there is
    almost only noise, few steps walk as if there were many. The second half is quadratic and starts
    at the pace of the first.
    """
    first = num_steps // 2
    if num_steps >= fine_steps or first == 0:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    pace, rest = 1 / fine_steps, num_steps - first
    bend = (1 - num_steps * pace) / rest**2
    done = [i * pace for i in range(first)]
    done += [(first + k) * pace + bend * k * k for k in range(rest)]
    return [*(1 - s for s in done), 0.0]


def grid_positions(grid: tuple[int, int, int], dim: int, device: torch.device) -> Tensor:
    """Sines and cosines ``[t h w, dim]`` of the places; the axes share the width 2 : 3 : 3."""
    sizes = (dim // 4, dim * 3 // 8, dim * 3 // 8)
    tables = []
    for axis, (count, size) in enumerate(zip(grid, sizes, strict=True)):
        angles = angles_of(torch.arange(count, device=device), size)
        shape = [1, 1, 1, size]
        shape[axis] = count
        table = torch.cat([angles.sin(), angles.cos()], dim=1).view(shape)
        tables.append(table.expand(*grid, -1))
    return torch.cat(tables, dim=-1).flatten(0, 2)


class TextAttention(nn.Module):
    """Tokens attend to a text."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(dim, dim, bias=False)
        self.kv = Linear(dim, 2 * dim, bias=False)
        self.proj = Linear(dim, dim)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, L, D]`` -> ``[B, heads, L, head_dim]`` each; they serve all steps."""
        return self.kv(text).unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, *text, attn_mask=mask[:, None, None])
        return self.proj(y.transpose(1, 2).flatten(2))


class LinGenBlock(nn.Module):
    """MATE, attention to the text, gated MLP; modulated by the time (adaLN-single, arXiv 2310.00426).

    Args:
        table: is added to the modulation that all blocks share.
    """

    def __init__(self, dim: int, layer: int, head_dim: int, mlp_ratio: float, **mate):
        super().__init__()
        self.mate = MATE(dim, layer=layer, head_dim=head_dim, **mate)
        self.text = TextAttention(dim, head_dim)
        self.mlp = GatedMLP(dim, int(dim * mlp_ratio * 2 / 3), F.silu)
        self.table = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: tuple[Tensor, Tensor],
        text_mask: Tensor,
        grid: tuple[int, int, int],
    ) -> Tensor:
        """``[B, L, D]`` and ``[B, 6, D]`` -> ``[B, L, D]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (modulation + self.table)[:, :, None].to(x.dtype).unbind(1)
        )
        h = self.mate(modulate(rms_norm(x), shift1, scale1), grid=grid)
        x = torch.addcmul(x, gate1, h)
        x = x + self.text(rms_norm(x), text, text_mask)
        return torch.addcmul(x, gate2, self.mlp(modulate(rms_norm(x), shift2, scale2)))


class LinGen(ModelMixin, ConfigMixin):
    """Text -> video latents ``[B, latent_channels, T, H, W]`` of unit variance, any T, H, W.

    Args:
        latent_channels: of the video tokenizer.
        patch_size: latent pixels along the side of a token; H and W are multiples of it.
        dim, depth: a multiple of 16, and of head_dim.
        head_dim: of attention, a multiple of 16.
        text_dim: width of the text's features.
        window, review_window, review_tokens_from, d_state, headdim: of `MATE`.
        text_dropout: share of the items whose text is hidden in training.
        known_share: share of the clips whose first frames, one more often than more, stand free of
            noise in training and are not counted. Sampling then shows frames that are known as
            they are at every step; a model trained without sees them under the noise of the step.
        num_steps, guidance_scale: of sampling, unless `stream` is told others.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 2,
        dim: int = 256,
        depth: int = 8,
        head_dim: int = 64,
        text_dim: int = 768,
        mlp_ratio: float = 4.0,
        window: Sequence[int] = (16, 4, 4),
        review_window: Sequence[int] = (4, 4, 4),
        review_tokens_from: int = 4096,
        d_state: int = 64,
        headdim: int = 64,
        text_dropout: float = 0.1,
        known_share: float = 0.0,
        num_steps: int = 50,
        guidance_scale: float = 7.5,
    ):
        super().__init__()
        mate = {
            "window": window,
            "review_window": review_window,
            "review_tokens_from": review_tokens_from,
            "d_state": d_state,
            "headdim": headdim,
        }
        patch_dim = latent_channels * patch_size**2
        self.input = Linear(patch_dim, dim)
        self.text_proj = nn.Sequential(
            nn.LayerNorm(text_dim), Linear(text_dim, dim), nn.GELU(), Linear(dim, dim)
        )
        self.null_text = nn.Parameter(torch.zeros(text_dim))
        self.time = TimeEmbedding(dim, whole_steps=False)
        self.modulation = Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            LinGenBlock(dim, layer, head_dim, mlp_ratio, **mate) for layer in range(depth)
        )
        self.final_modulation = Linear(dim, 2 * dim)
        self.output = Linear(dim, patch_dim)
        for layer in (
            self.modulation,
            self.final_modulation,
            self.output,
            *(block.text.proj for block in self.blocks),
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Latent frames, rows and columns -> (t, h, w) of the tokens.

        Raises:
            InputError: no frames, or sides that patches do not divide.
        """
        frames, height, width = shape
        patch = self.config.patch_size
        if min(shape) < 1 or height % patch or width % patch:
            raise InputError(
                f"Latents need 1 frame or more and sides that are multiples of {patch}, got "
                f"{frames} frames of {width}x{height}."
            )
        return frames, height // patch, width // patch

    def condition(
        self, text_features: Tensor, text_mask: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What all steps over the same texts share: keys and values of every block, and the mask.

        Items whose mask is empty get the unconditional text, one learned vector.
        """
        check_text(text_features, text_mask, self.config.text_dim)
        empty = ~text_mask.any(1, keepdim=True)
        text_features = torch.where(empty[..., None], self.null_text, text_features.to(self.dtype))
        first = torch.arange(text_mask.shape[1], device=text_mask.device) == 0
        text = self.text_proj(text_features)
        contexts = [block.text.keys_values(text) for block in self.blocks]
        return contexts, text_mask | (empty & first)

    def velocity(
        self, x: Tensor, times: Tensor, condition: tuple[list[tuple[Tensor, Tensor]], Tensor]
    ) -> Tensor:
        """Latents ``[B, C, T, H, W]`` at times ``[B]`` (1 is noise) -> velocities float32."""
        patch = self.config.patch_size
        grid = self.grid(x.shape[2:])
        tokens = x.unfold(3, patch, patch).unfold(4, patch, patch).permute(0, 2, 3, 4, 1, 5, 6)
        h = self.input(tokens.flatten(4).flatten(1, 3).to(self.dtype))
        h = h + grid_positions(grid, h.shape[-1], h.device).to(h.dtype)
        time = F.silu(self.time(times))
        modulation = self.modulation(time).unflatten(-1, (6, -1))
        contexts, mask = condition
        for block, text in zip(self.blocks, contexts, strict=True):
            h = block(h, modulation, text, mask, grid)
        shift, scale = self.final_modulation(time)[:, None].chunk(2, dim=-1)
        h = self.output(modulate(rms_norm(h), shift, scale)).float()
        h = h.unflatten(1, grid).unflatten(-1, (-1, patch, patch))
        return h.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    def forward(
        self,
        latents: Tensor,
        text_features: Tensor,
        text_mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity at logit-normal times (flow matching, arXiv 2403.03206), over
        the frames that are not shown.

        Args:
            latents: ``[B, C, T, H, W]`` of unit variance; T = 1 trains on pictures. `training_shape`
                says which batch comes when.
            text_features, text_mask: ``[B, L, text_dim]``, bool ``[B, L]``.
            generator: of times, noise and dropped texts, on the model's device.
        """
        random = {"generator": generator, "device": latents.device}
        if self.training:
            kept = torch.rand(len(latents), 1, **random) >= self.config.text_dropout
            text_mask = text_mask & kept
        times = torch.randn(len(latents), **random).sigmoid()
        noise = torch.randn(latents.shape, **random)
        x = torch.lerp(latents, noise, times[:, None, None, None, None])
        counted = torch.ones_like(latents[:, :1, :, :1, :1])
        if latents.shape[2] > 1 and self.config.known_share > 0:
            known = self.draw_known(len(latents), latents.shape[2], random)
            x = torch.where(known, latents, x)
            counted = (~known).to(latents.dtype)
        velocity = self.velocity(x, times, self.condition(text_features, text_mask))
        wrong = (velocity - (noise - latents)).square().mean((1, 3, 4), keepdim=True)
        loss = (wrong * counted).sum() / counted.sum()
        return loss, {"mse": loss.detach()}

    def draw_known(self, batch: int, frames: int, random: dict[str, Any]) -> Tensor:
        """Which frames of each clip are shown free of noise, bool ``[B, 1, frames, 1, 1]``; never all.

        Args:
            random: options of random tensors.
        """
        count = torch.randint(1, frames, (2, batch), **random).amin(0)
        count = count * (torch.rand(batch, **random) < self.config.known_share)
        known = torch.arange(frames, device=count.device) < count[:, None]
        return known[:, None, :, None, None]

    @torch.no_grad()
    def stream(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        generators: Sequence[torch.Generator],
        shape: Sequence[int],
        null_features: Tensor | None = None,
        null_mask: Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        known: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield latents float32 ``[B, C, T, H, W]`` after each step, noisy until the last.

        Args:
            text_features, text_mask: ``[B, L, text_dim]``, bool ``[B, L]``.
            generators: one an item.
            shape: latent frames, rows, columns; as many frames as wanted.
            null_features, null_mask: of texts to steer away from, ``[B, L, text_dim]`` and
                ``[B, L]`` of the same L; default the learned unconditional text.
            guidance_scale: 1 runs no unconditional half.
            known: ``[B, C, k, H, W]``, latents of the first k frames, which the clip continues.

        Raises:
            InputError: a shape or setting that means nothing.
        """
        config = self.config
        steps = config.num_steps if num_steps is None else num_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        check_steps(steps)
        check_guidance(scale)
        check_generators(generators, len(text_features))
        frames, height, width = shape
        self.grid(shape)
        batch, device = len(text_features), text_features.device
        whole = (config.latent_channels, frames, height, width)
        kept = None
        if known is not None:
            wanted = (batch, whole[0], known.shape[2], height, width)
            if tuple(known.shape) != wanted or not 1 <= known.shape[2] < frames:
                raise InputError(
                    f"Known latents must have the shape [{batch}, {whole[0]}, 1 to {frames - 1}, "
                    f"{height}, {width}], got {list(known.shape)}."
                )
            kept = (torch.arange(frames, device=device) < known.shape[2])[:, None, None]
            known = F.pad(known.float(), (0, 0, 0, 0, 0, frames - known.shape[2]))
        shown_clear = known is not None and config.known_share > 0
        guided = scale != 1
        if guided:
            if null_features is None:
                null_features, null_mask = text_features, torch.zeros_like(text_mask)
            if null_features.shape != text_features.shape or null_mask is None:
                raise InputError(
                    f"null_features and null_mask must have the shapes of the text's, "
                    f"{list(text_features.shape)} and {list(text_mask.shape)}: pad the shorter ones."
                )
            text_features = torch.cat([text_features, null_features])
            text_mask = torch.cat([text_mask, null_mask])
        condition = self.condition(text_features, text_mask)

        def velocity(x: Tensor, time: float) -> Tensor:
            seen = torch.where(kept, known, x) if shown_clear else x
            rows = seen.repeat(1 + guided, 1, 1, 1, 1)
            v = self.velocity(rows, torch.full((len(rows),), time, device=device), condition)
            v = guide(*v.chunk(2), scale) if guided else v
            return v if known is None else hold(v, x, time, known, kept)

        noise = draw("normal", whole, generators, device)
        for x in euler(velocity, noise, linear_quadratic_times(steps)):
            yield x if known is None else torch.where(kept, known, x)

    @torch.no_grad()
    def generate(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        generators: Sequence[torch.Generator],
        shape: Sequence[int],
        **settings,
    ) -> Tensor:
        """The last of `stream`."""
        for latents in self.stream(text_features, text_mask, generators, shape, **settings):
            last = latents
        return last

    def flops(self, shape: Sequence[int], text_length: int = 77) -> int:
        """Floating-point operations of one pass over a clip: linear in its tokens."""
        t, h, w = self.grid(shape)
        tokens = t * h * w
        total = tokens * linear_flops(self.input, self.output)
        for block in self.blocks:
            layers = (block.text.q, block.text.proj, block.mlp.fc1, block.mlp.fc2)
            attention = 4 * text_length * block.text.q.out_features
            total += block.mate.flops(tokens) + tokens * (linear_flops(*layers) + attention)
        return total
