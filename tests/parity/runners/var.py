"""VAR's multi-scale tokenizer."""

from __future__ import annotations

from tessera.tokenizers.image.var_vqvae import MultiScaleVQVAE
from tessera.weights.convert import var_vqvae
from tessera.weights.loading import load_strict


def build_tokenizer(case):
    c = case.config["vae"]
    tokenizer = MultiScaleVQVAE(
        vocab_size=c["vocab_size"],
        code_dim=c["z_channels"],
        block_out_channels=[c["ch"] * mult for mult in (1, 1, 2, 2, 4)],
        patch_nums=c["v_patch_nums"],
        num_phi=c["share_quant_resi"],
        phi_ratio=case.config["quant_resi"],
    ).eval()
    state = var_vqvae.convert_state_dict(case.state("vae."), dict(tokenizer.config))
    load_strict(tokenizer, state)
    return tokenizer


def encode(case):
    tokenizer = build_tokenizer(case)
    latents = tokenizer.encode_latents(case.inputs["image"])
    codes, ids, _ = tokenizer.quantizer(latents)
    return {"f": latents, "ids": ids, "f_hat": codes}


def decode(case):
    return {"image": build_tokenizer(case).decode(case.inputs["ids"])}


def var_input(case):
    return {"x": build_tokenizer(case).quantizer.next_inputs(case.inputs["ids"])}


RUNNERS = {"encode": encode, "decode": decode, "var_input": var_input}
