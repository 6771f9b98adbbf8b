"""One miniature of every generator of pictures: three items' conditions, settings, a training batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from tessera.generators.autoregressive.flexar import FlexAR, FlexARClass
from tessera.generators.autoregressive.rar import RAR
from tessera.generators.autoregressive.token_shuffle import TokenShuffleAR
from tessera.generators.autoregressive.tokenbridge import TokenBridge
from tessera.generators.autoregressive.xar import XAR
from tessera.generators.masked.enat import ENAT
from tessera.generators.masked.himar import HiMAR
from tessera.generators.masked.maskgen import MaskGenKL, MaskGenVQ
from tessera.generators.masked.maskgit import MaskGIT
from tessera.generators.next_scale.flowar import FlowAR
from tessera.generators.next_scale.var import VAR
from tessera.tests.tiny import streams
from tessera.tokenizers.quantizers.residual import MultiScaleResidualVQ

V, CLASSES, C, TEXT = 24, 5, 3, 16
LABELS = torch.tensor([0, 3, 4])


@dataclass
class Tiny:
    """A model with random weights, and what three items need.

    Attributes:
        items: of `stream`, one row an item.
        shared: of `stream`, for all items alike.
        training: of `forward`, beside the tokens.
        scale: of its random weights.
    """

    model: ModelMixin
    items: dict[str, Any] = field(default_factory=lambda: {"labels": LABELS})
    shared: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=lambda: {"labels": LABELS})
    scale: float = 0.3

    @property
    def vocab_size(self) -> int:
        config = self.model.config
        return config.levels if "levels" in config else config.vocab_size

    @property
    def discrete(self) -> bool:
        return self.model.config.get("latent_dim") is None

    def tokens(self, seed: int = 2) -> Tensor:
        """Three items' tokens."""
        random = torch.Generator().manual_seed(seed)
        shape = (3, self.model.num_tokens)
        if self.discrete:
            return torch.randint(0, self.vocab_size, shape, generator=random)
        return torch.randn(*shape, self.model.config.latent_dim, generator=random)

    def generate(
        self, seeds: tuple[int, ...] = (0, 1, 2), rows: Any = slice(None), **more
    ) -> Tensor:
        """What the items of ``rows`` draw, each with its own seed."""
        return list(self.stream(seeds, rows, **more))[-1]

    def stream(self, seeds: tuple[int, ...] = (0, 1, 2), rows: Any = slice(None), **more):
        items = {name: value[rows] for name, value in self.items.items()}
        given = {"generators": streams(*seeds), **items, **self.shared, **more}
        return self.model.stream(**given)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _flexar() -> Tiny:
    features, mask = _random(3, 5, TEXT), torch.ones(3, 5).bool()
    text = {"text_features": features, "text_mask": mask}
    null = {"null_features": _random(1, 5, TEXT), "null_mask": torch.ones(1, 5).bool()}
    model = FlexAR(V, 12, dim=32, depth=2, heads=2, mlp_hidden=48, text_dim=TEXT)
    return Tiny(model, text, null, text)


def _maskgen(kind: type, scale: float, **options: Any) -> Tiny:
    text = {"text_features": _random(3, 6, TEXT), "pooled": _random(3, TEXT)}
    null = {"null_features": _random(1, 6, TEXT), "null_pooled": _random(1, TEXT)}
    sizes = {"num_tokens": 8, "dim": 32, "depth": 2, "heads": 4, "text_dim": TEXT, "micro_dim": 8}
    model = kind(**sizes, **options, num_steps=4)
    return Tiny(model, text, null, text, scale)


def _masked(kind: type, **options: Any) -> Tiny:
    return Tiny(kind(V, 12, CLASSES, dim=32, heads=4, mlp_hidden=48, num_steps=4, **options))


def _tokenbridge() -> Tiny:
    sizes = {f"{part}_dim": 32 for part in ("encoder", "decoder", "head")}
    sizes |= {f"{part}_depth": 2 for part in ("encoder", "decoder", "head")}
    sizes |= {f"{part}_heads": 4 for part in ("encoder", "decoder", "head")}
    model = TokenBridge(
        9,
        4,
        8,
        channel_order=(2, 0, 3, 1),
        num_classes=CLASSES,
        buffer_size=3,
        num_steps=4,
        **sizes,
    )
    return Tiny(model)


