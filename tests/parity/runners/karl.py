"""KARL over its base VQGAN: base codes, error bins, one whole pass."""

from __future__ import annotations

from tessera.tokenizers.image.karl import KARL
from tessera.weights.convert.karl import convert_state_dict
from tessera.weights.loading import load_strict

MID_BLOCKS = 2


def build(case):
    c = case.config
    state = case.state()
    model = KARL(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        base_type=c["base_tokenizer"],
        base_config={
            "channel_mult": c["ch_mult"],
            "hidden_channels": c["ch"],
            "num_res_blocks": c["num_res_blocks"],
            "mid_blocks": MID_BLOCKS,
            "z_channels": c["z_channels"],
            "codebook_size": c["n_embed"],
        },
        max_latent_tokens=len(state["latent_tokens"]),
        quantize_latent=c["quantize_latent"],
        codebook_size=c["vq_codebook_size"],
        token_size=c["vq_token_dim"],
        encoder_dim=c["encoder_width"],
        encoder_depth=c["encoder_layers"],
        encoder_heads=c["encoder_heads"],
        decoder_dim=c["decoder_width"],
        decoder_depth=c["decoder_layers"],
        decoder_heads=c["decoder_heads"],
        halt_threshold=case.args.get("halt_threshold", c["halt_threshold"]),
    ).eval()
    load_strict(model, convert_state_dict(state, dict(model.config)))
    return model


def base_encode(case):
    model = build(case)
    z = model.base_features(case.inputs["image"])
    ids = model.base.quantizer.nearest(z.flatten(2).transpose(1, 2))
    return {"h_mean": z.mean((2, 3)), "indices": ids}


def quality_bins(case):
    encoder = build(case).encoder
    bins = encoder.error_bin(case.inputs["targets"])
    return {"binned": encoder.errors[bins], "embedding": encoder.error_embedding(bins)}


def encode(case):
    model = build(case)
    error = next(value for name, value in case.inputs.items() if name.startswith("eps"))
    latents, halting = model.latents(case.inputs["image"], case.args["token_budget"], float(error))
    active = model.active(halting)
    results = {"halt_logits": halting, "active": active, "latents": latents}
    codes = latents
    if model.quantizer is not None:
        results["token_ids"] = model.quantizer.nearest(latents)
        results["quantized"] = codes = model.quantizer.ids_to_codes(results["token_ids"])
    outputs = model.decoder(codes, active)
    results["decoder_out_first8"] = outputs[:, :8]
    results["decoder_out_mean"] = outputs.mean(1)
    results["reconstruction"] = model.to_images(outputs)
    return results


RUNNERS = {"base_encode": base_encode, "quality_bins": quality_bins, "*": encode}
