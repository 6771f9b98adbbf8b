"""CLIP: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021).

Paper: arXiv 2103.00020. The towers are open_clip's own model classes. The shipped sticker CLIP is
trained by this project with a small BPE of its own; any open_clip checkpoint plugs in by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from huggingface_hub import hf_hub_download
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from ...modalities.errors import InputError

BPE_FILE = "bpe.json"


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPE:
    """A lower-casing byte-level BPE; id 0 pads, the two highest ids start and end a text."""
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(["<start>", "<end>"])
    return bpe


class TextImageCLIP(ModelMixin, ConfigMixin):
    """A text tower and an image tower over one embedding space.

    Its text tower conditions generators (`text_features`); the pair scores pictures against prompts
    (`encode_text`, `encode_image`).

    Args:
        embed_dim: width of the shared space.
        vision_cfg, text_cfg: arguments of open_clip's ``CLIPVisionCfg`` and ``CLIPTextCfg``.
        open_clip_name: an architecture of open_clip in place of the two, with its own tokenizer.
        image_mean, image_std: normalisation of pictures in [0, 1].
    """

    @register_to_config
    def __init__(
        self,
        embed_dim: int = 256,
        vision_cfg: dict[str, Any] | None = None,
        text_cfg: dict[str, Any] | None = None,
        open_clip_name: str | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.bpe: BPE | None = None
        if open_clip_name is None:
            self.model = open_clip.CLIP(embed_dim, dict(vision_cfg or {}), dict(text_cfg or {}))
        else:
            self.model = open_clip.create_model(open_clip_name, pretrained=None)
        self.register_buffer("mean", torch.tensor(image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(image_std)[:, None, None], persistent=False)

    @classmethod
    def from_open_clip(cls, name: str, pretrained: str) -> TextImageCLIP:
        """A real CLIP by open_clip's names, e.g. ``("ViT-B-16", "openai")``, or a weight file."""
        if name not in open_clip.list_models():
            raise InputError(f'open_clip knows no model "{name}": see open_clip.list_models().')
        try:
            weights = open_clip.create_model(name, pretrained=pretrained).state_dict()
        except Exception as error:
            raise InputError(
                f'Could not load weights "{pretrained}" of "{name}": {str(error).splitlines()[0]}'
            ) from error
        model = cls(
            open_clip_name=name, image_mean=OPENAI_DATASET_MEAN, image_std=OPENAI_DATASET_STD
        )
        model.model.load_state_dict(weights)
        return model.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> TextImageCLIP:
        """Weights and config as in diffusers; our own towers also need ``bpe.json`` beside them."""
        model = super().from_pretrained(folder, **options)
        if model.config.open_clip_name is None:
            subfolder = options.get("subfolder") or ""
            path = Path(folder) / subfolder / BPE_FILE
            if not Path(folder).is_dir():
                path = hf_hub_download(str(folder), BPE_FILE, subfolder=subfolder or None)
            elif not path.is_file():
                raise InputError(f'"{path}" is missing: this CLIP folder is not complete.')
            model.bpe = BPE.from_file(str(path))
        return model

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        super().save_pretrained(folder, **options)
        if self.bpe is not None:
            self.bpe.save(str(Path(folder) / BPE_FILE), pretty=False)

    @property
    def context_length(self) -> int:
        """Longest text in tokens, start and end included."""
        return self.model.context_length

    @property
    def text_dim(self) -> int:
        """Width of `text_features`."""
        return self.model.ln_final.normalized_shape[0]

    @property
    def image_size(self) -> int:
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, start and end included."""
        if self.bpe is not None:
            return len(self.bpe.encode(text).ids) + 2
        return len(open_clip.get_tokenizer(self.config.open_clip_name).encode(text)) + 2

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> ids int64 ``[B, context_length]``; the end of a text too long is cut off."""
        if self.bpe is None:
            return open_clip.get_tokenizer(self.config.open_clip_name)(list(texts)).to(self.device)
        start, end = self.bpe.token_to_id("<start>"), self.bpe.token_to_id("<end>")
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, encoding in zip(ids, self.bpe.encode_batch(list(texts)), strict=True):
            text = [start, *encoding.ids[: self.context_length - 2], end]
            row[: len(text)] = torch.tensor(text)
        return ids.to(self.device)

    def text_features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> features ``[B, L, text_dim]`` and mask bool ``[B, L]``, L the longest text's."""
        ids = self.tokenize(texts)
        found = self.model.forward_intermediates(
            text=ids, text_indices=1, normalize_intermediates=True, intermediates_only=True
        )
        features = found["text_intermediates"][-1]
        # The end token has the highest id, so argmax finds the length.
        last = ids.argmax(-1)
        length = int(last.max()) + 1
        mask = torch.arange(length, device=ids.device) <= last[:, None]
        return features[:, :length], mask

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> ``[B, embed_dim]``, L2-normalised."""
        return self.model.encode_text(self.tokenize(texts), normalize=True)

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [-1, 1], any size -> ``[B, embed_dim]``, L2-normalised."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = ((images.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        return self.model.encode_image(images.to(self.dtype), normalize=True)

    def forward(
        self, images: Tensor, ids: Tensor, positives: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Contrastive loss with several positives.

        Args:
            images: ``[B, 3, S, S]`` in [-1, 1].
            ids: ``[B, L]`` of `tokenize`.
            positives: bool ``[B, B]``: text j (column) describes image i (row).
        """
        image = self.encode_image(images).float()
        text = self.model.encode_text(ids, normalize=True).float()
        logits = self.model.logit_scale.exp().clamp(max=100) * image @ text.T
        targets = positives.float()
        by_image = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
        by_text = F.cross_entropy(logits.T, targets.T / targets.T.sum(1, keepdim=True))
        hit = positives[torch.arange(len(image)), logits.argmax(1)].float().mean()
        return (by_image + by_text) / 2, {"image_to_text": hit}
