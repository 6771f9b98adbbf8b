"""FlexTok: Resampling Images into 1D Token Sequences of Flexible Length (Bachmann et al., ICML 2025).

Paper: arXiv 2502.13967. Published checkpoints: EPFL-VILAB/flextok_d12_d12_in1k, flextok_d18_d18_in1k,
flextok_d18_d28_in1k, flextok_d18_d28_dfn (weights: Apple Machine Learning Research licence, research
only). The shipped sticker tokenizer is this class at laptop size, trained by this project.

A ViT reads the VAE latents of a picture together with causal register tokens; finite scalar
quantization turns each register into one id; a rectified-flow transformer writes the latents back.
Nested dropout in training orders the registers, so every prefix of the ids decodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ...modalities.errors import InputError
from ..base import Tokenizer
from ..guidance import Guidance, NormalizedGuidance, classifier_free_guidance
from ..quantizers.fsq import FSQ
from .autoencoder import fold_upsampling


def sincos_table(dim: int, grid: int) -> Tensor:
    """Fixed 2-D positions ``[grid, grid, dim]``: [sin row, cos row, sin column, cos column]."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(grid, grid, -1)
    columns = axis[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).float()


def norm(x: Tensor) -> Tensor:
    """LayerNorm without scale and bias, eps 1e-5."""
    return F.layer_norm(x, x.shape[-1:])


class Attention(nn.Module):
    """Self-attention with per-head normalised queries and keys; softmax scale 8 / head_dim (muP)."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
        """``[B, S, D]``, mask broadcastable to ``[B, heads, R, S]`` -> the queried rows ``[B, R, D]``."""
        dim = x.shape[-1]
        to_q, to_kv = self.qkv.weight.split([dim, 2 * dim])
        q = linear(x[:, rows], to_q).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = linear(x, to_kv).unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = norm(q).to(v.dtype), norm(k).to(v.dtype)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=8 / self.head_dim)
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        hidden = int(2 * (mlp_ratio * dim) / 3)
        self.fc1_fc3 = Linear(dim, 2 * hidden, bias=False)
        self.fc2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1_fc3(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, head_dim: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(dim, head_dim)
        self.mlp = SwiGLU(dim, mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor, rows: slice = slice(None)) -> Tensor:
        """Tokens ``[B, S, D]`` -> the given rows after the block, ``[B, R, D]``."""
        x = x[:, rows] + self.attn(norm(x), mask, rows)
        return x + self.mlp(norm(x))


class DecoderBlock(EncoderBlock):
    """adaLN-zero, with one modulation for the patches and another for the registers."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float):
        super().__init__(dim, head_dim, mlp_ratio)
        self.adaln = Linear(dim, 12 * dim)

    def modulation(self, temb: Tensor) -> Tensor:
        """SiLU of the time embedding ``[B, D]`` -> ``[B, 2, 6, D]`` (patches, registers)."""
        return self.adaln(temb).unflatten(-1, (2, 6, -1))

    def forward(
        self, x: Tensor, mask: Tensor | None, modulation: Tensor, patches: int, last: bool = False
    ) -> Tensor:
        """Tokens ``[B, S, D]`` -> the same; the last block returns the patches ``[B, patches, D]``."""
        gate_msa, gate_mlp, shift_msa, scale_msa, shift_mlp, scale_mlp = modulation.unbind(2)
        groups = (patches, x.shape[1] - patches)
        h = modulate(norm(x), shift_msa, scale_msa, groups)
        rows = slice(None)
        if last:
            groups, rows = groups[:1], slice(patches)
        x = gate(x[:, rows], self.attn(h, mask, rows), gate_msa, groups)
        h = modulate(norm(x), shift_mlp, scale_mlp, groups)
        return gate(x, self.mlp(h), gate_mlp, groups)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, groups: Sequence[int]) -> Tensor:
    """``x (1 + scale) + shift``; group i of the tokens takes row i of ``[B, G, D]``."""
    scale = 1 + scale
    parts = enumerate(x.split(groups, dim=1))
    return torch.cat(
        [torch.addcmul(shift[:, i, None], part, scale[:, i, None]) for i, part in parts], dim=1
    )


