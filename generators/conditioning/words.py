"""A caption as the sum of what its words are made of: for models whose captions are few and plain.

After "Enriching Word Vectors with Subword Information" (Bojanowski et al., 2017), arXiv 1607.04606:
a word is its own vector, if it is known, plus those of its letter trigrams, hashed. So a typo, a
plural or an unknown compound still lands near what it is made of.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_WORDS = 24


class WordEncoder(nn.Module):
    """Captions -> one vector for each word, with its position.

    Args:
        words: known ones, lower case.
        dim: of the vectors.
        buckets: of the hashed trigrams.
    """

    def __init__(self, words: Sequence[str], dim: int, buckets: int = 2048):
        super().__init__()
        self.ids = {word: i for i, word in enumerate(words)}
        self.buckets = buckets
        # One table: the known words, then the trigrams. The last row is the empty caption.
        self.table = nn.EmbeddingBag(len(words) + buckets + 1, dim, mode="mean")
        self.positions = nn.Parameter(torch.zeros(MAX_WORDS, dim))
        nn.init.normal_(self.table.weight, std=0.02)

    def rows(self, word: str) -> list[int]:
        """Rows of the table that a word is the mean of."""
        marked = f"<{word}>"
        grams = {marked[i : i + 3] for i in range(len(marked) - 2)}
        known = [self.ids[word]] if word in self.ids else []
        return known + [
            len(self.ids) + zlib.crc32(gram.encode()) % self.buckets for gram in sorted(grams)
        ]

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions (the first `MAX_WORDS` words of each) -> ``[B, L, dim]`` and bool ``[B, L]``,
        True = a word. An empty caption is one word of its own."""
        split = [split_words(caption)[:MAX_WORDS] for caption in captions]
        rows = [[self.rows(word) for word in words] for words in split]
        empty = [[self.table.num_embeddings - 1]]
        rows = [item or empty for item in rows]
        flat = [row for item in rows for word in item for row in word]
        counts = torch.tensor([len(word) for item in rows for word in item])
        device = self.positions.device
        vectors = self.table(
            torch.tensor(flat, device=device), (counts.cumsum(0) - counts).to(device)
        )
        lengths = [len(item) for item in rows]
        padded = nn.utils.rnn.pad_sequence(vectors.split(lengths), batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
        return padded + self.positions[: padded.shape[1]], mask.to(device)


def split_words(caption: str) -> list[str]:
    """Lower-case words: letters, digits, and hyphens or apostrophes inside them."""
    return re.findall(r"\w+(?:[-']\w+)*", caption.lower())


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the words that are there: ``[B, L, D]``, ``[B, L]`` -> ``[B, D]``."""
    weights = F.normalize(mask.to(states.dtype), p=1, dim=1)
    return torch.einsum("bl,bld->bd", weights, states)
