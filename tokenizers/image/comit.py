"""COMiT: Communication-Inspired Tokenization for Structured Image Representations (Davtyan et al., 2026).

Paper: arXiv 2602.20731. Published checkpoints: cvg-unibe/comit-b, comit-l, comit-xl, over the VAE
stabilityai/sd-vae-ft-ema or -mse (MIT). Code: Apache-2.0 with parts under non-commercial terms, of
which nothing is used here.

One transformer looks at one crop of a picture after another and rewrites a message of 256 tokens at
each; finite scalar quantization turns every message into ids. The same transformer, given the message,
is the velocity of a flow from noise to the latents of the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import Tokenizer
from ..guidance import Guidance, NormalizedGuidance
from ..quantizers.fsq import FSQ
from .autoencoder import fold_upsampling
from .flextok import PatchEmbed, TimeEmbed, gate, modulate, sincos_table, unpatchify
from .titok import Attention

Generators = torch.Generator | Sequence[torch.Generator] | None


def norm(x: Tensor) -> Tensor:
    """LayerNorm without scale and bias, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def embedder(in_features: int, dim: int) -> nn.Sequential:
    return nn.Sequential(Linear(in_features, dim), nn.SiLU(), Linear(dim, dim))


class Block(nn.Module):
    """Pre-norm block with one adaLN for patches, one for messages and none for the offset token."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(
            Linear(dim, hidden), nn.GELU(approximate="tanh"), Linear(hidden, dim)
        )
        self.patch_adaln = Linear(dim, 6 * dim)
        self.message_adaln = Linear(dim, 6 * dim)

    def modulation(self, temb: Tensor) -> Tensor:
        """SiLU of the time embedding ``[T, D]`` -> ``[T, 3, 6, D]`` (offset, patches, messages)."""
        patches = self.patch_adaln(temb).unflatten(-1, (6, -1))
        messages = self.message_adaln(temb).unflatten(-1, (6, -1))
        offset = torch.zeros_like(patches)
        offset[:, [2, 5]] = 1
        return torch.stack([offset, patches, messages], dim=1)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        modulation: Tensor,
        groups: Sequence[int],
        rows: slice = slice(None),
        kinds: slice = slice(None),
    ) -> Tensor:
        """Tokens ``[B, S, D]`` in ``groups`` -> the outputs of ``rows``, which are of one of the kinds."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(2)
        h = modulate(norm(x), shift_msa, scale_msa, groups)
        h = self.attn(h, rows, mask[rows])
        x = x[:, rows]
        groups = groups if kinds == slice(None) else (x.shape[1],)
        x = gate(x, h, gate_msa[:, kinds], groups)
        h = modulate(norm(x), shift_mlp[:, kinds], scale_mlp[:, kinds], groups)
        return gate(x, self.mlp(h), gate_mlp[:, kinds], groups)