def gate(x: Tensor, update: Tensor, gates: Tensor, groups: Sequence[int]) -> Tensor:
    """``x + gates * update``; group i of the tokens takes row i of ``[B, G, D]``."""
    parts = enumerate(zip(x.split(groups, dim=1), update.split(groups, dim=1), strict=True))
    return torch.cat([torch.addcmul(a, b, gates[:, i, None]) for i, (a, b) in parts], dim=1)


class PatchEmbed(nn.Module):
    """``[B, C, H, W]`` -> ``[B, patches, dim]``, patch vectors ordered (row, column, channel)."""

    def __init__(self, channels: int, patch_size: int, dim: int, positions: Tensor):
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(channels * patch_size**2, dim)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3)
        embedded = self.proj(patches)
        return (embedded + self.positions[:rows, :columns].to(embedded.dtype)).flatten(1, 2)


def unpatchify(x: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Patch vectors ``[B, rows * columns, p p C]`` in `PatchEmbed`'s order -> ``[B, C, H, W]``."""
    x = x.unflatten(1, (rows, columns)).unflatten(-1, (patch_size, patch_size, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Encoder(nn.Module):
    """Section 4 of the published layout: patches, causal registers, latents of the quantizer."""

    def __init__(
        self,
        channels: int,
        patch_size: int,
        grid: int,
        registers: int,
        dim: int,
        depth: int,
        head_dim: int,
        mlp_ratio: float,
        code_dim: int,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(channels, patch_size, dim, sincos_table(dim, grid))
        self.registers = nn.Parameter(torch.empty(registers, dim))
        nn.init.trunc_normal_(self.registers, std=0.02)
        self.blocks = nn.ModuleList(EncoderBlock(dim, head_dim, mlp_ratio) for _ in range(depth))
        self.proj = Linear(dim, code_dim)

    def forward(self, latents: Tensor, num_tokens: int) -> Tensor:
        """Latents ``[B, C, h, w]`` -> values of the first registers ``[B, num_tokens, code_dim]``.

        Registers are causal, so the first ones do not need the rest.
        """
        patches = self.patch_embed(latents)
        registers = self.registers[:num_tokens].expand(len(latents), -1, -1)
        x = torch.cat([patches, registers.to(patches.dtype)], dim=1)
        order = torch.arange(x.shape[1], device=x.device) - patches.shape[1] + 1
        order = order.clamp(min=0)  # 0 for every patch, then 1, 2, ...
        mask = order[None] <= order[:, None]
        for block in self.blocks[:-1]:
            x = block(x, mask)
        wanted = slice(patches.shape[1], None)
        return self.proj(norm(self.blocks[-1](x, mask[wanted], wanted)))


class TimeEmbed(nn.Module):
    def __init__(self, dim: int, max_timestep: float, max_period: float = 256.0):
        super().__init__()
        self.max_timestep = max_timestep
        self.max_period = max_period
        self.mlp = nn.Sequential(Linear(256, dim), nn.SiLU(), Linear(dim, dim))

    def features(self, t: Tensor) -> Tensor:
        """Times ``[B]`` in [0, 1] -> cosines then sines ``[B, 256]``."""
        exponents = torch.arange(128, dtype=torch.float32, device=t.device) / 128
        frequencies = 1000 / self.max_timestep * torch.exp(-math.log(self.max_period) * exponents)
        angles = t.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))


class FlowDecoder(nn.Module):
    """Velocity (noise - latents) of noised latents, given the register codes."""

    def __init__(
        self,
        channels: int,
        patch_size: int,
        grid: int,
        registers: int,
        dim: int,
        depth: int,
        head_dim: int,
        mlp_ratio: float,
        code_dim: int,
        max_timestep: float,
    ):
        super().__init__()
        self.num_registers = registers
        self.channels = channels
        self.from_codes = Linear(code_dim, dim)
        self.register_positions = nn.Parameter(torch.empty(registers, dim))
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.null_token = nn.Parameter(torch.empty(dim))
        for parameter in (self.register_positions, self.mask_token, self.null_token):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.patch_embed = PatchEmbed(channels, patch_size, dim, sincos_table(dim, grid))
        self.time_embed = TimeEmbed(dim, max_timestep)
        self.blocks = nn.ModuleList(DecoderBlock(dim, head_dim, mlp_ratio) for _ in range(depth))
        self.adaln = Linear(dim, 2 * dim)
        self.proj = Linear(dim, channels * patch_size**2)

    def condition(
        self, codes: Tensor, keep: Tensor | None = None, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Register tokens of a condition, with the masked ones merged into one.

        In the paper every register from ``keep`` on becomes the same mask token without a position,
        and an unconditional pass replaces all of them by the same null token. Identical tokens stay
        identical through every layer, so one of them with log(count) added to its attention logits
        is exact; the sequence shortens from all registers to ``k + 1``.

        Args:
            codes: ``[B, k, code_dim]``, k <= registers.
            keep: codes kept of each item, int64 ``[B]``; default all k.
            drop: items whose whole condition is dropped, bool ``[B]``.

        Returns:
            tokens ``[B, k + 1, D]`` and their attention bias ``[B, k + 1]``; where every register is
            kept ``[B, k, D]`` and None.
        """
        batch, k = codes.shape[:2]
        tokens = self.from_codes(codes)
        tokens = tokens + self.register_positions[:k].to(tokens.dtype)
        if k == self.num_registers and keep is None and drop is None:
            return tokens, None
        if keep is None:
            keep = torch.full((batch,), k, device=codes.device)
        if drop is None:
            drop = torch.zeros(batch, dtype=torch.bool, device=codes.device)
        kept = keep.masked_fill(drop, 0)
        rest = torch.where(drop[:, None], self.null_token, self.mask_token)
        hidden = torch.arange(k, device=codes.device) >= kept[:, None]
        bias = torch.zeros(batch, k, device=codes.device).masked_fill(hidden, -torch.inf)
        count = (self.num_registers - kept).float().log()
        return torch.cat([tokens, rest[:, None].to(tokens.dtype)], 1), torch.cat(
            [bias, count[:, None]], 1
        )

    def modulations(self, t: Tensor) -> list[Tensor]:
        """Times ``[T]`` -> adaLN of each block ``[T, 2, 6, D]``, then of the output ``[T, 1, 2, D]``.

        They depend on the time alone: a sampler computes them once for all of its steps.
        """
        temb = F.silu(self.time_embed(t))
        output = self.adaln(temb).unflatten(-1, (1, 2, -1))
        return [*(block.modulation(temb) for block in self.blocks), output]

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """Noised latents ``[B, C, h, w]``, times ``[B]`` (1 = noise), condition -> velocity."""
        return self.velocity(x, self.modulations(t), tokens, bias)

    def velocity(
        self, x: Tensor, modulations: Sequence[Tensor], tokens: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``forward`` with the modulations at hand, for each item or one time (T = 1) for all."""
        patch_size = self.patch_embed.patch_size
        rows, columns = x.shape[2] // patch_size, x.shape[3] // patch_size
        patches = rows * columns
        *blocks, output = modulations
        h = torch.cat([self.patch_embed(x), tokens], dim=1)
        mask = None if bias is None else F.pad(bias, (patches, 0))[:, None, None]
        for i, (block, modulation) in enumerate(zip(self.blocks, blocks, strict=True), start=1):
            h = block(h, mask, modulation, patches, last=i == len(blocks))
        shift, scale = output.unbind(2)
        h = self.proj(modulate(norm(h), shift, scale, (patches,)))
        return unpatchify(h, rows, columns, patch_size)


class FlexTok(Tokenizer, ModelMixin, ConfigMixin):
    """Picture <-> an ordered sequence of ids; any prefix of 1..num_tokens ids decodes.

    The defaults are the published d12-d12 tokenizer.

    Args:
        image_size: side of the square pictures in pixels.
        vae_config: configuration of the diffusers ``AutoencoderKL`` under the tokens; None works on pixels.
        vae_scaling_factor: multiplies VAE latents; None takes the VAE's own.
        latent_channels: channels of the latents (3 without a VAE).
        latent_size: side of the latent grid.
        max_grid: side of the position table in patches.
        num_inference_steps: default Euler steps of ``decode``.
        guidance_scale: default guidance of ``decode``; 1 needs no unconditional pass.
        normalized_guidance: adaptive projected guidance in place of plain guidance.
    """

    ordered = True
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "vae"
    ]  # As published, also where the rest runs in bfloat16.
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        vae_config: dict[str, Any] | None = None,
        vae_scaling_factor: float | None = None,
        latent_channels: int = 16,
        latent_size: int = 32,
        patch_size: int = 2,
        max_grid: int = 16,
        num_registers: int = 256,
        fsq_levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        max_timestep: float = 1000.0,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        normalized_guidance: bool = True,
    ):
        super().__init__()
        self.vae = None
        if vae_config is not None:
            self.vae = AutoencoderKL.from_config(dict(vae_config))
            fold_upsampling(self.vae.decoder)
        self.quantizer = FSQ(fsq_levels)
        shared = {
            "channels": latent_channels,
            "patch_size": patch_size,
            "grid": max_grid,
            "registers": num_registers,
            "head_dim": head_dim,
            "mlp_ratio": mlp_ratio,
            "code_dim": self.quantizer.dim,
        }
        self.encoder = Encoder(dim=encoder_dim, depth=encoder_depth, **shared)
        self.decoder = FlowDecoder(
            dim=decoder_dim, depth=decoder_depth, max_timestep=max_timestep, **shared
        )

    def init_weights(self) -> None:
        """Xavier-uniform linears; adaLN and the output start at zero (section 10 of the recipe)."""
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        outputs = [self.decoder.adaln, self.decoder.proj]
        for module in [*(block.adaln for block in self.decoder.blocks), *outputs]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def num_tokens(self) -> int:
        return self.config.num_registers

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def scaling_factor(self) -> float:
        factor = self.config.vae_scaling_factor
        return self.vae.config.scaling_factor if factor is None else factor

    @torch.no_grad()
    def encode_latents(
        self,
        images: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [-1, 1] -> scaled latents ``[B, C, h, w]``.

        The mean of the VAE's posterior, so that ids are reproducible; with a generator (one, or one
        an item) a sample of it, as the published pipeline draws (its ``sample_posterior``).
        """
        if self.vae is None:
            return images.to(self.dtype)
        images = images.to(self.vae.dtype, memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mode()
        if generator is not None:
            generator = list(generator) if isinstance(generator, Sequence) else generator
            latents = posterior.sample(generator)
        return (latents * self.scaling_factor).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents ``[B, C, h, w]`` -> pictures ``[B, 3, H, W]``."""
        if self.vae is None:
            return latents
        latents = latents / self.scaling_factor
        latents = latents.to(self.vae.dtype, memory_format=torch.channels_last)
        return self.vae.decode(latents).sample

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        num_tokens: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Pictures ``[B, 3, image_size, image_size]`` in [-1, 1] -> ids int64 ``[B, num_tokens]``.

        ``generator`` is that of ``encode_latents``.
        """
        self.check_images(images)
        return self.encode_from_latents(self.encode_latents(images, generator), num_tokens)

    @torch.no_grad()
    def encode_from_latents(self, latents: Tensor, num_tokens: int | None = None) -> Tensor:
        """Scaled latents ``[B, C, h, w]`` -> ids int64 ``[B, num_tokens]``."""
        return self.quantizer(self.encoder(latents, num_tokens or self.num_tokens))[1]

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        num_tokens: int,
        drop: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss with nested dropout (section 10).

        Args:
            latents, noise: ``[B, C, h, w]``.
            t: ``[B]`` in [0, 1], 1 = noise.
            num_tokens: registers kept of this batch; shared, so that the rest cost nothing.
            drop: bool ``[B]``, items trained without a condition.
            ids: ``[B, >= num_tokens]`` of a frozen encoder, in place of running it.
        """
        if ids is None:
            codes, ids = self.quantizer(self.encoder(latents, num_tokens))
        else:
            codes = self.quantizer.ids_to_codes(ids[:, :num_tokens])
        tokens, bias = self.decoder.condition(codes.to(latents.dtype), drop=drop)
        time = t[:, None, None, None]
        x = time * noise + (1 - time) * latents
        velocity = self.decoder(x, t, tokens, bias)
        error = (velocity.float() - (noise - latents).float()).square().mean((1, 2, 3))
        used = ids.unique().numel() / min(self.vocab_size, ids.numel())
        return error.mean(), {"flow": error.mean().detach(), "distinct_ids": torch.tensor(used)}

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor | Sequence[Tensor],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Ids -> pictures ``[B, 3, H, W]``, about [-1, 1].

        Args:
            tokens: int64 ``[B, k]``, 1 <= k <= num_tokens, or a list of ``[k_i]`` of mixed lengths.
            num_inference_steps: Euler steps.
            generator: one, or one an item (an item's noise then does not depend on the batch).
            noise: the initial latents ``[B, C, h, w]`` in place of a draw.
            callback: called with (step, steps) after each step; it may raise to stop.
        """
        latents = self.sample_latents(
            tokens, num_inference_steps, guidance_scale, generator, noise, callback
        )
        return self.decode_latents(latents)

    @torch.no_grad()
    def sample_latents(
        self,
        tokens: Tensor | Sequence[Tensor],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """The Euler sampler of ``decode``: scaled latents ``[B, C, h, w]``.

        ``guidance`` joins the two velocities; default as the configuration says.
        """
        steps = num_inference_steps or self.config.num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if steps < 1:
            raise InputError(f"The number of steps must be at least 1, got {steps}.")
        if isinstance(tokens, Tensor):
            keep = None
        else:
            keep = torch.tensor([len(row) for row in tokens], device=self.device)
            tokens = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
        self.check_tokens(tokens)
        codes = self.quantizer.ids_to_codes(tokens).to(self.dtype)
        condition, bias = self.decoder.condition(codes, keep)
        if noise is None:
            side = self.config.latent_size
            shape = (len(tokens), self.config.latent_channels, side, side)
            generator = list(generator) if isinstance(generator, Sequence) else generator
            noise = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        x = noise.float()  # Steps add up in float32, whatever the network runs in.
        if scale != 1:
            # The null condition is one token, so it runs as its own shorter batch.
            drop = torch.ones(len(x), dtype=torch.bool, device=x.device)
            null, null_bias = self.decoder.condition(codes[:, :0], drop=drop)
            if guidance is None:
                normalized = self.config.normalized_guidance
                guidance = NormalizedGuidance() if normalized else classifier_free_guidance
        times = torch.arange(steps, 0, -1, device=x.device) / steps
        of_steps = zip(*(part.split(1) for part in self.decoder.modulations(times)), strict=True)
        for step, modulations in enumerate(of_steps, start=1):
            now = x.to(self.dtype)
            velocity = self.decoder.velocity(now, modulations, condition, bias).float()
            if scale != 1:
                unconditional = self.decoder.velocity(now, modulations, null, null_bias).float()
                velocity = guidance(velocity, unconditional, scale)
            x = x - velocity / steps
            if callback is not None:
                callback(step, steps)
        return x
