"""FlexTok over its VAE: tokenise, denoise, detokenise with each guidance."""

from __future__ import annotations

import torch

from tessera.tokenizers.guidance import NormalizedGuidance, classifier_free_guidance
from tessera.tokenizers.image.flextok import FlexTok, TimeEmbed
from tessera.weights.convert.flextok import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    channels = c["vae_block_out_channels"]
    model = FlexTok(
        image_size=c["image_size"],
        vae_config={
            "block_out_channels": channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            "layers_per_block": c["vae_layers_per_block"],
            "latent_channels": c["latent_channels"],
            "sample_size": c["image_size"],
        },
        vae_scaling_factor=c["vae_scaling_factor"],
        latent_channels=c["latent_channels"],
        latent_size=c["image_size"] // 2 ** (len(channels) - 1),
        patch_size=c["patch_size"],
        max_grid=c["max_grid"],
        num_registers=c["n_registers"],
        fsq_levels=c["fsq_levels"],
        encoder_dim=c["enc_dim"],
        encoder_depth=c["enc_depth"],
        decoder_dim=c["dec_dim"],
        decoder_depth=c["dec_depth"],
        head_dim=c["head_dim"],
        mlp_ratio=c["mlp_ratio"],
        max_timestep=c["max_timestep"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def vae_encode(case):
    return {"latents": build(case).encode_latents(case.inputs["images"])}


def tokenize(case):
    model = build(case)
    z = model.encoder(model.encode_latents(case.inputs["images"]), model.num_tokens)
    quant, _ = model.quantizer(z)
    return {"z": z, "quant": quant, "tokens": model.encode(case.inputs["images"])}


def encode_mixed_sizes(case):
    model = build(case)
    results = {}
    for side in ("a", "b"):
        latents = case.inputs[f"lat_{side}"]
        latents = latents if latents.ndim == 4 else latents[None]
        z = model.encoder(latents, model.num_tokens)
        results[f"z_{side}"], results[f"tokens_{side}"] = z, model.quantizer(z)[1]
    return results


def fsq_lookup(case):
    return {"embedding": build(case).quantizer.ids_to_codes(case.inputs["ids"])}


def fsq_quantize(case):
    quant, ids = build(case).quantizer(case.inputs["fsq_z"])
    return {"quant": quant, "tokens": ids}


def denoise(case):
    model = build(case)
    tokens, keep = case.inputs["dec_tokens"], case.inputs.get("keep_k")
    drop = None
    if case.name == "denoise_uncond":
        drop = torch.ones(len(tokens), dtype=torch.bool)
    codes = model.quantizer.ids_to_codes(tokens)
    condition = model.decoder.condition(codes, keep, drop)
    return {"velocity": model.decoder(case.inputs["x_t"], case.inputs["t"], *condition)}


def decode(case):
    model = build(case)
    guidance = classifier_free_guidance
    if case.args["normalised_guidance"]:
        guidance = NormalizedGuidance(
            *(case.args[k] for k in ("momentum", "norm_threshold", "eta"))
        )
    prefixes = [
        row[:k] for row, k in zip(case.inputs["dec_tokens"], case.inputs["keep_k"], strict=True)
    ]
    latents = model.sample_latents(
        prefixes,
        case.args["timesteps"],
        case.args["guidance_scale"],
        noise=case.inputs["noise"],
        guidance=guidance,
    )
    return {"latents": latents, "images": model.decode_latents(latents)}


def timestep_features(case):
    return {
        f"max_timestep_{value:g}": TimeEmbed(8, value).features(case.inputs["te_t"])
        for value in case.args["max_timesteps"]
    }


RUNNERS = {
    "vae_encode": vae_encode,
    "tokenize": tokenize,
    "encode_mixed_sizes": encode_mixed_sizes,
    "fsq_lookup": fsq_lookup,
    "fsq_quantize": fsq_quantize,
    "denoise_all_tokens": denoise,
    "denoise_truncated": denoise,
    "denoise_uncond": denoise,
    "decode_plain_3steps": decode,
    "decode_cfg_4steps": decode,
    "decode_apg_4steps": decode,
    "timestep_features": timestep_features,
}
