"""MaskGIT-VQGAN alone, under the names of TiTok's and RAR's release."""

from __future__ import annotations

from tessera.tokenizers.image.maskgit_vqgan import MaskGITVQGAN
from tessera.weights.convert.maskgit_vqgan import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = dict(case.config)
    model = MaskGITVQGAN(**c).eval()
    load_strict(model, convert_state_dict(case.state(), c))
    return model


def encode(case):
    model, image = build(case), case.inputs["image"]
    return {"hidden": model.encoder(image), "codes": model.encode(image * 2 - 1)}


def decode(case):
    return {"image": (build(case).decode(case.inputs["codes"].long()) + 1) / 2}


RUNNERS = {"encode": encode, "decode": decode}