class Predictor(nn.Module):
    """Velocity, next message and offset, from latents, message, offset and time (section 4).

    The tokens are [offset, patches, message, read-out], the last two as many as message tokens.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        grid: int,
        num_tokens: int,
        code_dim: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
    ):
        super().__init__()
        self.num_tokens = num_tokens
        # Here the columns come first, unlike in FlexTok.
        positions = sincos_table(dim, grid).transpose(0, 1)
        self.patch_embed = PatchEmbed(channels, patch_size, dim, positions)
        self.message_embed = embedder(code_dim, dim)
        self.offset_embed = embedder(2, dim)
        self.message_positions = nn.Parameter(torch.empty(num_tokens, dim))
        self.offset_position = nn.Parameter(torch.empty(1, dim))
        self.readout_token = nn.Parameter(torch.empty(1, dim))
        self.readout_positions = nn.Parameter(torch.empty(num_tokens, dim))
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.time_embed = TimeEmbed(dim, max_timestep=1000.0, max_period=10000.0)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.adaln = Linear(dim, 2 * dim)
        self.proj = Linear(dim, channels * patch_size**2)
        self.message_proj = Linear(dim, code_dim)
        self.offset_proj = Linear(dim, 2)

    def modulations(self, t: Tensor) -> list[Tensor]:
        """Times ``[T]`` -> adaLN of each block ``[T, 3, 6, D]``, then of the output ``[T, 1, 2, D]``."""
        temb = F.silu(self.time_embed(1000 * t))
        output = self.adaln(temb).unflatten(-1, (1, 2, -1))
        return [*(block.modulation(temb) for block in self.blocks), output]

    def condition(self, codes: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[B, N, code_dim]``, offsets ``[B, 2]`` -> tokens ``[B, 1, D]`` and ``[B, 2N, D]``."""
        dtype = self.offset_position.dtype
        message = self.message_embed(codes.to(dtype)) + self.message_positions
        readout = (self.readout_token + self.readout_positions).expand(len(codes), -1, -1)
        offset = self.offset_embed(offset.to(dtype))[:, None] + self.offset_position
        return offset, torch.cat([message, readout], dim=1)

    def forward(
        self, x: Tensor, t: Tensor, codes: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All three outputs.

        Args:
            x: latents ``[B, C, h, w]`` of a crop, or noised ones of the picture.
            t: times ``[B]``, 0 = noise, 1 = picture.
            codes: the message ``[B, N, code_dim]``.
            offset: ``[B, 2]``, x then y, from where the last observation was to where this one is.

        Returns:
            velocity ``[B, C, h, w]``, the next message before quantization ``[B, N, code_dim]``, and
            a guess of the offset ``[B, 2]``.
        """
        modulations = self.modulations(t)
        h = self.trunk(x, modulations, *self.condition(codes, offset))
        message = self.message_proj(norm(h[:, -self.num_tokens :]))
        patches = h[:, 1 : -2 * self.num_tokens]
        return self.to_velocity(patches, x, modulations[-1]), message, self.offset_head(h[:, 0])

    def velocity(
        self, x: Tensor, modulations: Sequence[Tensor], offset: Tensor, message: Tensor
    ) -> Tensor:
        """Velocity alone, given `modulations` (T = 1 serves the batch) and `condition`."""
        rows = slice(1, -2 * self.num_tokens)
        patches = self.trunk(x, modulations, offset, message, rows, slice(1, 2))
        return self.to_velocity(patches, x, modulations[-1])

    def next_message(
        self, x: Tensor, modulations: Sequence[Tensor], offset: Tensor, message: Tensor
    ) -> Tensor:
        """The next message alone, before quantization ``[B, N, code_dim]``."""
        rows = slice(-self.num_tokens, None)
        return self.message_proj(
            norm(self.trunk(x, modulations, offset, message, rows, slice(2, 3)))
        )

    def trunk(
        self,
        x: Tensor,
        modulations: Sequence[Tensor],
        offset: Tensor,
        message: Tensor,
        rows: slice = slice(None),
        kinds: slice = slice(None),
    ) -> Tensor:
        """Outputs ``[B, R, D]`` of the given rows; the last block computes no others."""
        patches = self.patch_embed(x)
        groups = (1, patches.shape[1], 2 * self.num_tokens)
        h = torch.cat([offset, patches, message], dim=1)
        mask = self.attention_bias(h)
        *before, last, _ = modulations
        for block, modulation in zip(self.blocks[:-1], before, strict=True):
            h = block(h, mask, modulation, groups)
        return self.blocks[-1](h, mask, last, groups, rows, kinds)

    def attention_bias(self, tokens: Tensor) -> Tensor:
        """``[S, S]``, added to the logits.

        The published code passes its 0/1 mask (read-outs causal and hidden from the rest) as floats,
        which attention adds: what was to be hidden is only e times less likely. The weights were
        trained with that.
        """
        size, count = tokens.shape[1], self.num_tokens
        bias = tokens.new_ones(size, size)
        bias[:, -count:] = 0
        bias[-count:, -count:] = tokens.new_ones(count, count).tril()
        return bias

    def to_velocity(self, patches: Tensor, x: Tensor, modulation: Tensor) -> Tensor:
        """Outputs of the patches ``[B, P, D]`` -> ``[B, C, h, w]``, of the shape of the latents x."""
        patch_size = self.patch_embed.patch_size
        shift, scale = modulation.unbind(2)
        h = self.proj(modulate(norm(patches), shift, scale, (patches.shape[1],)))
        return unpatchify(h, x.shape[2] // patch_size, x.shape[3] // patch_size, patch_size)

    def offset_head(self, token: Tensor) -> Tensor:
        return self.offset_proj(norm(token)).tanh()


@dataclass
class Message:
    """What `COMiT.observe` wrote.

    Attributes:
        ids: int64 ``[B, N]``.
        offset: ``[B, 2]``, from the last crop to the whole picture; `COMiT.decode` wants it.
        crops: the crops seen, in order, int64 ``[B, K]``.
    """

    ids: Tensor
    offset: Tensor
    crops: Tensor


class COMiT(Tokenizer, ModelMixin, ConfigMixin):
    """Picture <-> a message of ids, written crop by crop.

    The defaults are the published comit-b. Crops are numbered row by row; with the global crop, number
    0 is the whole picture and those of the grid follow.

    Args:
        image_size: side of the square pictures in pixels.
        crop_size, crop_stride: side of the crops in pixels, and the distance between them.
        vae_config: configuration of the diffusers ``AutoencoderKL`` under it; None works on pixels.
        vae_scaling_factor: multiplies VAE latents.
        latent_channels: channels of the latents (3 without a VAE).
        latent_size: side of the latent grid of a whole picture.
        num_message_tokens: ids of a message.
        num_inference_steps: default steps of ``decode``.
        solver: of the flow, "euler" or "midpoint".
        guidance_scale: default guidance of ``decode``; 1 (or 0) needs no unconditional pass.
    """

    ordered = False
    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules: ClassVar[list[str]] = ["vae"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        crop_size: int = 96,
        crop_stride: int = 80,
        vae_config: dict[str, Any] | None = None,
        vae_scaling_factor: float = 0.18215,
        latent_channels: int = 4,
        latent_size: int = 32,
        patch_size: int = 2,
        num_message_tokens: int = 256,
        fsq_levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        num_inference_steps: int = 10,
        solver: str = "euler",
        guidance_scale: float = 7.5,
    ):
        super().__init__()
        self.vae = None
        if vae_config is not None:
            self.vae = AutoencoderKL.from_config(dict(vae_config))
            fold_upsampling(self.vae.decoder)
        self.quantizer = FSQ(fsq_levels)
        self.predictor = Predictor(
            channels=latent_channels,
            patch_size=patch_size,
            grid=latent_size // patch_size,
            num_tokens=num_message_tokens,
            code_dim=self.quantizer.dim,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
        )

    @property
    def num_tokens(self) -> int:
        return self.config.num_message_tokens

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def crops_per_side(self) -> int:
        return (self.image_size - self.config.crop_size) // self.config.crop_stride + 1

    def locations(self, crops: Tensor) -> Tensor:
        """Crops of the grid int64 ``[...]``, -1 for the whole picture -> centres (x, y) ``[..., 2]``.

        In [-1, 1] over the picture, (0, 0) its middle.
        """
        c = self.config
        side = self.crops_per_side
        corners = torch.stack([crops % side, crops // side], dim=-1) * c.crop_stride
        centres = (corners + c.crop_size / 2) / (c.image_size / 2) - 1
        return centres.masked_fill(crops[..., None] < 0, 0)

    @torch.no_grad()
    def encode_latents(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Pictures or crops ``[B, 3, H, W]`` in [-1, 1] -> scaled latents ``[B, C, h, w]``.

        The mean of the VAE's posterior; with a generator a sample of it, as the published code draws.
        """
        if self.vae is None:
            return images.to(self.dtype)
        images = images.to(self.vae.dtype, memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(_list(generator))
        return (latents * self.config.vae_scaling_factor).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents ``[B, C, h, w]`` -> pictures ``[B, 3, H, W]``."""
        if self.vae is None:
            return latents
        latents = latents / self.config.vae_scaling_factor
        latents = latents.to(self.vae.dtype, memory_format=torch.channels_last)
        return self.vae.decode(latents).sample

    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, image_size, image_size]`` in [-1, 1] -> ids int64 ``[B, num_tokens]``.

        Every crop of the grid is seen, row by row. For other orders and fewer crops see `observe`.
        """
        return self.observe(images).ids

    @torch.no_grad()
    def observe(
        self,
        images: Tensor,
        order: str | Sequence[int] | Tensor = "raster",
        num_crops: int | None = None,
        global_crop: bool = False,
        generator: Generators = None,
        noise: Tensor | None = None,
    ) -> Message:
        """Write a message about pictures from some of their crops (section 5).

        Args:
            images: ``[B, 3, image_size, image_size]`` in [-1, 1].
            order: "raster" (row by row), "random", "adaptive" (each time where a reconstruction from
                the message so far is worst, from the centre on), or numbers of crops, the same for all
                pictures ``[K]`` or for each ``[B, K]``.
            num_crops: how many to see; default all of the order.
            global_crop: the whole picture is number 0, and comes first in orders given by name.
            generator: of "random" and of the reconstructions' noise; one, or one an item.
            noise: ``[B, C, h, w]``, that every reconstruction of "adaptive" starts from.

        Raises:
            InputError: pictures of another size, or crops that there are not.
        """
        self.check_images(images)
        first = 1 if global_crop else 0
        adaptive = isinstance(order, str) and order == "adaptive"
        crops = self._order(order, len(images), first, generator).to(images.device)
        num_crops = crops.shape[1] if num_crops is None else num_crops
        if not 1 <= num_crops <= crops.shape[1]:
            raise InputError(f"num_crops must be 1 to {crops.shape[1]}, got {num_crops}.")
        # From here on -1 is the whole picture.
        crops = crops[:, :num_crops] - first
        batch = len(images)
        ids = self._first_message(batch)
        codes = self.quantizer.ids_to_codes(ids)
        modulations = self.predictor.modulations(torch.ones(1, device=self.device))
        used = torch.zeros(batch, self.crops_per_side**2, dtype=torch.bool, device=images.device)
        location = None
        for step in range(num_crops):
            if adaptive and step > 0:
                latents = self.sample_latents(
                    ids, -location, 1, 1.0, generator, noise, solver="euler"
                )
                error = (self.decode_latents(latents) - images).square().sum(1, keepdim=True)
                scores = F.avg_pool2d(error, self.config.crop_size, self.config.crop_stride)
                crops[:, step] = scores.flatten(1).masked_fill(used, -torch.inf).argmax(1)
            now = crops[:, step]
            used |= F.one_hot(now.clamp(min=0), used.shape[1]).bool() & (now >= 0)[:, None]
            previous, location = location, self.locations(now)
            offset = location - (location if previous is None else previous)
            latents = self.encode_latents(self._cut(images, now))
            tokens = self.predictor.condition(codes, offset)
            codes, ids = self.quantizer(self.predictor.next_message(latents, modulations, *tokens))
        return Message(ids, -location, crops + first)

    def _first_message(self, batch: int) -> Tensor:
        """The constant message that an observer starts from, ids ``[B, N]``."""
        shape = (batch, self.num_tokens)
        return torch.full(shape, self.vocab_size // 2, device=self.device)

    def _order(
        self, order: str | Sequence[int] | Tensor, batch: int, first: int, generator: Generators
    ) -> Tensor:
        """Numbers of crops ``[B, K]``; of "adaptive" only the first is to be used."""
        side = self.crops_per_side
        count = side**2
        if not isinstance(order, str):
            crops = torch.as_tensor(order)
            crops = crops.expand(batch, -1) if crops.ndim == 1 else crops
            known = crops.numel() and crops.min() >= 0 and crops.max() < count + first
            if crops.ndim != 2 or len(crops) != batch or not known:
                raise InputError(
                    f"An order must be numbers of crops from 0 to {count + first - 1}, one list for "
                    f"all pictures or one for each, got {order}."
                )
            # Crops and whole pictures have other sizes and cannot be seen in one step.
            whole = crops < first
            if (whole != whole[:1]).any():
                raise InputError("The whole picture must come at the same place in every order.")
            return crops.clone()
        grid = torch.arange(count).expand(batch, -1)
        if order == "random":
            draws = generator if isinstance(generator, Sequence) else [generator] * batch
            grid = torch.stack(
                [torch.randperm(count, generator=g, device=_device(g)).cpu() for g in draws]
            )
        elif order == "adaptive" and not first:
            grid = torch.cat([torch.full((batch, 1), count // 2), grid[:, 1:]], dim=1)
        elif order not in ("raster", "adaptive"):
            raise InputError(
                f'The order must be "raster", "random", "adaptive" or numbers of crops, got "{order}".'
            )
        whole = torch.zeros(batch, first, dtype=torch.int64)
        return torch.cat([whole, grid + first], dim=1)

    def _cut(self, images: Tensor, crops: Tensor) -> Tensor:
        """One crop ``[B, 3, s, s]`` of each picture, or all of the pictures for -1."""
        if crops[0] < 0:
            return images
        size, stride = self.config.crop_size, self.config.crop_stride
        corners = [(c // self.crops_per_side, c % self.crops_per_side) for c in crops.tolist()]
        return torch.stack(
            [
                image[:, row * stride : row * stride + size, col * stride : col * stride + size]
                for image, (row, col) in zip(images, corners, strict=True)
            ]
        )

    def forward(
        self,
        latents: Tensor,
        crops: Tensor,
        locations: Tensor,
        noise: Tensor,
        t: Tensor,
        drop: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of the picture given the message that its crops wrote (section 7).

        Args:
            latents, noise: of the whole picture ``[B, C, H, W]``.
            crops: latents of the crops in the order seen ``[B, K, C, h, w]``.
            locations: their centres ``[B, K, 2]`` (see `locations`).
            t: times ``[B]`` in [0, 1], 0 = noise.
            drop: bool ``[B]``, items trained with the first message, for guidance.
        """
        start = self.quantizer.ids_to_codes(self._first_message(len(latents)))
        codes, previous = start, locations[:, 0]
        modulations = self.predictor.modulations(torch.ones_like(t[:1]))
        for crop, location in zip(crops.unbind(1), locations.unbind(1), strict=True):
            tokens = self.predictor.condition(codes, location - previous)
            codes, ids = self.quantizer(self.predictor.next_message(crop, modulations, *tokens))
            previous = location
        if drop is not None:
            codes = torch.where(drop[:, None, None], start, codes)
        time = t[:, None, None, None]
        x = time * latents + (1 - time) * noise
        tokens = self.predictor.condition(codes, -previous)
        velocity = self.predictor.velocity(x, self.predictor.modulations(t), *tokens)
        loss = (velocity.float() - (latents - noise).float()).square().mean()
        used = ids.unique().numel() / min(self.vocab_size, ids.numel())
        return loss, {"flow": loss.detach(), "distinct_ids": torch.tensor(used)}

    def decode(
        self,
        tokens: Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        noise: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Ids int64 ``[B, num_tokens]`` -> pictures ``[B, 3, image_size, image_size]``, about [-1, 1].

        Args:
            generator: one, or one an item (an item's noise then does not depend on the batch).
            noise: the initial latents ``[B, C, h, w]`` in place of a draw.
            callback: called with (step, steps) after each step; it may raise to stop.
            offset: ``[B, 2]`` of the `Message`; default that of `encode`, whose last crop is fixed.
        """
        latents = self.sample_latents(
            tokens, offset, num_inference_steps, guidance_scale, generator, noise, callback
        )
        return self.decode_latents(latents)

    @torch.no_grad()
    def sample_latents(
        self,
        tokens: Tensor,
        offset: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        noise: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
        solver: str | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """The flow of ``decode`` (section 6): scaled latents ``[B, C, h, w]``, float32."""
        c = self.config
        steps = num_inference_steps or c.num_inference_steps
        scale = c.guidance_scale if guidance_scale is None else guidance_scale
        solver = solver or c.solver
        if steps < 1:
            raise InputError(f"The number of steps must be at least 1, got {steps}.")
        if solver not in ("euler", "midpoint"):
            raise InputError(f'The solver must be "euler" or "midpoint", got "{solver}".')
        self.check_tokens(tokens)
        if offset is None:
            last = torch.tensor(self.crops_per_side**2 - 1, device=self.device)
            offset = -self.locations(last).expand(len(tokens), 2)
        if noise is None:
            shape = (len(tokens), c.latent_channels, c.latent_size, c.latent_size)
            noise = randn_tensor(shape, _list(generator), self.device, self.dtype)
        guided = scale not in (0, 1)
        if guided:
            guidance = guidance or NormalizedGuidance()
            tokens = torch.cat([tokens, self._first_message(len(tokens))])
            offset = torch.cat([offset, offset])
        condition = self.predictor.condition(self.quantizer.ids_to_codes(tokens), offset)

        def velocity(x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
            x = x.to(self.dtype)
            if not guided:
                return self.predictor.velocity(x, modulations, *condition).float()
            both = self.predictor.velocity(torch.cat([x, x]), modulations, *condition)
            return guidance(*both.float().chunk(2), scale)

        halves = 2 if solver == "midpoint" else 1
        times = torch.arange(steps * halves, device=self.device) / (steps * halves)
        of_times = [part.split(1) for part in self.predictor.modulations(times)]
        modulations = list(zip(*of_times, strict=True))
        x = noise.float()
        for step in range(steps):
            v = velocity(x, modulations[step * halves])
            if solver == "midpoint":
                v = velocity(x + v / (2 * steps), modulations[2 * step + 1])
            x = x + v / steps
            if callback is not None:
                callback(step + 1, steps)
        return x


def _list(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    """diffusers wants one or a list."""
    return list(generator) if isinstance(generator, Sequence) else generator


def _device(generator: torch.Generator | None) -> torch.device | None:
    return None if generator is None else generator.device
