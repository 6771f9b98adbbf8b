"""LARP: tokens and their probabilities, clips, position tables, the prior over codes."""

from __future__ import annotations

import torch

from tessera.tokenizers.video.larp import LARP
from tessera.weights.convert.larp import convert_state_dict
from tessera.weights.loading import load_strict


def build(case, temperature=None):
    c, prior = case.config, case.config["prior_model"]
    model = LARP(
        image_size=c["input_size"],
        num_frames=c["frame_num"],
        patch_size=c["patch_size"],
        temporal_patch_size=c["temporal_patch_size"],
        decoder_patch_size=c["decoder_patch_size"],
        decoder_temporal_patch_size=c["decoder_temporal_patch_size"],
        num_latent_tokens=c["bottleneck_token_num"],
        codebook_size=c["codebook_size"],
        code_dim=c["bottleneck_dim"],
        l2_norm=c["l2_normalized"],
        code_temperature=temperature or c["stochastic_temperature"],
        encoder_dim=c["encoder_hidden_size"],
        encoder_depth=c["encoder_depth"],
        encoder_heads=c["encoder_num_heads"],
        decoder_dim=c["decoder_hidden_size"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_num_heads"],
        prior_dim=prior["n_embd"],
        prior_depth=prior["n_layer"],
        prior_heads=prior["n_head"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def encode(case):
    model = build(case, case.args["code_temperature"])
    assert not case.args["stochastic"]
    video = case.inputs["video"] * 2 - 1
    latents, tokens = model.encode_latents(video), model.encode(video)
    return {
        "tokens": tokens,
        "z_projected": latents,
        "z_normalized": model.quantizer.normalize(latents),
        "code_probs": model.code_probabilities(latents),
        "decoder_input": model.from_codes(model.quantizer.ids_to_codes(tokens)),
    }


def decode(case):
    return {"video": (build(case).decode(case.inputs["tokens"].long()) + 1) / 2}


def tables(case):
    model = build(case)
    return {
        "encoder_patch_pe": model.encoder.positions[None],
        "decoder_latent_pe": model.decoder.latent_positions[None],
        "decoder_patch_query_embed": model.decoder.positions[None],
    }


def prior(case):
    model = build(case)
    predicted = model.prior(case.inputs["codes"])
    codebook = model.quantizer.ids_to_codes(torch.arange(model.vocab_size))
    logits = predicted[:, 1:] @ codebook.T / case.args["latent_ce_temperature"]
    return {"pred": predicted, "logits": logits}


RUNNERS = {"encode": encode, "decode": decode, "tables": tables, "prior": prior}
