"""Phenaki: Variable Length Video Generation From Open Domain Textual Descriptions (Villegas et al.,
ICLR 2023).

Paper: arXiv 2210.02399. Neither code nor weights were published; the layers are those of an open reading
(lucidrains/phenaki-pytorch, MIT), whose temporal positions are corrected here.

A bidirectional transformer over the ids of C-ViViT, some of them hidden, beside a text. A story is a
list of texts: each scene is written after the last frames of the one before, encoded anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ...tokenizers.video.phenaki import CViViT, PositionBias, Transformer
from ..conditioning.text import check_text
from ..sampling import check_generators, check_ids, check_sampling, draw, guide, gumbel
from ..schedules import check_guidance, check_steps, mask_ratio

Grid = tuple[int, int, int]


def hidden_count(length: int, progress: float) -> int:
    """How many of ``length`` ids are hidden at a step, by the cosine schedule; at least one."""
    return max(1, round(length * mask_ratio("cosine", progress)))


class Phenaki(ModelMixin, ConfigMixin):
    """Text -> ids ``[B, t h w]`` of a clip.

    Args:
        vocab_size: ids of the tokenizer; the next one hides a token.
        max_tokens: places; no clip (or scene with the frames that it continues) is longer.
        text_dim: width of the text's features (T5 in the paper).
        text_dropout: share of the items whose text is hidden in training.
        gradient_shrink: of the embeddings in the backward pass.
        num_steps, guidance_scale, temperature: of sampling, unless `stream` is told others.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8192,
        max_tokens: int = 1536,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        text_dim: int = 768,
        text_dropout: float = 0.1,
        gradient_shrink: float = 0.1,
        num_steps: int = 18,
        guidance_scale: float = 3.0,
        temperature: float = 0.9,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + 1, dim)
        self.positions = nn.Parameter(torch.empty(max_tokens, dim))
        nn.init.normal_(self.positions)
        self.position_bias = PositionBias(3, head_dim, heads)
        self.transformer = Transformer(dim, depth, heads, head_dim, "all", text_dim)
        self.head = Linear(dim, vocab_size)

    def condition(self, text_features: Tensor, text_mask: Tensor) -> tuple[list, Tensor]:
        """What all passes over the same texts share: keys and values, and which of them are seen.

        Args:
            text_features: ``[B, L, text_dim]``.
            text_mask: bool ``[B, L]``; a row without any True is the unconditional text.
        """
        check_text(text_features, text_mask, self.config.text_dim)
        contexts = self.transformer.keys_values(text_features.to(self.dtype))
        nulls = contexts[0][0].shape[2] - text_mask.shape[1]
        return contexts, F.pad(text_mask, (nulls, 0), value=True)[:, None, None]

    def logits(
        self,
        ids: Tensor,
        grid: Grid,
        condition: tuple[list, Tensor],
        bias: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Ids ``[B, t h w]`` (``vocab_size`` hides one) -> ``[B, t h w, V]``.

        Args:
            bias: ``position_bias(*grid)``, where it was made before.
            valid: bool ``[B, t h w]``: ids that are no padding.
        """
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        shrink = self.config.gradient_shrink
        x = (x * shrink + x.detach() * (1 - shrink)).unflatten(1, grid)
        bias = self.position_bias(*grid) if bias is None else bias
        if valid is not None:
            bias = bias.masked_fill(~valid[:, None, None], -torch.inf)
            valid = valid.unflatten(1, grid)[..., None]
        x = self.transformer(x, bias, *condition, valid=valid)
        return self.head(x.flatten(1, 3))

    def forward(
        self,
        tokens: Tensor,
        grid: Grid,
        text_features: Tensor,
        text_mask: Tensor,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of hidden ids: of each item a share ``cos(pi / 2 r / steps)``, r of 0 .. steps - 1.

        Args:
            tokens: ids ``[B, t h w]`` of clips, or of pictures (t = 1).
            grid: (t, h, w).
            text_features, text_mask: ``[B, L, text_dim]``, bool ``[B, L]``.
            lengths: int ``[B]``: ids of each item that are no padding (whole frames).
            generator: of dropped texts and hidden ids, on the model's device.

        Raises:
            InputError: more tokens than places, or tokens that do not fill the grid.
        """
        self._check_grid(grid, tokens.shape[1])
        batch, length = tokens.shape
        random = {"generator": generator, "device": tokens.device}
        if self.training:
            kept = torch.rand(batch, 1, **random) >= self.config.text_dropout
            text_mask = text_mask & kept
        places = torch.arange(length, device=tokens.device)
        valid = None if lengths is None else places < lengths[:, None]
        total = torch.full((batch,), length, device=tokens.device) if lengths is None else lengths
        step = torch.randint(0, self.config.num_steps, (batch,), **random)
        count = total * torch.cos(math.pi / 2 * step / self.config.num_steps)
        order = torch.rand(batch, length, **random)
        if valid is not None:
            order = order.masked_fill(~valid, 2)
        hidden = order.argsort(1).argsort(1) < count.round().clamp(min=1)[:, None]
        inputs = tokens.masked_fill(hidden, self.config.vocab_size)
        condition = self.condition(text_features, text_mask)
        logits = self.logits(inputs, grid, condition, valid=valid)[hidden].float()
        loss = F.cross_entropy(logits, tokens[hidden])
        hit = (logits.argmax(-1) == tokens[hidden]).float().mean()
        return loss, {"masked_nll": loss.detach(), "masked_accuracy": hit}

    def _check_grid(self, grid: Grid, count: int | None = None) -> None:
        length = math.prod(grid)
        if length > self.config.max_tokens:
            raise InputError(
                f"A grid of {'x'.join(map(str, grid))} has {length} tokens; this model holds "
                f"{self.config.max_tokens}: take fewer frames."
            )
        if count not in (None, length):
            raise InputError(
                f"A grid of {'x'.join(map(str, grid))} needs {length} ids, got {count}."
            )

    @torch.no_grad()
    def stream(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        generators: Sequence[torch.Generator],
        grid: Grid,
        prime: Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ids ``[B, t h w]`` after each step: all there, the uncertain ones yet to change.

        Args:
            text_features, text_mask: ``[B, L, text_dim]``, bool ``[B, L]``.
            generators: one an item.
            grid: (t, h, w) of the whole clip, the frames that it continues included.
            prime: ids ``[B, n]`` of whole frames that the clip starts with; they stay.
            guidance_scale: 1 runs no unconditional half.
            temperature: of the Gumbel noise at the start; it falls to 0 at the last step.
            noise: draws from U(0, 1) ``[num_steps, B, N - n, V]`` in place of the generators'.

        Raises:
            InputError: a grid, prime or setting that means nothing.
        """
        config = self.config
        steps = config.num_steps if num_steps is None else num_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        heat = config.temperature if temperature is None else temperature
        batch, vocab, device = len(text_features), config.vocab_size, text_features.device
        check_sampling(heat)
        check_steps(steps)
        check_guidance(scale)
        check_generators(generators, batch)
        self._check_grid(grid)
        known = 0 if prime is None else prime.shape[1]
        length = math.prod(grid) - known
        if known % (grid[1] * grid[2]) or length < 1:
            raise InputError(
                f"The frames that are continued must be whole and leave at least one to write: got "
                f"{known} ids of a grid of {'x'.join(map(str, grid))}."
            )
        if prime is not None:
            check_ids(prime, vocab)
        guided = scale != 1
        if guided:
            text_features = text_features.repeat(2, 1, 1)
            text_mask = torch.cat([text_mask, torch.zeros_like(text_mask)])
        condition = self.condition(text_features, text_mask)
        bias = self.position_bias(*grid)

        ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        hidden = torch.ones_like(ids, dtype=torch.bool)
        doubt = None
        for step in range(steps):
            if step > 0:
                count = hidden_count(length, step / steps)
                hidden = torch.zeros_like(hidden).scatter(1, doubt.topk(count).indices, True)
            inputs = ids.masked_fill(hidden, vocab)
            if prime is not None:
                inputs = torch.cat([prime, inputs], dim=1)
            logits = self.logits(inputs.repeat(1 + guided, 1), grid, condition, bias)
            logits = logits[:, known:].float()
            if guided:
                logits = guide(*logits.chunk(2), scale)
            uniform = (
                draw("uniform", (length, vocab), generators, device)
                if noise is None
                else noise[step]
            )
            heat_now = heat * (steps - step - 1) / steps
            drawn = (logits + heat_now * gumbel(uniform)).argmax(-1)
            ids = torch.where(hidden, drawn, ids)
            yield ids if prime is None else torch.cat([prime, ids], dim=1)
            certainty = logits.softmax(-1).gather(-1, ids[..., None])[..., 0]
            doubt = (1 - certainty).masked_fill(~hidden, -1e4)

    @torch.no_grad()
    def generate(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        generators: Sequence[torch.Generator],
        grid: Grid,
        **settings,
    ) -> Tensor:
        """The last of `stream`: ids int64 ``[B, t h w]``."""
        for ids in self.stream(text_features, text_mask, generators, grid, **settings):
            last = ids
        return last


@dataclass
class Scene:
    """A part of a story.

    Attributes:
        text_features, text_mask: ``[B, L, text_dim]``, bool ``[B, L]``, of the scene's text.
        frames: that the scene lasts: ``1 + k f`` for the first one of a story that continues nothing,
            else ``k f``, f frames a step of the tokenizer (see `scene_frames`).
    """

    text_features: Tensor
    text_mask: Tensor
    frames: int


@dataclass
class StoryPart:
    """Frames ``[B, 3, n, H, W]`` in [-1, 1] that a story goes on by, and the index of their scene."""

    frames: Tensor
    scene: int


def scene_frames(
    seconds: Sequence[float], fps: float, temporal_patch_size: int, continues: bool = False
) -> list[int]:
    """How many frames scenes of such durations have, each ending at the step nearest to its time.

    Args:
        continues: the first scene follows given frames, and so has no first frame of its own.

    Raises:
        InputError: a duration that is not positive.
    """
    counts: list[int] = []
    end = 0.0
    for duration in seconds:
        if not duration > 0:
            raise InputError(f"A scene must last longer than 0 seconds, got {duration}.")
        end += duration * fps
        own = 1 if not counts and not continues else 0
        steps = round((end - sum(counts) - own) / temporal_patch_size)
        counts.append(own + temporal_patch_size * max(steps, 0 if own else 1))
    return counts


def tell_story(
    model: Phenaki,
    tokenizer: CViViT,
    scenes: Sequence[Scene],
    generators: Sequence[torch.Generator],
    prime_frames: int = 5,
    start: Tensor | None = None,
    callback: Callable[[int, int], None] | None = None,
    **settings,
) -> Iterator[StoryPart]:
    """Write one scene after the other; a scene longer than the model's places takes several rounds.

    Every round encodes the last ``prime_frames`` frames anew, the first of them as a first frame, and
    writes on from there. Only these frames are held, so memory does not grow with the story.

    Args:
        generators: one an item; they are drawn from again and again.
        prime_frames: ``1 + k f``; 1 continues a picture.
        start: ``[B, 3, T, S, S]`` in [-1, 1], T = ``1 + k f``: a picture (T = 1) or clip to go on from.
        callback: ``(frames written, frames of the story)`` after each round; closing the iterator stops.
        settings: of `Phenaki.stream`.

    Raises:
        InputError: no scene, or numbers of frames that do not fit the tokenizer or the model.
    """
    step = tokenizer.temporal_patch_size
    if not scenes:
        raise InputError("A story needs at least one scene.")
    _, rows, columns = tokenizer.grid
    window = model.config.max_tokens // (rows * columns)
    if prime_frames < 1 or (prime_frames - 1) % step:
        raise InputError(f"prime_frames must be 1 + {step} k, got {prime_frames}.")
    if 1 + (prime_frames - 1) // step >= window:
        raise InputError(
            f"This model holds {window} steps of {step} frames: continuing {prime_frames} frames "
            "leaves no room; lower prime_frames."
        )
    for i, scene in enumerate(scenes):
        own = 1 if i == 0 and start is None else 0
        if scene.frames < max(own, 1) or (scene.frames - own) % step:
            wanted = f"1 + {step} k" if own else f"{step} k"
            raise InputError(f"Scene {i + 1} must have {wanted} frames, got {scene.frames}.")
    total, written = sum(scene.frames for scene in scenes), 0
    last = start
    for i, scene in enumerate(scenes):
        left = scene.frames
        while left:
            prime, known = None, 0
            if last is not None:
                # As many of the last frames as there are, a first frame and whole steps.
                known = min(prime_frames, 1 + (last.shape[2] - 1) // step * step)
                last = last[:, :, -known:]
                prime = tokenizer.encode(last)
            steps = 0 if prime is None else prime.shape[1] // (rows * columns)
            own = 1 if prime is None else 0
            new = min(window - steps, own + (left - own) // step)
            grid = (steps + new, rows, columns)
            ids = model.generate(
                scene.text_features, scene.text_mask, generators, grid, prime=prime, **settings
            )
            clip = tokenizer.decode(ids).clamp(-1, 1)
            frames = clip[:, :, known:]
            left -= frames.shape[2]
            written += frames.shape[2]
            last = frames if last is None else torch.cat([last, frames], dim=2)
            if callback is not None:
                callback(written, total)
            yield StoryPart(frames, i)
