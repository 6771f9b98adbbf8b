"""The language models of Mamba-1 and Mamba-2.

"Mamba" (Gu and Dao, arXiv 2312.00752) and "Transformers are SSMs" (Dao and Gu, arXiv 2405.21060). Code:
Apache-2.0. Published checkpoints: state-spaces/mamba-130m, -370m, -790m, -1.4b, -2.8b, -2.8b-slimpj and
state-spaces/mamba2-130m, -370m, -780m, -1.3b, -2.7b; their ids are those of the GPT-NeoX-20B tokenizer.

Pre-norm residual blocks over a float32 residual stream. What is carried from token to token has the
same size at any length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...kernels.linear import Linear, linear
from ...modalities.errors import InputError
from ..layers.mixer import State, build_mixer
from ..sampling import check_sampling, sample


class GatedMLP(nn.Module):
    """``value silu(gate)`` between two projections; fc1 holds (value, gate)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden, bias=False)
        self.fc2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class Block(nn.Module):
    """Mixer and, where ``mlp_hidden`` is not 0, an MLP; the residual is float32."""

    def __init__(self, dim: int, mixer: str, mixer_config: Mapping[str, Any], mlp_hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = build_mixer(mixer, dim, **mixer_config)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5) if mlp_hidden else None
        self.mlp = GatedMLP(dim, mlp_hidden) if mlp_hidden else None

    def forward(
        self, x: Tensor, state: State | None, seq_idx: Tensor | None, one: bool
    ) -> tuple[Tensor, State]:
        h = self.norm(x).to(self.norm.weight.dtype)
        if one:
            h, state = self.mixer.step(h, state)
        else:
            h, state = self.mixer(h, seq_idx=seq_idx, state=state, return_state=True)
        x = x + h
        if self.mlp is not None:
            x = x + self.mlp(self.norm2(x).to(self.norm2.weight.dtype))
        return x, state


class MambaLM(ModelMixin, ConfigMixin):
    """Token ids -> next ids. The defaults are mamba2-130m.

    Args:
        dim: width.
        depth: blocks.
        vocab_size: ids in use.
        vocab_multiple: the tables are padded to a multiple of it.
        mixer: "ssd" (Mamba-2), "s6" (Mamba-1), or another causal mixer whose steps are one token.
        mixer_config: arguments of the mixer.
        mlp_hidden: hidden width of an MLP after each mixer; 0: none.
        tie_embeddings: the head is the embedding table.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        depth: int = 24,
        vocab_size: int = 50277,
        vocab_multiple: int = 16,
        mixer: str = "ssd",
        mixer_config: Mapping[str, Any] | None = None,
        mlp_hidden: int = 0,
        tie_embeddings: bool = True,
    ):
        super().__init__()
        padded = -(-vocab_size // vocab_multiple) * vocab_multiple
        self.embedding = nn.Embedding(padded, dim)
        self.blocks = nn.ModuleList(
            Block(dim, mixer, mixer_config or {}, mlp_hidden) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = None if tie_embeddings else Linear(dim, padded, bias=False)

    def init_weights(self) -> None:
        """Embeddings normal 0.02, biases 0, projections into the residual scaled by depth.

        Biases of step sizes keep their own values.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        branches = len(self.blocks) * (2 if self.config.mlp_hidden else 1)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if module.bias is not None and not name.endswith("dt_proj"):
                nn.init.zeros_(module.bias)
            if name.endswith((".out_proj", ".proj", ".fc2")):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5)
                with torch.no_grad():
                    module.weight /= branches**0.5

    def init_state(self, batch: int) -> list[State]:
        """The state before the first token, one a block."""
        return [
            block.mixer.init_state(batch, self.device, self.embedding.weight.dtype)
            for block in self.blocks
        ]

    def hidden(
        self,
        tokens: Tensor,
        states: Sequence[State] | None = None,
        seq_idx: Tensor | None = None,
        one: bool = False,
    ) -> tuple[Tensor, list[State]]:
        """Ids ``[B, L]`` -> normed features ``[B, L, D]`` and the states after them.

        Args:
            states: of an earlier call: the tokens follow its tokens.
            seq_idx: int ``[B, L]``, documents packed in a row.
            one: a single token, by the mixers' one-step form, which changes the states in place.
        """
        x = self.embedding(tokens)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        after = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i], seq_idx, one)
            after.append(state)
        return self.norm(x).to(self.embedding.weight.dtype), after

    def to_logits(self, hidden: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., padded vocabulary]``."""
        return linear(hidden, (self.head or self.embedding).weight)

    def forward(
        self, tokens: Tensor, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of each next id of ``[B, L]``; none across the bounds of documents."""
        hidden, _ = self.hidden(tokens[:, :-1], None, None if seq_idx is None else seq_idx[:, :-1])
        logits = self.to_logits(hidden)[..., : self.config.vocab_size].float()
        target = tokens[:, 1:]
        if seq_idx is not None:
            target = target.masked_fill(seq_idx[:, 1:] != seq_idx[:, :-1], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        return loss, {"nll": loss.detach()}

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        generators: Sequence[torch.Generator],
        num_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Iterator[Tensor]:
        """Yield new ids ``[B]``, one after the other.

        Args:
            tokens: the prompt, ids ``[B, L]``, L >= 1.
            generators: one an item.

        Raises:
            InputError: an empty prompt, or a meaningless setting.
        """
        check_sampling(temperature, top_k, top_p)
        if tokens.shape[1] == 0:
            raise InputError("The prompt is empty: give at least one token.")
        hidden, states = self.hidden(tokens)
        for i in range(num_tokens):
            logits = self.to_logits(hidden[:, -1])[:, : self.config.vocab_size].float()
            new = sample(logits, temperature, top_k, top_p, generators)
            yield new
            if i + 1 < num_tokens:
                hidden, states = self.hidden(new[:, None], states, one=True)

    def generate(
        self,
        tokens: Tensor,
        generators: Sequence[torch.Generator],
        num_tokens: int,
        **settings: Any,
    ) -> Tensor:
        """All new ids of `stream`, int64 ``[B, num_tokens]``."""
        return torch.stack(list(self.stream(tokens, generators, num_tokens, **settings)), dim=1)
