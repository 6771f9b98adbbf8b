"""ARDiT: Autoregressive Diffusion Transformer for Text-to-Speech Synthesis (Liu et al., 2024).

Paper: arXiv 2406.05551. Neither code nor weights were published; what the paper leaves open is chosen here.

Sound is a sequence of continuous latents, written block by block. Every block is one flow-matching
problem whose velocity network is the whole transformer: it reads the text, the blocks before it and the
noisy block, which sees itself in full. Rotary positions tell how far the end is, so that a sound has
exactly the length that was asked for. A block in the middle is filled in after those around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ..cache import StaticCache
from ..conditioning.classes import check_labels
from ..layers.rope import Rope, rope_tables
from ..layers.rope_adaln import RopeAdaLNBlock, rms_norm
from ..layers.time import TimeEmbedding
from ..sampling import check_generators, check_given_latents, check_ids, draw, guide
from .samplers import evaluation_times, flow_times, hold, integrate, num_step_draws, shift_times


def block_mask(step: Tensor, noisy: Tensor, valid: Tensor) -> Tensor:
    """Who sees whom in a sequence of text, clean blocks and noisy blocks: bool ``[B, 1, T, T]``.

    Text sees text; a clean block sees text and clean blocks up to itself; a noisy block sees text, clean
    blocks before it, and itself. Everything sees itself.

    Args:
        step: of each token the number of its block in the order of writing, -1 for text, ``[T]``.
        noisy: bool ``[T]``.
        valid: bool ``[B, T]``, False for tokens that only they see: padding, and what is left out.
    """
    same, before = step[:, None] == step, step < step[:, None]
    seen = torch.where(noisy, same & noisy[:, None], before | (same & ~noisy[:, None]))
    alone = torch.eye(len(step), dtype=torch.bool, device=step.device)
    return ((seen & valid[:, None]) | alone)[:, None]


def writing_order(kept: Tensor, real: Tensor) -> tuple[Tensor, int]:
    """Blocks that are kept as a whole, then those to be written, then padding, each in order of time.

    Args:
        kept, real: of each latent whether it is given, and whether its item is so long; bool
            ``[B, blocks, block_size]``.

    Returns:
        the places of the blocks ``[B, blocks]``, and how many of them every item keeps.
    """
    padding = ~real.any(-1)
    whole = (kept | ~real).all(-1) & ~padding
    order = (1 - whole.long() + 2 * padding).argsort(dim=1, stable=True)
    return order, int(whole.sum(1).min())


class ARDiT(ModelMixin, ConfigMixin):
    """Text, a class (a kind of sound, a speaker), or nothing -> latents ``[B, N, latent_dim]``.

    Args:
        latent_dim: width of a latent.
        block_size: latents of a block.
        symbols: of the text, such as phones or characters; none for a model without text.
        classes: their names; none for a model without classes.
        dim, depth, heads, mlp_ratio: of the transformer.
        condition_dropout: how often text and class are left out in training, for guidance.
        context_dropout: how often the blocks before are.
        fill: how often a span in the middle is written last in training.
        latents_per_token: length of a sound for each id of its text, where no length is given.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 16,
        block_size: int = 4,
        symbols: Sequence[str] = (),
        classes: Sequence[str] = (),
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        condition_dropout: float = 0.1,
        context_dropout: float = 0.1,
        fill: float = 0.5,
        latents_per_token: float | None = None,
    ):
        super().__init__()
        if dim // heads % 4:
            raise InputError(f"Heads of {dim // heads} channels: they must be a multiple of 4.")
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_std", torch.ones(latent_dim))
        self.num_classes = len(classes)
        self.text_embedding = nn.Embedding(len(symbols) + 1, dim) if symbols else None
        self.class_embedding = nn.Embedding(self.num_classes + 1, dim) if classes else None
        self.time = TimeEmbedding(dim)
        self.input_proj = Linear(latent_dim, dim)
        self.roles = nn.Embedding(2, dim)  # Clean, noisy.
        hidden = int(dim * mlp_ratio * 2 / 3)
        self.blocks = nn.ModuleList(RopeAdaLNBlock(dim, heads, hidden) for _ in range(depth))
        self.output_adaln = Linear(dim, 2 * dim)
        self.output = Linear(dim, latent_dim)

    def init_weights(self) -> None:
        """Normal 0.02; zero for biases, for what modulates (adaLN-zero) and for the output."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaln" in name or name.startswith("output."):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation of latents ``[latent_dim]``: inside both are 0 and 1."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def encode_text(self, texts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Texts, as sequences of symbols -> ``text`` ids ``[B, I]`` and ``text_mask`` bool ``[B, I]``.

        Symbols that the model does not know are passed over.

        Raises:
            InputError: a text without any known symbol.
        """
        ids = {symbol: i for i, symbol in enumerate(self.config.symbols, start=1)}
        rows = [
            torch.tensor([ids[s] for s in text if s in ids], dtype=torch.int64) for text in texts
        ]
        for text, row in zip(texts, rows, strict=True):
            if not len(row):
                raise InputError(f"The model knows no symbol of {str(text)[:40]!r}: write another.")
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        return {"text": padded, "text_mask": padded > 0}

    def positions(self, places: Tensor, lengths: Tensor, text_mask: Tensor | None) -> Rope:
        """Rotary tables ``[B, T, head_dim / 2]`` of the text and of the latents at ``places``.

        Half of the channels turn with the place in the own stream, the other half with the progress:
        id i of I stands beside latent ``i N / I``.

        Args:
            places: of latents, ``[B, n]``.
            lengths: latents of each item N, ``[B]``.
            text_mask: bool ``[B, I]``.
        """
        axes = places[..., None].float().expand(-1, -1, 2)
        if text_mask is not None:
            index = torch.arange(text_mask.shape[1], device=places.device).float()
            progress = index * (lengths / text_mask.sum(1).clamp(min=1))[:, None]
            text = torch.stack([index.expand_as(progress), progress], dim=-1)
            axes = torch.cat([text, axes], dim=1)
        head_dim = self.config.dim // self.config.heads
        tables = rope_tables(axes.flatten(0, 1), head_dim)
        cos, sin = (table.unflatten(0, axes.shape[:2]) for table in tables)
        return cos, sin

    def conditions(self, times: Tensor, labels: Tensor | None) -> Tensor:
        """Times ``[B, n]`` (0 = clean) and labels ``[B]`` -> SiLU of what modulates, ``[B, n, dim]``."""
        condition = self.time(times)
        if labels is not None:
            condition = condition + self.class_embedding(labels)[:, None]
        return F.silu(condition)

    def embed(self, latents: Tensor, noisy: bool) -> Tensor:
        """Latents ``[B, n, latent_dim]`` -> ``[B, n, dim]``."""
        return self.input_proj(latents.to(self.dtype)) + self.roles.weight[int(noisy)]

    def read_out(self, x: Tensor, condition: Tensor) -> Tensor:
        """Hidden states ``[B, n, dim]`` of noisy latents -> their velocity, float32."""
        shift, scale = self.output_adaln(condition).chunk(2, dim=-1)
        return self.output(torch.addcmul(shift, rms_norm(x), 1 + scale)).float()

    def velocities(
        self,
        blocks: Tensor,
        noisy: Tensor,
        times: Tensor,
        order: Tensor,
        lengths: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_text: Tensor | None = None,
        use_context: Tensor | None = None,
    ) -> Tensor:
        """Velocities of all blocks in one pass over two copies of them, one clean and one noisy.

        Args:
            blocks, noisy: ``[B, M, block_size, latent_dim]`` in the order of writing.
            times: of the noisy blocks, ``[B, M]`` in 0 (clean) to 1.
            order: of each block its place in time, ``[B, M]``.
            lengths: latents of each item ``[B]``.
            text, text_mask: ids and bool ``[B, I]``.
            labels: ``[B]``, ``num_classes`` = none.
            use_text, use_context: bool ``[B]``, False where text, or the blocks before, are left out.
        """
        batch, count, size, _ = blocks.shape
        device = blocks.device
        inside = torch.arange(size, device=device)
        places = (order[..., None] * size + inside).flatten(1)
        real = places < lengths[:, None]
        clean = (count - 1) * size  # The last block is before none.
        context = real[:, :clean]
        if use_context is not None:
            context = context & use_context[:, None]
        x = [self.embed(blocks[:, :-1].flatten(1, 2), False), self.embed(noisy.flatten(1, 2), True)]
        valid = [context, real]
        steps = torch.arange(count, device=device).repeat_interleave(size)
        steps = [steps[:clean], steps]
        if text is not None:
            x.insert(0, self.text_embedding(text))
            valid.insert(0, text_mask if use_text is None else text_mask & use_text[:, None])
            steps.insert(0, torch.full((text.shape[1],), -1, device=device))
        step = torch.cat(steps)
        still = len(step) - count * size
        is_noisy = torch.arange(len(step), device=device) >= still
        mask = block_mask(step, is_noisy, torch.cat(valid, dim=1))
        rope = self.positions(torch.cat([places[:, :clean], places], dim=1), lengths, text_mask)
        moments = torch.cat([times.new_zeros(batch, 1), times], dim=1)
        condition = self.conditions(moments, labels)
        # Of each token the condition that it shares with its block; what is clean shares the first.
        which = torch.cat([step.new_zeros(still), steps[-1] + 1])
        x = torch.cat(x, dim=1)
        for block in self.blocks:
            x = block(x, block.adaln(condition)[:, which], rope, mask)
        return self.read_out(x[:, still:], condition[:, which[still:]]).unflatten(1, (count, size))

    def forward(
        self,
        latents: Tensor,
        lengths: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity; the time of every block is the sigmoid of a normal draw.

        Args:
            latents: ``[B, N, latent_dim]``.
            lengths: latents of each item ``[B]``; default: N.
            text, text_mask: ids and bool ``[B, I]`` of a model with text.
            labels: ``[B]`` of a model with classes.
            generator: of times, noise, and what is left out, on the model's device.
        """
        self.check_conditions(text, text_mask, labels)
        config, size = self.config, self.config.block_size
        batch, device = len(latents), latents.device
        random = {"generator": generator, "device": device}
        if lengths is None:
            lengths = torch.full((batch,), latents.shape[1], device=device)
        x0 = (latents - self.latent_mean) / self.latent_std
        x0 = F.pad(x0, (0, 0, 0, -x0.shape[1] % size)).unflatten(1, (-1, size))
        count = x0.shape[1]
        times = torch.randn(batch, count, **random).sigmoid()
        noise = torch.randn(x0.shape, **random)
        chances = torch.rand(5, batch, **random)
        order = torch.arange(count, device=device).repeat(batch, 1)
        use_text = use_context = None
        if self.training:
            use_text = chances[0] >= config.condition_dropout
            use_context = chances[1] >= config.context_dropout
            if labels is not None:
                labels = labels.masked_fill(~use_text, self.num_classes)
            # A span of an item's own blocks goes behind the others, padding behind all.
            blocks = (lengths[:, None] + size - 1) // size
            ends = (chances[2:4].T * (blocks + 1)).long().sort(1).values
            middle = (order >= ends[:, :1]) & (order < ends[:, 1:])
            middle &= (chances[4] < config.fill)[:, None]
            order = (middle.long() + 2 * (order >= blocks)).argsort(dim=1, stable=True)
        row = torch.arange(batch, device=device)[:, None]
        x0 = x0[row, order]
        x = torch.lerp(x0, noise, times[..., None, None])
        v = self.velocities(
            x0, x, times, order, lengths, text, text_mask, labels, use_text, use_context
        )
        error = (v - (noise - x0)).square().mean(-1)
        real = order[..., None] * size + torch.arange(size, device=device) < lengths[:, None, None]
        loss = error[real].mean()
        return loss, {
            "mse": loss.detach(),
            "mse_first_block": error[:, 0][real[:, 0]].mean().detach(),
        }

    def check_conditions(
        self, text: Tensor | None, text_mask: Tensor | None, labels: Tensor | None
    ) -> None:
        """Raise InputError unless there is text, and are labels, where the model takes them."""
        config = self.config
        for name, given, wanted in (
            ("text", text is not None and text_mask is not None, bool(config.symbols)),
            ("labels", labels is not None, bool(config.classes)),
        ):
            if given != wanted:
                raise InputError(f"This model takes {name if wanted else f'no {name}'}.")
        if text is not None:
            check_ids(text, len(config.symbols) + 1)
        if labels is not None:
            check_labels(labels, self.num_classes)

    def estimate_lengths(self, text_mask: Tensor) -> Tensor:
        """Latents ``[B]`` for texts of so many ids, at the pace of the training data.

        Raises:
            InputError: the model does not know its pace.
        """
        pace = self.config.latents_per_token
        if pace is None:
            raise InputError("This model cannot tell how long a sound is: give lengths.")
        return (text_mask.sum(1) * pace).round().long().clamp(min=1)

    @torch.no_grad()
    def stream(
        self,
        generators: Sequence[torch.Generator],
        lengths: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_steps: int = 16,
        guidance_scale: float = 2.0,
        sampler: str = "euler",
        time_shift: float = 1.0,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield latents float32 ``[B, N, latent_dim]`` after every block; what is to come is 0.

        Blocks are written in the order of time, after those that are kept.

        Args:
            generators: one an item.
            lengths: latents of each item, int64 ``[B]``; default: `estimate_lengths` of the text.
            text, text_mask: ids and bool ``[B, I]`` of a model with text.
            labels: ``[B]`` of a model with classes, ``num_classes`` = none.
            num_steps: for each block.
            guidance_scale: towards text and class; 1 runs no unconditional half.
            sampler: "euler", "heun", "midpoint" or "euler-maruyama".
            time_shift: above 1, more steps at high noise.
            tokens, token_mask: latents ``[B, N, latent_dim]``, N the greatest length, kept where the
                mask ``[B, N]`` is True: a prompt in front, or all but a part to be made anew.

        Raises:
            InputError: a condition, length or setting that means nothing.
        """
        config, device, batch = self.config, self.device, len(generators)
        size, width = config.block_size, config.latent_dim
        self.check_conditions(text, text_mask, labels)
        for given in (text, labels, lengths):
            if given is not None:
                check_generators(generators, len(given))
        times = shift_times(flow_times(sampler, num_steps), time_shift)
        conditional = bool(config.symbols or config.classes)
        if not guidance_scale >= 1:
            raise InputError(f"The guidance scale must be 1 (off) or more, got {guidance_scale}.")
        if lengths is None:
            if text_mask is None:
                raise InputError("Give lengths: the number of latents of each sound.")
            lengths = self.estimate_lengths(text_mask)
        if int(lengths.min()) < 1:
            raise InputError(f"A sound has 1 latent or more, got lengths {lengths.tolist()}.")
        longest = int(lengths.max())
        check_given_latents(tokens, token_mask, (batch, longest, width))
        count = -(-longest // size)

        place = torch.arange(count * size, device=device)
        real = (place < lengths[:, None]).unflatten(1, (count, size))
        canvas = torch.zeros(batch, count * size, width, device=device)
        kept = torch.zeros(batch, count, size, dtype=torch.bool, device=device)
        if tokens is not None:
            extra = count * size - longest
            canvas = F.pad((tokens.float() - self.latent_mean) / self.latent_std, (0, 0, 0, extra))
            kept = F.pad(token_mask, (0, extra)).unflatten(1, (count, size))
            canvas = canvas.masked_fill(~kept.flatten(1)[..., None], 0.0)
        canvas = canvas.unflatten(1, (count, size))
        order, first = writing_order(kept, real)
        item = torch.arange(batch, device=device)

        # Each item draws for its blocks in the order of time, whatever is kept.
        draws = 1 + num_step_draws(sampler, times)
        noise = torch.stack(
            [draw("normal", (draws, size, width), generators, device) for _ in range(count)], dim=1
        )
        guided = conditional and guidance_scale > 1
        rows = item.repeat(2) if guided else item
        use = torch.arange(len(rows), device=device) < batch
        if labels is not None:
            labels = labels[rows].masked_fill(~use, self.num_classes)
        moments = [*evaluation_times(sampler, times), 0.0]
        condition = self.conditions(
            torch.tensor(moments, device=device).expand(len(rows), -1), labels
        )
        modulations = [block.adaln(condition) for block in self.blocks]
        index = {t: i for i, t in enumerate(moments)}

        text_length = 0 if text is None else text.shape[1]
        places = (order[..., None] * size + place[:size]).flatten(1)
        cos, sin = self.positions(places, lengths, text_mask)
        cos, sin = cos[rows], sin[rows]
        valid = (places < lengths[:, None])[rows]
        if text is not None:
            valid = torch.cat([text_mask[rows] & use[:, None], valid], dim=1)
        step = torch.arange(count, device=device).repeat_interleave(size)
        step = torch.cat([step.new_full((text_length,), -1), step])
        weight = self.output.weight
        cache = StaticCache(
            config.depth,
            len(rows),
            config.heads,
            text_length + count * size,
            config.dim // config.heads,
            weight.dtype,
            weight.device,
        )

        def run(x: Tensor, t: float, start: int) -> Tensor:
            """Embedded tokens ``[rows, n, dim]`` at ``start`` of the sequence, through all blocks."""
            end = start + x.shape[1]
            here = slice(start, end)
            # The rows of `block_mask` of these tokens, which are clean or, as yet, the last ones.
            seen = (step[:end] <= step[here, None]) & valid[:, None, :end]
            token = torch.arange(end, device=device)
            alone = token[here, None] == token
            mask = (seen | alone)[:, None]
            rope = cos[:, here], sin[:, here]
            for layer, block in enumerate(self.blocks):
                modulation = modulations[layer][:, index[t], None]
                x = block(x, modulation, rope, mask, cache, layer, start)
            return x

        known = [] if text is None else [self.text_embedding(text[rows])]
        if first:
            blocks = canvas[item[:, None], order[:, :first]].flatten(1, 2)
            known.append(self.embed(blocks[rows], False))
        if known:
            run(torch.cat(known, dim=1), 0.0, 0)
        for k in range(first, count):
            start = text_length + k * size
            at = order[:, k]
            target, held = canvas[item, at], kept[item, at][..., None]

            def velocity(
                x: Tensor,
                t: float,
                start: int = start,
                goal: Tensor = target,
                held: Tensor = held,
            ) -> Tensor:
                hidden = run(self.embed(x[rows], True), t, start)
                v = self.read_out(hidden, condition[:, index[t], None])
                if guided:
                    v = guide(*v.chunk(2), guidance_scale)
                return hold(v, x, t, goal, held) if tokens is not None else v

            own = noise[item, at].transpose(0, 1)
            for state in integrate(sampler, velocity, own[0], times, own[1:]):
                x = state
            canvas[item, at] = torch.where(held, target, x) * real[item, at][..., None]
            if k + 1 < count:
                # The block's keys and values once more, now clean.
                run(self.embed(canvas[item, at][rows], False), 0.0, start)
            made = real & (kept | (order.argsort(dim=1) <= k)[..., None])
            yield self._latents(canvas, made)[:, :longest]
        if first == count:
            yield self._latents(canvas, real)[:, :longest]

    def _latents(self, canvas: Tensor, made: Tensor) -> Tensor:
        latents = canvas * self.latent_std + self.latent_mean
        return (latents * made[..., None]).flatten(1, 2)

    @torch.no_grad()
    def generate(self, generators: Sequence[torch.Generator], **settings) -> Tensor:
        """The last of `stream`: latents float32 ``[B, N, latent_dim]``, 0 behind an item's length."""
        for latents in self.stream(generators, **settings):
            last = latents
        return last
