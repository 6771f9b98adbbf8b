"""T5's encoder as a text tower: Exploring the Limits of Transfer Learning (Raffel et al., 2020).

Paper: arXiv 1910.10683; the gated form is that of T5 v1.1 (arXiv 2002.05202). Published checkpoints:
google-t5/t5-* and google/flan-t5-* (Apache-2.0). FlexAR reads google/flan-t5-xl, SongGen
google/flan-t5-large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor, nn

from ...kernels.linear import Linear
from ...modalities.errors import InputError
from ...weights.convert.t5 import convert_state_dict, read_config
from ...weights.loading import load_strict, read_json, read_state_dict

TOKENIZER_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
FEED_FORWARDS = ("relu", "gated-gelu")


class T5Block(nn.Module):
    """Pre-norm attention and feed-forward, all without biases (section 2.1)."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, hidden: int, feed_forward: str, eps: float
    ):
        super().__init__()
        self.heads = heads
        self.gated = feed_forward == "gated-gelu"
        self.norm1 = nn.RMSNorm(dim, eps)
        self.qkv = Linear(dim, 3 * heads * head_dim, bias=False)
        self.proj = Linear(heads * head_dim, dim, bias=False)
        self.norm2 = nn.RMSNorm(dim, eps)
        self.fc1 = Linear(dim, 2 * hidden if self.gated else hidden, bias=False)
        self.fc2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``[B, L, dim]`` -> the same shape.

        Args:
            bias: added to the scores, ``[B, heads, L, L]``.
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # The initialisation of q holds the scale of the scores.
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        h = self.fc1(self.norm2(x))
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            h = F.gelu(gate, approximate="tanh") * h
        else:
            h = F.relu(h)
        return x + self.fc2(h)


class T5Encoder(nn.Module):
    """Token ids -> features. The arguments are those of a published config.json; defaults: t5-small.

    Args:
        d_model: width.
        d_kv: of one head; heads need not add up to the width.
        d_ff: width within the feed-forward.
        relative_attention_num_buckets, relative_attention_max_distance: of `relative_buckets`.
        feed_forward_proj: "relu" (T5) or "gated-gelu" (v1.1, flan).
    """

    def __init__(
        self,
        vocab_size: int = 32128,
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 2048,
        num_layers: int = 6,
        num_heads: int = 8,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        layer_norm_epsilon: float = 1e-6,
        feed_forward_proj: str = "relu",
    ):
        super().__init__()
        if feed_forward_proj not in FEED_FORWARDS:
            raise InputError(
                f"The feed-forward of this T5 must be one of {', '.join(FEED_FORWARDS)}, got "
                f'"{feed_forward_proj}".'
            )
        self.dim = d_model
        self.max_distance = relative_attention_max_distance
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.relative_bias = nn.Embedding(relative_attention_num_buckets, num_heads)
        self.blocks = nn.ModuleList(
            T5Block(d_model, num_heads, d_kv, d_ff, feed_forward_proj, layer_norm_epsilon)
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model, layer_norm_epsilon)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids int64 ``[B, L]`` and their mask bool ``[B, L]`` (True = a token) -> ``[B, L, d_model]``."""
        place = torch.arange(ids.shape[1], device=ids.device)
        buckets = relative_buckets(
            place - place[:, None], self.relative_bias.num_embeddings, self.max_distance
        )
        bias = self.relative_bias(buckets).permute(2, 0, 1)  # The same in all layers.
        bias = bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


def relative_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Key's place less query's -> bucket; half are for each direction (section 2.1).

    Half of a direction's buckets hold one distance each, the others grow with its logarithm up to
    ``max_distance``; the last holds all beyond.
    """
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    growth = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return half * (distance > 0) + torch.where(far < exact, far, logarithmic)


class TextT5(ModelMixin, ConfigMixin):
    """Text -> features of every token.

    Args:
        t5_config: arguments of `T5Encoder`.
        context_length: tokens that are read of a text, its end token included.
    """

    @register_to_config
    def __init__(self, t5_config: Mapping[str, Any] | None = None, context_length: int = 128):
        super().__init__()
        self.texts: TextTokenizer | None = None
        self.encoder = T5Encoder(**(t5_config or {}))

    @classmethod
    def from_hub(cls, repository: str) -> TextT5:
        """A published T5 by its hub id, e.g. "google/flan-t5-xl", or a folder with its files.

        A hub id is looked for in the cache, else downloaded.

        Raises:
            InputError: it is not there, the hub cannot be reached, or it is no T5.
        """
        folder = Path(repository)
        if not folder.is_dir():
            wanted = [
                "config.json",
                TOKENIZER_FILE,
                "model*.safetensors",
                f"{WEIGHTS_FILE}.index.json",
            ]
            try:
                folder = Path(snapshot_download(repository, allow_patterns=wanted))
            except Exception as error:  # The hub's and the network's many kinds of failure.
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(
                    f'Could not load the text tower "{repository}" ({reason}): download it '
                    "elsewhere into the hub's cache."
                ) from error
        config = read_config(read_json(folder / "config.json"))
        index = folder / f"{WEIGHTS_FILE}.index.json"
        state = read_state_dict(index if index.is_file() else folder / WEIGHTS_FILE)
        tower = cls(config)
        load_strict(tower.encoder, convert_state_dict(state, config))
        tower.texts = _read_tokenizer(folder)
        return tower.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> TextT5:
        """Weights and config as in diffusers, and ``tokenizer.json`` beside them."""
        tower = super().from_pretrained(folder, **options)
        tower.texts = _read_tokenizer(Path(folder) / (options.get("subfolder") or ""))
        return tower

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        super().save_pretrained(folder, **options)
        self.texts.save(str(Path(folder) / TOKENIZER_FILE), pretty=False)

    @property
    def context_length(self) -> int:
        return self.config.context_length

    @property
    def text_dim(self) -> int:
        """Width of `text_features`."""
        return self.encoder.dim

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, its end included."""
        return len(self.texts.encode(text).ids)

    def text_features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> features ``[B, L, text_dim]`` and mask bool ``[B, L]``, L the longest text's."""
        rows = []
        for text in texts:
            ids = self.texts.encode(text).ids
            if len(ids) > self.context_length:  # The end token stays.
                ids = [*ids[: self.context_length - 1], ids[-1]]
            rows.append(torch.tensor(ids))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
        return self.encoder(ids.to(self.device), mask), mask


def _read_tokenizer(folder: Path) -> TextTokenizer:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise InputError(f'"{path}" is missing: this text tower is not complete.')
    texts = TextTokenizer.from_file(str(path))
    texts.no_padding()  # A published tokenizer.json may hold the lengths of its last use.
    texts.no_truncation()
    return texts
