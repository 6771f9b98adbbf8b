"""SongGen: A Single Stage Auto-regressive Transformer for Text-to-Song Generation (Liu et al., 2025).

Paper: arXiv 2502.13128 (ICML 2025). Code: Apache-2.0. Published checkpoints: LiuZH-19/SongGen_mixed_pro
(one mixed track), LiuZH-19/SongGen_interleaving_A_V (accompaniment and vocals apart).

A description, lyrics and, if wanted, a voice of 3 seconds are one sequence that the decoder attends to.
The decoder writes the 8 codebooks of X-Codec (50 frames a second at 16 kHz), each a step behind the one
before it; two tracks take turns or stand in rows of their own. Frozen models beside it: flan-t5-large
reads the description (`TextT5`), MERT-v1-330M hears the voice, X-Codec makes sound of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ...modalities.spoken_text import clean_text, read_sentence
from ...tokenizers.audio.patterns import (
    FREE,
    apply_template,
    deinterleave,
    delay,
    delay_template,
    interleave,
    parallel,
    split_parallel,
    undelay,
)
from ..cache import StaticCache
from ..layers.attention import causal_attention
from ..sampling import check_generators, check_ids, check_sampling, draw, sample

TRACKS = {
    "mixed": ("mixed",),
    "mixed_pro": ("mixed",),
    "parallel_std": ("accompaniment", "vocal"),
    "parallel_A_V": ("accompaniment", "vocal"),
    "parallel_V_A": ("accompaniment", "vocal"),
    "interleaving_A_V": ("accompaniment", "vocal"),
    "interleaving_V_A": ("vocal", "accompaniment"),
}
"""Pattern -> its tracks, in the order of rows or turns; "mixed_pro" trains a head for vocals beside it."""
SPECIAL_IDS = 64
"""Ids above the codes: pad, which also ends a row, start, and others that are never written."""
FRAME_RATE = 50
VOICE_RATE, VOICE_SECONDS = 24_000, 3
LYRICS_START, LYRICS_END = 261, 0


def combine_tracks(tracks: Sequence[Tensor], pattern: str, bos: int, pad: int) -> Tensor:
    """Tracks ``[B, Q, L]`` in the order of `TRACKS`, delayed already -> what the decoder writes.

    Args:
        bos, pad: stand where the later track has not begun and the earlier one has ended.
    """
    if pattern.startswith("interleaving"):
        return interleave(tracks)
    if pattern in ("parallel_A_V", "parallel_V_A"):
        later = int(pattern == "parallel_A_V")
        tracks = [
            F.pad(track, (1, 0), value=bos) if i == later else F.pad(track, (0, 1), value=pad)
            for i, track in enumerate(tracks)
        ]
    return parallel(tracks)


def split_tracks(sequence: Tensor, pattern: str) -> list[Tensor]:
    """The inverse of `combine_tracks`."""
    count = len(TRACKS[pattern])
    if pattern.startswith("interleaving"):
        return deinterleave(sequence, count)
    tracks = split_parallel(sequence, count)
    if pattern in ("parallel_A_V", "parallel_V_A"):
        later = int(pattern == "parallel_A_V")
        tracks = [
            track[..., 1:] if i == later else track[..., :-1] for i, track in enumerate(tracks)
        ]
    return tracks


def sequence_template(
    prompts: Sequence[Tensor], pattern: str, max_length: int, bos: int, pad: int
) -> Tensor:
    """`delay_template` of every track, combined behind one start column.

    Args:
        prompts: of every track ``[B, Q, S]``, a start column and S - 1 frames that are given.
        max_length: columns of one track, its start column among them.

    Returns:
        ``[B, rows, L]``, -1 where the decoder writes.
    """
    tracks = [delay_template(prompt, max_length, bos, pad) for prompt in prompts]
    sequence = combine_tracks([track[..., 1:] for track in tracks], pattern, bos, pad)
    return F.pad(sequence, (1, 0), value=bos)


def start_columns(template: Tensor) -> Tensor:
    """The columns before the first in which anything is to be written."""
    free = (template == FREE).flatten(0, 1).any(0)
    return template[..., : int(free.long().argmax())]


def encode_lyrics(tokenizer: TextTokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """English lyrics -> ids int64 ``[B, P]`` and their mask bool ``[B, P]``.

    Numbers, abbreviations and symbols become words, lines are separated by full stops.

    Args:
        tokenizer: VoiceBPE of the checkpoint (XTTS-v2's).

    Raises:
        InputError: lyrics without a word.
    """
    rows = []
    for text in texts:
        lines = []
        for line in text.strip().splitlines():
            words = [word for written in read_sentence(clean_text(line)) for word in written.spoken]
            lines.append(" ".join(words).replace(" ,", ",").lower())
        spoken = ".".join(line for line in lines if line)
        if not any(character.isalpha() for character in spoken):
            raise InputError(f"These lyrics hold no English word: {text[:40]!r}. Write a line.")
        ids = tokenizer.encode(
            "[en]" + spoken.replace(" ", "[SPACE]"), add_special_tokens=False
        ).ids
        rows.append(torch.tensor([LYRICS_START, *ids, LYRICS_END]))
    lengths = torch.tensor([len(row) for row in rows])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


@torch.no_grad()
def encode_voice(audio: Tensor, mert: Callable[..., object]) -> tuple[Tensor, Tensor]:
    """Clean vocals -> the states of all layers of MERT ``[B, layers, t, C]``, and who has a voice ``[B]``.

    Args:
        audio: float ``[B, 1, L]`` at 24 kHz; the first 3 seconds count, shorter ones are padded. An
            item of zeros has no voice.
        mert: a network of transformers, such as MERT-v1-330M (weights: CC-BY-NC-4.0).
    """
    length = VOICE_RATE * VOICE_SECONDS
    x = audio[:, 0, :length]
    x = F.pad(x, (0, length - x.shape[1]))
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-7).sqrt()
    states = mert(x, output_hidden_states=True).hidden_states
    return torch.stack(tuple(states), dim=1), audio.flatten(1).any(1)


class RelativeAttention(nn.Module):
    """Self-attention that sees content and distance apart (Transformer-XL, arXiv 1901.02860)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.position = Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, dim // heads))
        self.position_bias = nn.Parameter(torch.zeros(heads, dim // heads))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, distances: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, D]`` -> the same shape.

        Args:
            distances: embeddings ``[2 T - 1, D]`` of T - 1 down to -(T - 1), positive to the left.
            mask: bool ``[B, 1, 1, T]``, True = seen.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.position(distances).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        place = torch.arange(x.shape[1], device=x.device)
        row = (len(place) - 1 - place[:, None] + place).expand(*q.shape[:2], -1, -1)
        bias = ((q + self.position_bias[:, None]) @ p.mT).gather(-1, row) * q.shape[-1] ** -0.5
        bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        x = F.scaled_dot_product_attention(q + self.content_bias[:, None], k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))


class LyricsBlock(nn.Module):
    """Pre-norm attention and MLP with SiLU."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = RelativeAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, distances: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), distances, mask)
        return x + self.fc2(F.silu(self.fc1(self.norm2(x))))


class LyricsEncoder(nn.Module):
    """Embedded lyrics ``[B, P, in_dim]`` -> ``[B, P, dim]``, seen as a whole."""

    def __init__(self, in_dim: int, dim: int, depth: int, heads: int, hidden: int):
        super().__init__()
        self.input = Linear(in_dim, dim)
        self.input_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(LyricsBlock(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.input_norm(self.input(x))
        length, dim = x.shape[1:]
        distances = torch.arange(length - 1, -length, -1, device=x.device)
        exponents = torch.arange(0, dim, 2, device=x.device) / dim
        angles = distances[:, None] * torch.exp(-math.log(10000) * exponents)
        distances = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(x.dtype)
        x = x * math.sqrt(dim)
        for block in self.blocks:
            x = block(x, distances, mask[:, None, None])
        return self.norm(x)


class DecoderBlock(nn.Module):
    """Pre-norm causal attention, attention to the conditions, MLP with GELU; no biases."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_q = Linear(dim, dim, bias=False)
        self.cross_kv = Linear(dim, 2 * dim, bias=False)
        self.cross_proj = Linear(dim, dim, bias=False)
        self.norm3 = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, hidden, bias=False)
        self.fc2 = Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def memory(self, condition: Tensor) -> Tensor:
        """``[B, S, D]`` -> keys and values ``[2, B, heads, S, head_dim]``, which all steps share."""
        return self.cross_kv(condition).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor,
        cache: StaticCache | None = None,
        layer: int = 0,
        position: int = 0,
    ) -> Tensor:
        """``[B, T, D]`` -> the same shape; a cache is used as in `SelfAttention`.

        Args:
            mask: bool ``[B, 1, 1, S]``, True = seen.
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(layer, position, k, v)
        h = causal_attention(q, k, v)
        x = x + self.dropout(self.proj(h.transpose(1, 2).flatten(2)))
        q = self.cross_q(self.norm2(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, *memory, attn_mask=mask)
        x = x + self.dropout(self.cross_proj(h.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm3(x)))))


class SongGen(ModelMixin, ConfigMixin):
    """Description, lyrics and voice -> codes ``[Q, frames]`` of each track. The defaults are mixed_pro.

    Args:
        pattern: how tracks and codebooks are written, one of `TRACKS`.
        num_codebooks, codebook_size: of the codec.
        max_positions: the longest sequence.
        text_dim: width of the description's features.
        lyrics_vocab, lyrics_dim, lyrics_depth, lyrics_heads, lyrics_hidden: of the lyrics' encoder.
        voice_layers, voice_dim: of the network that hears the voice.
        dropout: in training.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        pattern: str = "mixed_pro",
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        mlp_hidden: int = 4096,
        max_positions: int = 6547,
        text_dim: int = 1024,
        lyrics_vocab: int = 7000,
        lyrics_dim: int = 1024,
        lyrics_depth: int = 6,
        lyrics_heads: int = 16,
        lyrics_hidden: int = 4096,
        voice_layers: int = 25,
        voice_dim: int = 1024,
        dropout: float = 0.1,
    ):
        super().__init__()
        if pattern not in TRACKS:
            raise InputError(f'Unknown pattern "{pattern}": choose one of {", ".join(TRACKS)}.')
        self.rows = num_codebooks * (2 if pattern.startswith("parallel") else 1)
        self.vocab_size = codebook_size + SPECIAL_IDS
        self.pad, self.bos = codebook_size, codebook_size + 1
        half = dim // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
        angles = torch.arange(max_positions)[:, None] * frequencies
        self.register_buffer(
            "positions", torch.cat([angles.cos(), angles.sin()], dim=1), persistent=False
        )
        self.register_buffer(
            "offsets", torch.arange(self.rows)[:, None] * self.vocab_size, persistent=False
        )
        self.text_proj = Linear(text_dim, dim)
        self.lyrics_embedding = nn.Embedding(lyrics_vocab, dim)
        self.lyrics_encoder = LyricsEncoder(
            dim, lyrics_dim, lyrics_depth, lyrics_heads, lyrics_hidden
        )
        self.lyrics_proj = Linear(lyrics_dim, dim)
        self.voice_mix = Linear(voice_layers, 1)
        self.voice_proj = Linear(voice_dim, dim)
        # One table and one head for all rows.
        self.embedding = nn.Embedding(self.rows * self.vocab_size, dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(dim, heads, mlp_hidden, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = Linear(dim, self.rows * self.vocab_size, bias=False)
        self.vocal_head = None
        if pattern == "mixed_pro":
            self.vocal_head = Linear(dim, self.rows * self.vocab_size, bias=False)

    @property
    def tracks(self) -> tuple[str, ...]:
        """Names of the tracks that are written."""
        return TRACKS[self.config.pattern]

    def init_weights(self) -> None:
        """Normal 0.02 for matrices and tables, zero for biases."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def condition(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        lyrics: Tensor,
        lyrics_mask: Tensor,
        voice_states: Tensor | None = None,
        voice_mask: Tensor | None = None,
        project_text: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """What the decoder attends to, ``[B, S, dim]``, and its mask bool ``[B, S]``.

        Args:
            text_features, text_mask: of the description, ``[B, T, text_dim]`` and bool ``[B, T]``.
            lyrics, lyrics_mask: of `encode_lyrics`, ``[B, P]``.
            voice_states, voice_mask: of `encode_voice`; None for no voice at all.
            project_text: see `stream`.
        """
        text = self.text_proj(text_features) if project_text else text_features
        sung = self.lyrics_encoder(self.lyrics_embedding(lyrics), lyrics_mask)
        parts = [text * text_mask[..., None], self.lyrics_proj(sung)]
        masks = [text_mask, lyrics_mask]
        if voice_states is not None:
            voice = self.voice_mix(voice_states.movedim(1, -1))[..., 0]
            parts.insert(0, self.voice_proj(voice))
            masks.insert(0, voice_mask[:, None].expand(-1, voice.shape[1]))
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1)

    def memories(self, condition: Tensor) -> list[Tensor]:
        """Of each block its keys and values of the conditions."""
        return [block.memory(condition) for block in self.blocks]

    def hidden(
        self,
        ids: Tensor,
        memories: Sequence[Tensor],
        mask: Tensor,
        cache: StaticCache | None = None,
        position: int = 0,
    ) -> Tensor:
        """Columns ``[B, rows, L]`` from ``position`` on -> ``[B, L, dim]``."""
        x = self.embedding(ids + self.offsets).sum(1)
        if self.rows > self.config.num_codebooks:
            x = x / 2
        x = x + self.positions[position : position + ids.shape[-1]].to(x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, (block, memory) in enumerate(zip(self.blocks, memories, strict=True)):
            x = block(x, memory, mask[:, None, None], cache, layer, position)
        return self.norm(x)

    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """``[B, L, dim]`` -> ``[B, rows, L, vocab_size]``."""
        return (head or self.head)(hidden).unflatten(-1, (self.rows, -1)).transpose(1, 2)

    def labels(self, tracks: Mapping[str, Tensor], lengths: Tensor | None = None) -> Tensor:
        """Codes of each track ``[B, Q, T]`` -> what the decoder must write, ``[B, rows, L]``.

        Args:
            lengths: frames of each item ``[B]``.
        """
        made = []
        for name in self.tracks:
            codes = F.pad(tracks[name], (0, 1), value=self.pad)
            if lengths is not None:
                frame = torch.arange(codes.shape[-1], device=codes.device)
                codes = codes.masked_fill((frame >= lengths[:, None])[:, None], self.pad)
            delayed = delay(codes, self.pad)
            column = torch.arange(delayed.shape[-1], device=codes.device)
            row = torch.arange(delayed.shape[1], device=codes.device)[:, None]
            made.append(delayed.masked_fill(column < row, self.bos))
        return combine_tracks(made, self.config.pattern, self.bos, self.pad)

    def inputs(self, labels: Tensor) -> Tensor:
        """Labels, a start column in front, without the last column."""
        return F.pad(labels[..., :-1], (1, 0), value=self.bos)

    def codebook_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every row, ``[rows]``; of pads only the first counts, the end of a row."""
        counted = (labels != self.bos) & (self.inputs(labels) != self.pad)
        each = F.cross_entropy(logits.float().permute(0, 3, 1, 2), labels, reduction="none")
        return (each * counted).sum((0, 2)) / counted.sum((0, 2))

    def codebook_weights(self, progress: float) -> Tensor:
        """Of the rows ``[rows]``, their sum 1: first the three coarsest codebooks count most."""
        count = self.config.num_codebooks
        even = 0.0 if progress < 0.3 else 0.3 if progress < 0.6 else 0.6 if progress < 0.8 else 0.8
        coarse = torch.full((count,), 0.25 / (count - 3), device=self.device)
        coarse[:3] = 0.25
        weights = (1 - even) * coarse + even / count
        groups = self.rows // count
        return weights.repeat(groups) / groups

    def forward(
        self,
        tracks: Mapping[str, Tensor],
        text_features: Tensor,
        text_mask: Tensor,
        lyrics: Tensor,
        lyrics_mask: Tensor,
        voice_states: Tensor | None = None,
        voice_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        progress: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross-entropy of the rows, and 0.1 of that of the vocals where there is a head.

        Args:
            tracks: codes ``[B, Q, T]`` of each track, and "vocal" for the head of "mixed_pro".
            lengths: frames of each item ``[B]``.
            progress: of the training, 0 to 1; see `codebook_weights`.
        """
        condition, mask = self.condition(
            text_features, text_mask, lyrics, lyrics_mask, voice_states, voice_mask
        )
        labels = self.labels(tracks, lengths)
        hidden = self.hidden(self.inputs(labels), self.memories(condition), mask)
        losses = self.codebook_losses(self.logits(hidden), labels)
        weights = self.codebook_weights(progress)
        loss, parts = losses @ weights, {"cross_entropy": losses.mean().detach()}
        if self.vocal_head is not None:
            labels = self.labels({"mixed": tracks["vocal"]}, lengths)
            losses = self.codebook_losses(self.logits(hidden, self.vocal_head), labels)
            loss = loss + 0.1 * losses @ weights
            parts["vocal_cross_entropy"] = losses.mean().detach()
        return loss, parts

    def projects_text(self, project_text: str) -> bool:
        """Whether the description is projected: see `stream`.

        Raises:
            InputError: an unknown choice.
        """
        if project_text not in ("auto", "always", "reference"):
            raise InputError(f'project_text is auto, always or reference, got "{project_text}".')
        if project_text == "reference":
            return self.config.text_dim != self.config.dim
        return project_text == "always" or bool(self.text_proj.bias.any())

    @torch.no_grad()
    def stream(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        lyrics: Tensor,
        lyrics_mask: Tensor,
        generators: Sequence[torch.Generator],
        voice_states: Tensor | None = None,
        voice_mask: Tensor | None = None,
        max_length: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
        prompt: Mapping[str, Tensor] | None = None,
        project_text: str = "auto",
        raw: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the sequence ``[B, rows, n]`` after every column, start column included.

        Args:
            text_features, text_mask, lyrics, lyrics_mask, voice_states, voice_mask: see `condition`.
            generators: one an item.
            max_length: columns, the start column included; default: 30 seconds.
            prompt: codes ``[B, Q, S]`` of each track that the song begins with.
            project_text: the published ``generate`` leaves the description unprojected where it is as
                wide as the decoder ("reference"), its training did not ("always"). "auto" projects
                unless the projection's bias is exactly 0, as it is before any training.
            raw: yield what was drawn, without the pattern written over it.

        Raises:
            InputError: a length or setting that means nothing.
        """
        config, device = self.config, text_features.device
        batch, codebooks = len(text_features), config.num_codebooks
        check_generators(generators, batch)
        check_sampling(temperature, top_k, top_p)
        turns = 2 if config.pattern.startswith("interleaving") else 1
        if max_length is None:
            max_length = 30 * FRAME_RATE * turns
        shortest, longest = turns * 2 * codebooks, len(self.positions)
        if not shortest <= max_length <= longest:
            raise InputError(
                f"A song takes {shortest} to {longest} columns, got max_length {max_length}."
            )
        # As published each track's pattern is as long as the whole, so that tracks that take turns end
        # without pads, in frames that are not complete.
        prompts = self._prompts(prompt, batch, max_length // turns, device)
        template = sequence_template(prompts, config.pattern, max_length, self.bos, self.pad)
        template = template[..., :max_length]
        condition, mask = self.condition(
            text_features,
            text_mask,
            lyrics,
            lyrics_mask,
            voice_states,
            voice_mask,
            self.projects_text(project_text),
        )
        memories = self.memories(condition)
        cache = StaticCache(
            config.depth,
            batch,
            config.heads,
            max_length,
            config.dim // config.heads,
            condition.dtype,
            device,
        )
        # The rule for the end of rows reads what was drawn, the decoder what the pattern makes of it.
        ids = start_columns(template)
        ended = torch.zeros(batch, self.rows, dtype=torch.bool, device=device)
        row = torch.arange(self.rows, device=device) % codebooks
        stage = torch.zeros(batch, self.rows // codebooks, 1, dtype=torch.int64, device=device)
        position = 0
        while ids.shape[-1] < max_length and not bool(ended.all()):
            written = apply_template(ids, template)
            hidden = self.hidden(written[..., position:], memories, mask, cache, position)
            logits = self.logits(hidden[:, -1:])[:, :, 0].float()
            # No row may end before the one above it has, one row more at every step.
            above = ended.unflatten(1, (-1, codebooks)).gather(2, stage)
            stage = (stage + above).clamp(max=codebooks - 1)
            early = row > stage.expand(-1, -1, codebooks).flatten(1)
            logits[..., self.pad] = logits[..., self.pad].masked_fill(early, -torch.inf)
            noise = draw("exponential", logits.shape[1:], generators, device).flatten(0, 1)
            new = sample(logits.flatten(0, 1), temperature, top_k, top_p, generators, noise)
            new = new.view(batch, self.rows).masked_fill(ended, self.pad)
            ended = ended | (new == self.pad)
            position = ids.shape[-1]
            ids = torch.cat([ids, new[..., None]], dim=-1)
            yield ids if raw else apply_template(ids, template)

    def _prompts(
        self,
        prompt: Mapping[str, Tensor] | None,
        batch: int,
        columns: int,
        device: torch.device,
    ) -> list[Tensor]:
        """Of each track its start column and what it begins with."""
        shape = (batch, self.config.num_codebooks)
        start = torch.full((*shape, 1), self.bos, device=device)
        if prompt is None:
            return [start] * len(self.tracks)
        lengths = {codes.shape[-1] for codes in prompt.values()}
        if set(prompt) != set(self.tracks) or len(lengths) != 1:
            raise InputError(
                f"The prompt must hold the same number of frames of {', '.join(self.tracks)}."
            )
        for codes in prompt.values():
            check_ids(codes, self.config.codebook_size)
            if (
                codes.shape[:2] != shape
                or codes.shape[-1] > columns - 2 * self.config.num_codebooks
            ):
                raise InputError(
                    f"The prompt's codes must be [{batch}, {shape[1]}, frames] and leave room for "
                    f"more, got {list(codes.shape)} for {columns} columns."
                )
        return [torch.cat([start, prompt[name]], dim=-1) for name in self.tracks]

    def codes(self, sequence: Tensor) -> list[dict[str, Tensor]]:
        """A sequence of `stream` -> of each item the codes ``[Q, frames]`` of its tracks.

        Frames with an id that is no code, as those after the end, are left out.
        """
        found: list[dict[str, Tensor]] = [{} for _ in sequence]
        for name, track in zip(
            self.tracks, split_tracks(sequence[..., 1:], self.config.pattern), strict=True
        ):
            frames = track[..., :0]
            if track.shape[-1] >= self.config.num_codebooks:
                frames = undelay(track)
            for item, codes in zip(found, frames, strict=True):
                item[name] = codes[:, (codes < self.config.codebook_size).all(0)]
        return found

    @torch.no_grad()
    def generate(self, *condition: Tensor, **settings) -> list[dict[str, Tensor]]:
        """`codes` of the last of `stream`; a song is the sum of what the codec makes of its tracks."""
        for sequence in self.stream(*condition, **settings):
            last = sequence
        return self.codes(last)
