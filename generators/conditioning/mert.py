"""MERT, which hears a voice: Acoustic Music Understanding Model with Large-Scale Self-supervised Training.

Paper: Li et al., 2023, arXiv 2306.00107. Weights: m-a-p/MERT-v1-330M (CC-BY-NC-4.0), of which SongGen's
checkpoints hold a copy. The network is HuBERT's as transformers, an optional dependency, has it; the
scaling within MERT's attention is for half precision and changes no result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...tokenizers.audio.transformers_codecs import build_codec
from ...weights.convert.transformers_codecs import convert_network
from ...weights.loading import load_strict


class VoiceMERT(ModelMixin, ConfigMixin):
    """Sound at 24 kHz -> the states of all layers; see `songgen.encode_voice`.

    Args:
        hubert_config: arguments of transformers' ``HubertConfig``.
    """

    @register_to_config
    def __init__(self, hubert_config: Mapping[str, Any] | None = None):
        super().__init__()
        self.network = build_codec({**(hubert_config or {}), "model_type": "hubert"}, "hubert")

    @classmethod
    def from_published(
        cls, published: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> VoiceMERT:
        """Weights under MERT's names and its config.json.

        Raises:
            InputError: other weights, or transformers is not installed.
        """
        left_out = (
            "architectures",
            "auto_map",
            "model_type",
            "torch_dtype",
            "transformers_version",
        )
        hubert = {name: value for name, value in config.items() if name not in left_out}
        tower = cls(hubert)
        state = convert_network(published, {**hubert, "model_type": "hubert"})
        load_strict(tower.network, state)
        return tower.eval()

    @property
    def num_states(self) -> int:
        """Layers, and the first one's input."""
        return self.network.config.num_hidden_layers + 1

    @property
    def voice_dim(self) -> int:
        """Width of the states."""
        return self.network.config.hidden_size

    def forward(self, audio: Tensor, output_hidden_states: bool = True) -> Any:
        """Sound ``[B, L]`` -> transformers' output, whose ``hidden_states`` are ``[B, t, voice_dim]`` each."""
        return self.network(audio, output_hidden_states=output_hidden_states)
