"""SaShiMi: It's Raw! Audio Generation with State-Space Models (Goel, Gu, Donahue and Re, ICML 2022).

Paper: arXiv 2202.09729. Code: Apache-2.0. Published checkpoints (krandiash/sashimi-release):
checkpoints/sashimi_youtubemix.pt, checkpoints/sashimi_sc09.pt.

Sound sample by sample: every sample is one of 256 ids, predicted from all before it. S4 layers work at
three rates, a pool of 4 samples apart. In training a sequence is one pass of long convolutions; in
sampling every layer is a recurrence, and the middle one moves at every 16th sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ...tokenizers.audio.sample_quantizer import SampleQuantizer
from ..conditioning.classes import check_labels, drop_labels
from ..layers.mlp import MLP
from ..layers.s4 import S4, S4State
from ..sampling import check_generators, check_sampling, guide, sample


class Residual(nn.Module):
    """``x + layer(norm(x))``, the layer an `S4` or an `MLP`."""

    def __init__(self, dim: int, layer: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layer = layer

    def forward(self, x: Tensor, states: list[S4State | None] | None = None) -> Tensor:
        """``[B, L, H]`` -> the same shape; the state after the last sample is appended to ``states``."""
        h, state = self.norm(x), None
        if states is not None and isinstance(self.layer, S4):
            y, state = self.layer(h, return_state=True)
        else:
            y = self.layer(h)
        if states is not None:
            states.append(state)
        return x + y

    def step(self, x: Tensor, state: S4State | None) -> tuple[Tensor, S4State | None]:
        """``[B, H]`` -> the same shape, and the state after it."""
        if state is None:
            return x + self.layer(self.norm(x)), None
        y, state = self.layer.step(self.norm(x), state)
        return x + y, state


class Tier(nn.Module):
    """The layers at one rate, and the pools between it and the next slower one.

    Args:
        pool: samples of this rate in one of the next.
        before: layers in front of the pool too (``unet``).
    """

    def __init__(
        self, layers: nn.ModuleList, before: nn.ModuleList, dim: int, pool: int, wide: int
    ):
        super().__init__()
        self.pool = pool
        self.before = before
        self.down = Linear(dim * pool, wide)
        self.up = Linear(wide, dim * pool)
        self.layers = layers

    def fold(self, x: Tensor) -> Tensor:
        """``[B, L, H]`` -> ``[B, L / pool, H pool]``, the channels slower than the samples."""
        return x.unflatten(1, (-1, self.pool)).transpose(2, 3).flatten(2)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        return x.unflatten(2, (-1, self.pool)).transpose(2, 3).flatten(1, 2)


@dataclass
class BackboneState:
    """Between two samples.

    Attributes:
        layers: of each tier, the middle last, the states of its layers.
        gathered: of each tier the samples ``[B, pool, H]`` that wait for the pool to fill.
        ready: of each tier what the slower one has sent ``[B, pool, H]``, one a sample.
        count: samples so far.
    """

    layers: list[list[S4State | None]]
    gathered: list[Tensor]
    ready: list[Tensor]
    count: int


class SaShiMiBackbone(nn.Module):
    """``[B, L, dim]`` -> ``[B, L, dim]``, L a multiple of all pools together.

    Args:
        dim: width at the rate of samples.
        depth: S4 layers at every rate, each with an MLP.
        pool: of every pool its samples.
        expand: the width grows by it at every pool.
        mlp_ratio: hidden width of an MLP over its width.
        d_state, mode, bidirectional: of `S4`.
        unet: layers on the way down too, and a skip connection for each; not causal models.
    """

    def __init__(
        self,
        dim: int = 64,
        depth: int = 8,
        pool: Sequence[int] = (4, 4),
        expand: int = 2,
        mlp_ratio: int = 2,
        d_state: int = 64,
        mode: str = "diagonal",
        bidirectional: bool = False,
        unet: bool = False,
    ):
        super().__init__()

        def layers(width: int, count: int = depth) -> nn.ModuleList:
            made = nn.ModuleList()
            for _ in range(count):
                made.append(Residual(width, S4(width, d_state, mode, bidirectional)))
                made.append(Residual(width, MLP(width, mlp_ratio * width)))
            return made

        self.unet = unet
        self.tiers = nn.ModuleList()
        for k, size in enumerate(pool):
            width = dim * expand**k
            before = layers(width, depth if unet else 0)
            self.tiers.append(Tier(layers(width), before, width, size, width * expand))
        self.middle = layers(dim * expand ** len(pool))
        self.norm = nn.LayerNorm(dim)
        self.stride = math.prod(pool)

    def forward(
        self, x: Tensor, return_state: bool = False
    ) -> Tensor | tuple[Tensor, BackboneState]:
        """All samples at once, and, where asked for, the state after the last one.

        Raises:
            InputError: a length that the pools do not divide.
        """
        if x.shape[1] % self.stride:
            raise InputError(
                f"The length must be a multiple of {self.stride}, got {x.shape[1]}: pad it."
            )
        state = BackboneState([[] for _ in range(len(self.tiers) + 1)], [], [], x.shape[1])
        y = self.norm(self._run(x, 0, state if return_state else None))
        return (y, state) if return_state else y

    def _run(self, x: Tensor, k: int, state: BackboneState | None) -> Tensor:
        """From tier k on to the middle and back."""
        states = None if state is None else state.layers[k]
        if k == len(self.tiers):
            y = x
            for layer in self.middle:
                y = layer(y, states)
            return x + y
        tier = self.tiers[k]
        skips = [x]
        for layer in tier.before:
            skips.append(layer(skips[-1]))
        slow = tier.up(self._run(tier.down(tier.fold(skips[-1])), k + 1, state))
        if state is not None:
            state.gathered.insert(0, torch.zeros_like(x[:, : tier.pool]))
            state.ready.insert(0, tier.unfold(slow[:, -1:]))
        # A slower step covers samples that are not there yet: what it says is for the next ones.
        slow = tier.unfold(F.pad(slow, (0, 0, 1, 0))[:, :-1])
        y = start = slow + skips.pop()
        for layer in tier.layers:
            y = layer(y, states)
            if self.unet:
                y = y + skips.pop()
        return y if self.unet else y + start

    def init_state(self, batch: int) -> BackboneState:
        """Before the first sample.

        Raises:
            InputError: the backbone is no causal one.
        """
        if self.unet:
            raise InputError("A U-Net sees the whole sequence and takes no steps.")
        stacks = [*(tier.layers for tier in self.tiers), self.middle]
        states = [
            [
                layer.layer.init_state(batch) if isinstance(layer.layer, S4) else None
                for layer in stack
            ]
            for stack in stacks
        ]
        weight = self.norm.weight
        shapes = [(batch, tier.pool, tier.up.out_features // tier.pool) for tier in self.tiers]
        gathered, ready = ([weight.new_zeros(shape) for shape in shapes] for _ in range(2))
        return BackboneState(states, gathered, ready, 0)

    def step(self, x: Tensor, state: BackboneState) -> Tensor:
        """The next sample ``[B, dim]`` -> ``[B, dim]``; the state is changed in place."""
        y = self._step(x, 0, state.count, state)
        state.count += 1
        return self.norm(y)

    def _step(self, x: Tensor, k: int, count: int, state: BackboneState) -> Tensor:
        if k == len(self.tiers):
            return x + self._step_layers(self.middle, x, state.layers[k])
        tier = self.tiers[k]
        slot = count % tier.pool
        state.gathered[k][:, slot] = x
        x = x + state.ready[k][:, slot]
        y = x + self._step_layers(tier.layers, x, state.layers[k])
        if slot + 1 == tier.pool:
            slow = tier.down(tier.fold(state.gathered[k]))[:, 0]
            slow = self._step(slow, k + 1, count // tier.pool, state)
            state.ready[k] = tier.unfold(tier.up(slow)[:, None])
        return y

    @staticmethod
    def _step_layers(layers: nn.ModuleList, x: Tensor, states: list[S4State | None]) -> Tensor:
        for i, layer in enumerate(layers):
            x, states[i] = layer.step(x, states[i])
        return x


class SaShiMi(ModelMixin, ConfigMixin):
    """Ids of samples ``[B, 1, L]``, of a class where there are classes.

    The defaults are the published size with the simpler S4D layers; the checkpoints have mode "dplr".

    Args:
        classes: their names; none for a model without classes.
        label_dropout: in training, for guidance.
        sample_rate: in Hz.
        bits, quantization: of `SampleQuantizer`.
        dim, depth, pool, expand, mlp_ratio, d_state, mode: of `SaShiMiBackbone`.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        classes: Sequence[str] = (),
        label_dropout: float = 0.1,
        sample_rate: int = 16000,
        bits: int = 8,
        quantization: str = "mu-law",
        dim: int = 64,
        depth: int = 8,
        pool: Sequence[int] = (4, 4),
        expand: int = 2,
        mlp_ratio: int = 2,
        d_state: int = 64,
        mode: str = "diagonal",
    ):
        super().__init__()
        self.quantizer = SampleQuantizer(sample_rate, bits, quantization)
        self.embedding = nn.Embedding(self.vocab_size, dim)
        self.num_classes = len(classes)
        self.class_embedding = nn.Embedding(self.num_classes + 1, dim) if classes else None
        self.backbone = SaShiMiBackbone(dim, depth, tuple(pool), expand, mlp_ratio, d_state, mode)
        self.head = Linear(dim, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    def embed(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        """Ids ``[B, L]`` -> ``[B, L, dim]``, the class added to each."""
        x = self.embedding(ids)
        return x if labels is None else x + self.class_embedding(labels)[:, None]

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise InputError unless there are labels exactly where the model has classes."""
        classes = self.num_classes
        if (labels is None) != (classes == 0):
            wanted = f"labels of 0 to {classes - 1}" if classes else "no labels"
            raise InputError(f"This model takes {wanted}.")
        if labels is not None:
            check_labels(labels, classes)

    def logits(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Ids ``[B, 1, L]`` -> logits ``[B, L, vocab_size]``, those at t from the ids before t."""
        self.check_labels(labels)
        length = tokens.shape[-1]
        silence = self.vocab_size // 2
        ids = F.pad(tokens[:, 0, :-1], (1, -length % self.backbone.stride), value=silence)
        return self.head(self.backbone(self.embed(ids, labels)))[:, :length]

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the samples.

        Args:
            tokens: ids ``[B, 1, L]`` of the quantizer.
            labels: classes ``[B]``; in training some are dropped.
            mask: bool ``[B, L]``, False where an item has ended.
            generator: of dropped labels, on the model's device.
        """
        if self.training and labels is not None:
            labels = drop_labels(labels, self.num_classes, self.config.label_dropout, generator)
        logits = self.logits(tokens, labels).float()
        each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 0], reduction="none")
        loss = each.mean() if mask is None else each[mask].mean()
        return loss, {"bits_per_sample": loss.detach() / math.log(2)}

    @torch.no_grad()
    def stream(
        self,
        generators: Sequence[torch.Generator],
        num_samples: int,
        labels: Tensor | None = None,
        prefix: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        piece: int = 1600,
    ) -> Iterator[Tensor]:
        """Yield new ids int64 ``[B, 1, piece]`` as they are drawn; the last piece may be shorter.

        Args:
            generators: one an item.
            num_samples: new samples.
            labels: classes ``[B]`` where the model has classes, ``num_classes`` = none.
            prefix: ids ``[B, 1, n]`` to go on from; they are not yielded.
            temperature, top_k, top_p: see `sampling.probabilities`.
            guidance_scale: towards the class; 1 runs no second half.

        Raises:
            InputError: a label, prefix or setting that means nothing.
        """
        batch = len(generators)
        self.check_labels(labels)
        check_sampling(temperature, top_k, top_p)
        if labels is not None:
            check_generators(generators, len(labels))
        if num_samples < 1 or piece < 1:
            raise InputError(f"Make 1 sample or more, got {num_samples} in pieces of {piece}.")
        if not guidance_scale >= 1 or (guidance_scale > 1 and labels is None):
            raise InputError(
                f"The guidance scale must be 1 (off) or, with labels, more; got {guidance_scale}."
            )
        ids = torch.full((batch, 1), self.vocab_size // 2, device=self.device)
        if prefix is not None:
            if len(prefix) != batch:
                raise InputError(f"Give {batch} prefixes, one an item, got {len(prefix)}.")
            self.quantizer.check_tokens(prefix)
            ids = torch.cat([ids, prefix[:, 0]], dim=1)
        rows = batch
        if guidance_scale > 1:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
            rows = 2 * batch
        label = None if labels is None else self.class_embedding(labels)

        # All but the last few of the known ids in one pass; the rest step by step.
        known = (ids.shape[1] - 1) // self.backbone.stride * self.backbone.stride
        state = self.backbone.init_state(rows)
        if known:
            x = self.embed(ids[:, :known].repeat(rows // batch, 1), labels)
            _, state = self.backbone(x, return_state=True)

        def step(new: Tensor) -> Tensor:
            x = self.embedding(new).repeat(rows // batch, 1)
            return self.backbone.step(x if label is None else x + label, state)

        for position in range(known, ids.shape[1] - 1):
            step(ids[:, position])
        new, made = ids[:, -1], []
        for position in range(num_samples):
            logits = self.head(step(new))
            if rows > batch:
                logits = guide(*logits.chunk(2), guidance_scale)
            new = sample(logits, temperature, top_k, top_p, generators)
            made.append(new)
            if len(made) == piece or position + 1 == num_samples:
                yield torch.stack(made, dim=1)[:, None]
                made = []

    @torch.no_grad()
    def generate(
        self, generators: Sequence[torch.Generator], num_samples: int, **settings
    ) -> Tensor:
        """All of `stream`: ids int64 ``[B, 1, num_samples]``; ``quantizer.decode`` makes them sound."""
        return torch.cat(list(self.stream(generators, num_samples, **settings)), dim=-1)
