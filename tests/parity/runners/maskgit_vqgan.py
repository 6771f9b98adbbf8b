"""MaskGIT-VQGAN under ENAT's names; its pictures need not be square."""

from __future__ import annotations

from tessera.tokenizers.image.maskgit_vqgan import MaskGITVQGAN
from tessera.weights.convert.enat_vqgan import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    assert c["embed_dim"] == c["z_channels"]
    model = MaskGITVQGAN(
        channel_mult=c["ch_mult"],
        hidden_channels=c["ch"],
        num_res_blocks=c["num_res_blocks"],
        z_channels=c["z_channels"],
        codebook_size=c["n_embed"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def encode(case):
    model = build(case)
    h = model.encoder(case.inputs["image"])
    return {"h": h, "ids": model.quantizer.nearest(h.permute(0, 2, 3, 1)).flatten()}


def decode(case):
    model = build(case)
    codes = model.quantizer.ids_to_codes(case.inputs["ids"].long())
    return {"image": model.decoder(codes.permute(0, 3, 1, 2))}


RUNNERS = {"encode": encode, "decode": decode}
