"""SpeechTransformer: phones to codec tokens, with durations decided before the first token.

This project's own model, for one codebook. Durations as in "Non-Attentive Tacotron" (Shen et al.,
2020), arXiv 2010.04301: a predictor gives every phone its frames, and the phone's encoding is
repeated over them together with its place in them (section 2.2). Each frame thus belongs to one
phone, in order: nothing can be skipped or repeated, and the end is known from the start. The tokens
are then written one after the other by `frames.FrameTransformer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...modalities.errors import InputError
from ..layers.rope import rope_tables
from .frames import Block, FrameTransformer

# Places in a phone are told apart up to here, from either end.
MAX_PLACE = 32
# Frames of one sequence: at the codec's 62.5 a second, two minutes.
MAX_FRAMES = 7500


@dataclass
class Plan:
    """What is decided before the first token.

    Attributes:
        durations: frames of each phone, int64 ``[B, P]``, 0 behind an item's end.
        condition: of each frame, ``[B, T, dim]``.
        lengths: frames of each item, int64 ``[B]``.
    """

    durations: Tensor
    condition: Tensor
    lengths: Tensor


class SpeechTransformer(ModelMixin, ConfigMixin):
    """Phones and a speaker -> tokens of a codec.

    Args:
        phones: the symbols it knows.
        speakers: their names.
        vocab_size, frame_rate: of the codec.
        dim, heads, mlp_hidden: of both transformers.
        text_depth, depth: blocks of the encoder over phones and of the decoder over frames.
        window: frames that the decoder looks back on.
        dropout, token_dropout, condition_dropout: in training; the last hides the phones of an item
            from the decoder, for guidance.
    """

    @register_to_config
    def __init__(
        self,
        phones: Sequence[str],
        speakers: Sequence[str],
        vocab_size: int = 4096,
        frame_rate: float = 75.0,
        dim: int = 256,
        heads: int = 4,
        mlp_hidden: int = 640,
        text_depth: int = 3,
        depth: int = 6,
        window: int = 128,
        dropout: float = 0.1,
        token_dropout: float = 0.1,
        condition_dropout: float = 0.1,
    ):
        super().__init__()
        self.phone_ids = {phone: i for i, phone in enumerate(phones)}
        self.phone_embedding = nn.Embedding(len(phones), dim)
        self.speaker_embedding = nn.Embedding(len(speakers), dim)
        self.encoder = nn.ModuleList(
            Block(dim, heads, mlp_hidden, dropout) for _ in range(text_depth)
        )
        self.encoder_norm = nn.LayerNorm(dim)
        self.duration_head = nn.Linear(dim, 1)
        self.from_start = nn.Embedding(MAX_PLACE, dim)
        self.to_end = nn.Embedding(MAX_PLACE, dim)
        self.null_phone = nn.Parameter(torch.zeros(dim))
        self.decoder = FrameTransformer(
            vocab_size, dim, depth, heads, mlp_hidden, window, dropout, token_dropout
        )

    def init_weights(self) -> None:
        """Normal 0.02; projections into the residual stream are scaled by depth (GPT-2)."""
        for blocks in (self.encoder, self.decoder.blocks):
            for name, parameter in blocks.named_parameters():
                if parameter.ndim >= 2:
                    residual = name.endswith(("proj.weight", "fc2.weight"))
                    std = 0.02 / (2 * len(blocks)) ** 0.5 if residual else 0.02
                    nn.init.normal_(parameter, std=std)
        for module in (*self.children(), self.decoder.embedding, self.decoder.head):
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)

    def ids_of(self, phones: Sequence[str]) -> list[int]:
        """Phones -> their ids.

        Raises:
            InputError: a phone that the model does not know, or none at all.
        """
        unknown = [phone for phone in phones if phone not in self.phone_ids]
        if unknown:
            raise InputError(
                f'This voice does not know the phone "{unknown[0]}": it has '
                f"{', '.join(self.phone_ids)}."
            )
        if not phones:
            raise InputError("There are no phones to speak: give at least one.")
        return [self.phone_ids[phone] for phone in phones]

    def speaker_id(self, name: str) -> int:
        """The number of a speaker; InputError where there is no such one."""
        speakers = list(self.config.speakers)
        if name not in speakers:
            raise InputError(f'There is no voice "{name}": choose from {", ".join(speakers)}.')
        return speakers.index(name)

    def encode_phones(self, phones: Tensor, mask: Tensor, speakers: Tensor) -> Tensor:
        """Ids ``[B, P]``, bool ``[B, P]`` (True = there), speakers ``[B]`` -> ``[B, P, dim]``."""
        x = self.phone_embedding(phones) + self.speaker_embedding(speakers)[:, None]
        positions = torch.arange(phones.shape[1], device=phones.device)[:, None]
        rope = rope_tables(positions, self.config.dim // self.config.heads)
        for block in self.encoder:
            x = block(x, rope, mask[:, None, None])
        return self.encoder_norm(x)

    def log_durations(self, states: Tensor) -> Tensor:
        """``[B, P, dim]`` -> log(1 + frames) of each phone ``[B, P]``."""
        return self.duration_head(states)[..., 0].float()

    def spread(self, states: Tensor, durations: Tensor, frames: int) -> Tensor:
        """Each phone's state over its frames, with its place among them: ``[B, frames, dim]``.

        Frames behind an item's end repeat its last phone.
        """
        ends = durations.cumsum(1)
        times = torch.arange(frames, device=states.device).expand(len(states), -1).contiguous()
        phone = torch.searchsorted(ends, times, right=True).clamp(max=durations.shape[1] - 1)
        ends, lengths = ends.gather(1, phone), durations.gather(1, phone)
        from_start = (times - ends + lengths).clamp(0, MAX_PLACE - 1)
        to_end = (ends - 1 - times).clamp(0, MAX_PLACE - 1)
        states = states.gather(1, phone[..., None].expand(-1, -1, states.shape[-1]))
        return states + self.from_start(from_start) + self.to_end(to_end)

    def forward(
        self, tokens: Tensor, phones: Tensor, durations: Tensor, speakers: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the tokens plus the L1 distance of log durations.

        Args:
            tokens: ids ``[B, T]``; what is behind the sum of an item's durations does not count.
            phones: ids ``[B, P]``.
            durations: frames of each phone ``[B, P]``, 0 behind an item's end.
            speakers: ``[B]``.
        """
        there = durations > 0
        states = self.encode_phones(phones, there, speakers)
        wrong = (self.log_durations(states) - durations.float().log1p()).abs()
        duration = (wrong * there).sum() / there.sum()
        condition = self.spread(states, durations, tokens.shape[1])
        if self.training and self.config.condition_dropout:
            shape = (len(tokens), 1, 1)
            drop = torch.rand(shape, device=tokens.device) < self.config.condition_dropout
            condition = torch.where(drop, self.null_condition(condition, speakers), condition)
        lengths = durations.sum(1)
        logits = self.decoder.logits(tokens[:, None], lengths, condition)[:, 0].float()
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        nll = F.cross_entropy(logits[inside], tokens[inside])
        parts = {"nll": nll.detach(), "duration": duration.detach()}
        return nll + duration, parts

    def null_condition(self, condition: Tensor, speakers: Tensor) -> Tensor:
        """The speaker without the phones: ``[B, T, dim]``."""
        null = self.null_phone + self.speaker_embedding(speakers)
        return null[:, None].expand_as(condition)

    @torch.no_grad()
    def plan(self, phones: Sequence[Sequence[str]], speakers: Tensor, speed: float = 1.0) -> Plan:
        """Decide how long each phone lasts.

        Args:
            phones: of each item.
            speakers: ``[B]``.
            speed: 2 is twice as fast, 0.5 half as fast.

        Raises:
            InputError: an unknown phone, a speed outside 0.25 to 4, or a text that is too long.
        """
        if not 0.25 <= speed <= 4:
            raise InputError(f"The speed must lie in 0.25 to 4 (1 is natural), got {speed}.")
        rows = [torch.tensor(self.ids_of(item)) for item in phones]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        counts = torch.tensor([len(row) for row in rows], device=self.device)
        there = torch.arange(ids.shape[1], device=self.device) < counts[:, None]
        states = self.encode_phones(ids, there, speakers)
        wanted = self.log_durations(states).expm1().clamp(min=0.5) / speed
        # Rounding the ends instead of the durations keeps the length of the whole.
        ends = (wanted * there).cumsum(1).round().long()
        durations = torch.diff(ends, dim=1, prepend=torch.zeros_like(ends[:, :1]))
        durations = durations.clamp(min=1) * there
        lengths = durations.sum(1)
        longest = int(lengths.max())
        if longest > MAX_FRAMES:
            raise InputError(
                f"This sentence would last {longest / self.config.frame_rate:.0f} seconds; at most "
                f"{MAX_FRAMES / self.config.frame_rate:.0f} are spoken at once: split it."
            )
        return Plan(durations, self.spread(states, durations, longest), lengths)

    @torch.no_grad()
    def stream(
        self,
        plan: Plan,
        speakers: Tensor,
        generators: Sequence[torch.Generator],
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Iterator[Tensor]:
        """Yield the ids ``[B]`` of frame after frame; what comes behind an item's length is padding.

        Args:
            plan: of `plan`, for the same speakers.
            generators: one an item.
            guidance_scale: 1 runs no unconditional half; more makes phones clearer.

        Raises:
            InputError: a setting that means nothing.
        """
        for ids in self.decoder.stream(
            plan.condition,
            plan.lengths,
            generators,
            guidance_scale,
            self.null_condition(plan.condition, speakers),
            temperature,
            top_k,
            top_p,
        ):
            yield ids[:, 0]

    @torch.no_grad()
    def generate(
        self,
        phones: Sequence[Sequence[str]],
        speakers: Tensor,
        generators: Sequence[torch.Generator],
        speed: float = 1.0,
        **sampling,
    ) -> list[Tensor]:
        """`plan`, then all of `stream`: the ids int64 ``[1, T]`` of each item."""
        plan = self.plan(phones, speakers, speed)
        ids = torch.stack(list(self.stream(plan, speakers, generators, **sampling)), dim=1)
        return [row[None, :length] for row, length in zip(ids, plan.lengths.tolist(), strict=True)]
