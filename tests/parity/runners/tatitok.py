"""TA-TiTok, discrete and continuous."""

from __future__ import annotations

from tessera.tests.parity.runners.titok import encode, options, tokens
from tessera.tokenizers.image.tatitok import TATiTok
from tessera.weights.convert.tatitok import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = TATiTok(
        text_context_length=c["text_context_length"],
        text_embed_dim=c["text_embed_dim"],
        **options(case),
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def decode(case):
    return {"image": (build(case).decode(tokens(case), case.inputs["text_guidance"]) + 1) / 2}


RUNNERS = {"encode": lambda case: encode(build(case), case.inputs["image"]), "decode": decode}