def _token_shuffle() -> Tiny:
    model = TokenShuffleAR(V, (3, 5), (2, 2), 10, dim=32, depth=2, heads=4, mlp_hidden=48)
    texts = {"prompts": [[1, 2, 3], [], [7]]}
    return Tiny(model, texts, training=texts)


def _himar() -> Tiny:
    sizes = {"encoder_dim": 32, "encoder_depth": 2, "encoder_heads": 4, "buffer_size": 3}
    sizes |= {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 2, "mlp_ratio": 2.0}
    sizes |= {"head_dim": 24, "head_depth": 2, "dit_dim": 24, "dit_depth": 2, "dit_heads": 2}
    model = HiMAR(C, 4, 16, CLASSES, pivot_steps=2, num_steps=2, **sizes)
    # Few kept timesteps of small noise, so that random weights stay bounded.
    steps = {"pivot_diffusion_steps": [0, 150, 300], "diffusion_steps": [0, 200, 400]}
    training = {"labels": LABELS, "pivots": _random(3, 4, C)}
    return Tiny(model, shared=steps, training=training, scale=0.15)


def _var() -> Tiny:
    scales = (1, 2, 3, 4)
    quantizer = MultiScaleResidualVQ(V, 8, scales)
    torch.nn.init.normal_(quantizer.codebook.embedding.weight, std=0.3)
    model = VAR(V, 8, scales, CLASSES, dim=32, depth=2, heads=4, top_k=V, top_p=1.0)
    return Tiny(model, shared={"quantizer": quantizer})


def _flowar() -> Tiny:
    sizes = {"dim": 32, "encoder_depth": 1, "decoder_depth": 2, "heads": 2}
    sizes |= {"flow_dim": 64, "flow_depth": 2, "cross_attention": True, "num_steps": 4}
    return Tiny(FlowAR(C, (1, 2, 4), CLASSES, **sizes), scale=0.1)


def _xar() -> Tiny:
    sizes = {"dim": 32, "encoder_depth": 1, "decoder_depth": 2, "heads": 2, "num_steps": 3}
    return Tiny(XAR(C, 4, 2, CLASSES, **sizes), scale=0.2)


MAKERS = {
    "rar": lambda: Tiny(RAR(V, 12, CLASSES, dim=32, depth=2, heads=4, mlp_hidden=48)),
    "flexar": _flexar,
    "flexar-class": lambda: Tiny(
        FlexARClass(V, 12, CLASSES, dim=32, depth=2, heads=2, mlp_hidden=48)
    ),
    "tokenbridge": _tokenbridge,
    "token-shuffle": _token_shuffle,
    "maskgit-bert": lambda: _masked(MaskGIT, trunk="bert", depth=2),
    "maskgit-uvit": lambda: _masked(MaskGIT, trunk="uvit", depth=2),
    "maskgen-vq": lambda: _maskgen(MaskGenVQ, 0.3, vocab_size=V, unused_ids=3, guidance_scale=4.0),
    "maskgen-kl": lambda: _maskgen(
        MaskGenKL, 0.2, latent_dim=C, head_dim=24, head_depth=2, diffusion_steps=6
    ),
    "enat": lambda: _masked(ENAT, encoder_depth=2, decoder_depth=1),
    "himar": _himar,
    "var": _var,
    "flowar": _flowar,
    "xar": _xar,
}


def tiny_generator(name: str, fresh: bool = False) -> Tiny:
    """One of `MAKERS`, every weight random, so that no path is zero.

    Args:
        fresh: weights as training starts with them.
    """
    torch.manual_seed(0)
    tiny = MAKERS[name]()
    if fresh:
        tiny.model.init_weights()
    else:
        for parameter in tiny.model.parameters():
            torch.nn.init.normal_(parameter, std=tiny.scale)
    tiny.model.eval()
    if "quantizer" in tiny.shared and "inputs" not in tiny.training:
        with torch.no_grad():
            tiny.training["inputs"] = tiny.shared["quantizer"].next_inputs(tiny.tokens())
    return tiny
