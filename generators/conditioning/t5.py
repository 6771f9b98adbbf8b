"""T5's encoder as a text tower: Exploring the Limits of Transfer Learning (Raffel et al., 2020).

Paper: arXiv 1910.10683. The network is transformers' `T5EncoderModel`. The published FlexAR models read
google/flan-t5-xl (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from ...modalities.errors import InputError

TOKENIZER_FILE = "tokenizer.json"


class TextT5(ModelMixin, ConfigMixin):
    """Text -> features of every token.

    Args:
        t5_config: arguments of transformers' ``T5Config``.
        context_length: tokens that are read of a text, its end token included.
    """

    @register_to_config
    def __init__(self, t5_config: Mapping[str, Any] | None = None, context_length: int = 128):
        super().__init__()
        self.texts: TextTokenizer | None = None
        self.encoder = T5EncoderModel(T5Config(**(t5_config or {}))).encoder

    @classmethod
    def from_hub(cls, repository: str) -> TextT5:
        """A published T5 by its hub id, e.g. "google/flan-t5-xl": from the cache, else downloaded.

        Raises:
            InputError: it is not there, and the hub cannot be reached.
        """
        try:
            try:
                encoder = T5EncoderModel.from_pretrained(repository, local_files_only=True)
            except OSError:
                encoder = T5EncoderModel.from_pretrained(repository)
            path = hf_hub_download(repository, TOKENIZER_FILE)
        except Exception as error:  # The hub's and the network's many kinds of failure.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f'Could not load the text tower "{repository}" ({reason}): download it elsewhere '
                "into the hub's cache."
            ) from error
        with torch.device("meta"):
            tower = cls(encoder.config.to_diff_dict())
        tower.encoder = encoder.encoder
        tower.texts = TextTokenizer.from_file(path)
        return tower.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> TextT5:
        """Weights and config as in diffusers, and ``tokenizer.json`` beside them."""
        tower = super().from_pretrained(folder, **options)
        path = Path(folder) / (options.get("subfolder") or "") / TOKENIZER_FILE
        if not path.is_file():
            raise InputError(f'"{path}" is missing: this text tower is not complete.')
        tower.texts = TextTokenizer.from_file(str(path))
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
        return self.encoder.config.d_model

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
        padding = self.encoder.config.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
        found = self.encoder(input_ids=ids.to(self.device), attention_mask=mask.long())
        return found.last_hidden_state, mask
