"""xAR: Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation (Ren et al., 2025).

Paper: arXiv 2502.20388. Code and weights: no licence given. Published checkpoints (OliverRen/xAR): xAR-B,
xAR-L, xAR-H, over the latents of `KL16VAE`.

A picture is written cell by cell (8x8 tokens each). Every cell is one flow-matching problem: the whole
transformer is its velocity network, which reads the cells before, and the noisy cell. In training each
cell has noise of its own level (noisy context learning); in sampling the cells before are clean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..base import ImageGenerator
from ..conditioning.classes import check_labels, embed_labels, null_labels
from ..flow.samplers import (
    evaluation_times,
    flow_times,
    hold,
    integrate,
    num_step_draws,
    shift_times,
)
from ..layers.rope import rope_tables
from ..layers.rope_adaln import RopeAdaLNTransformer, init_weights
from ..layers.time import TimeEmbedding
from ..orders import cell_order
from ..sampling import check_generators, check_given_latents, draw, guide
from ..schedules import check_guidance, guidance_weight


class XAR(ImageGenerator, ModelMixin, ConfigMixin):
    """Class label -> continuous tokens ``[B, num_tokens, latent_dim]``. The defaults are xAR-B.

    Args:
        latent_dim: width of a token.
        grid_size, cell_size: tokens along the picture and along a cell, which divides it.
        dropout, label_dropout: in training.
        guidance_scale, num_steps: of sampling, unless `stream` is told others.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 16,
        grid_size: int = 16,
        cell_size: int = 8,
        num_classes: int = 1000,
        dim: int = 768,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        guidance_scale: float = 2.7,
        num_steps: int = 40,
    ):
        super().__init__()
        if grid_size % cell_size:
            raise InputError(f"Cells of {cell_size} tokens do not divide a side of {grid_size}.")
        order = cell_order(grid_size, cell_size)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("raster", order.argsort(), persistent=False)
        places = torch.stack([order // grid_size, order % grid_size], dim=1)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.time = TimeEmbedding(dim)
        self.input_proj = Linear(latent_dim, dim)
        hidden = int(dim * mlp_ratio * 2 / 3)
        self.transformer = RopeAdaLNTransformer(
            dim,
            encoder_depth,
            decoder_depth,
            heads,
            hidden,
            rope_tables(places, dim // heads),
            dropout,
        )
        self.output = Linear(dim, latent_dim)

    @property
    def num_tokens(self) -> int:
        return self.config.grid_size**2

    @property
    def cell_tokens(self) -> int:
        return self.config.cell_size**2

    def num_yields(self, num_tokens: int | None = None, num_steps: int | None = None) -> int:
        steps = self.config.num_steps if num_steps is None else num_steps
        return steps * (self.num_tokens // self.cell_tokens)

    def init_weights(self) -> None:
        """Xavier for matrices, normal 0.02 for tables and time, zero for biases."""
        init_weights(self)

    def cells(self, latents: Tensor) -> Tensor:
        """Tokens in raster order ``[B, num_tokens, C]`` -> ``[B, cells, cell_tokens, C]``."""
        return latents[:, self.order].unflatten(1, (-1, self.cell_tokens))

    def latents(self, cells: Tensor) -> Tensor:
        """The inverse of `cells`."""
        return cells.flatten(1, 2)[:, self.raster]

    def velocity(self, cells: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Velocities of all cells at once; each sees itself and those before it.

        Args:
            cells: noisy ``[B, cells, cell_tokens, C]``.
            times: of each cell, ``[B, cells]`` in 0 to 1.
            labels: ``[B]``, ``num_classes`` = null.

        Returns:
            float32, of the cells' shape.
        """
        condition = embed_labels(self.class_embedding.weight, labels)[:, None] + self.time(times)
        modulations = self.transformer.modulations(condition[:, :, None])
        cell = torch.arange(self.num_tokens, device=cells.device) // self.cell_tokens
        x = self.input_proj(cells.to(self.dtype))
        x = self.transformer(x, modulations, mask=cell[:, None] >= cell)
        return self.output(x).float()

    def forward(
        self, latents: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity; the time of every cell is the sigmoid of a normal draw.

        Args:
            latents: tokens ``[B, num_tokens, latent_dim]`` of the tokenizer.
            labels: classes ``[B]``; in training some are dropped.
            generator: of times, noise and dropped labels, on the model's device.
        """
        labels = self.drop_labels(labels, generator)
        random = {"generator": generator, "device": latents.device}
        x0 = self.cells(latents)
        times = torch.randn(x0.shape[:2], **random).sigmoid()
        noise = torch.randn(x0.shape, **random)
        x = torch.lerp(x0, noise, times[..., None, None])
        each = (self.velocity(x, times, labels) - (noise - x0)).square().mean((0, 2, 3))
        return each.mean(), {
            "mse": each.mean().detach(),
            "mse_first_cell": each[0].detach(),
            "mse_last_cell": each[-1].detach(),
        }

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "linear",
        sampler: str = "euler-maruyama",
        time_shift: float = 1.0,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield tokens float32 ``[B, num_tokens, latent_dim]`` after every step of every cell.

        The present cell is noisy until its last step; cells to come are 0.

        Args:
            labels: classes ``[B]``.
            generators: one an item.
            num_steps: for each cell.
            guidance_scale: at the last cell, 1 or more; 1 runs no unconditional half.
            guidance_schedule: over the cells. The published "linear" begins with 1, so that the first
                cell needs no unconditional half.
            sampler: "euler-maruyama" (the published one), "euler", "heun" or "midpoint".
            time_shift: above 1, more steps at high noise.
            tokens, token_mask: ``[B, num_tokens, latent_dim]`` kept where the mask
                ``[B, num_tokens]`` is True.
            noise: of each cell its normal draws ``[1 + draws a cell, B, cell_tokens, latent_dim]``,
                the start first, in place of the generators'.

        Raises:
            InputError: a label, token or setting that means nothing.
        """
        config = self.config
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        steps = config.num_steps if num_steps is None else num_steps
        batch, device = len(labels), labels.device
        times = shift_times(flow_times(sampler, steps), time_shift)
        check_labels(labels, config.num_classes)
        check_generators(generators, batch)
        check_given_latents(tokens, token_mask, (batch, self.num_tokens, config.latent_dim))
        check_guidance(scale, guidance_schedule, least=1)

        # What depends on class and time alone, for all cells and steps at once; one null class serves
        # all unconditional rows. Time 0 is that of clean cells.
        moments = [*evaluation_times(sampler, times), 0.0]
        index = {t: i for i, t in enumerate(moments)}
        rows = torch.arange(batch, device=device)
        if scale != 1:
            labels = torch.cat([labels, null_labels(labels, config.num_classes, count=1)])
            rows = torch.cat([rows, rows.new_full((batch,), batch)])
        condition = self.time(torch.tensor(moments, device=device))
        condition = embed_labels(self.class_embedding.weight, labels)[:, None] + condition
        modulations = self.transformer.modulations(condition)

        size, count = self.cell_tokens, self.num_tokens // self.cell_tokens
        cells = torch.zeros(batch, count, size, config.latent_dim, device=device)
        if tokens is not None:
            given, kept = self.cells(tokens), self.cells(token_mask[..., None])
        cache = self.transformer.new_cache(len(rows))

        def run(x: Tensor, t: float, cell: int, wanted: Tensor) -> Tensor:
            """Tokens ``[B, size, C]`` of a cell -> outputs of the wanted rows."""
            x = self.input_proj(x.to(condition.dtype)).repeat(len(wanted) // batch, 1, 1)
            here = [m[wanted, index[t], None] for m in modulations]
            store = cache if len(wanted) == len(rows) else None
            return self.transformer(x, here, cache=store, position=cell * size)

        def velocity(x: Tensor, t: float, cell: int, weight: float) -> Tensor:
            # The first cell sees no other: where it is not guided, neither null rows nor a cache.
            wanted = rows[:batch] if cell == 0 and weight == 1 else rows
            v = self.output(run(x, t, cell, wanted)).float()
            if len(wanted) > batch:
                v = guide(*v.chunk(2), weight)
            return v if tokens is None else hold(v, x, t, given[:, cell], kept[:, cell])

        for cell in range(count):
            if cell:
                # The keys and values of the cell before once more, now clean.
                run(cells[:, cell - 1], 0.0, cell - 1, rows)
            weight = guidance_weight(guidance_schedule, scale, cell / max(count - 1, 1))
            if noise is None:
                shape = (1 + num_step_draws(sampler, times), size, config.latent_dim)
                draws = draw("normal", shape, generators, device).transpose(0, 1)
            else:
                draws = noise[cell]
            here = partial(velocity, cell=cell, weight=weight)
            # The published sampler keeps its state in float64.
            for x in integrate(sampler, here, draws[0].double(), times, draws[1:]):
                if tokens is not None:
                    x = torch.where(kept[:, cell], given[:, cell], x)
                cells[:, cell] = x
                yield self.latents(cells)

    @torch.no_grad()
    def generate(self, labels: Tensor, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """The last of `stream`: tokens float32 ``[B, num_tokens, latent_dim]``."""
        for latents in self.stream(labels, generators, **settings):
            last = latents
        return last
