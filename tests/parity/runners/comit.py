"""COMiT over a toy VAE: network calls, observation in each order, the flow decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tessera.tokenizers.guidance import NormalizedGuidance
from tessera.tokenizers.image.comit import COMiT
from tessera.weights.convert.comit import convert_state_dict
from tessera.weights.loading import load_strict


class OverToyVAE(COMiT):
    """Means of 8x8 pixels; the latents that `sample_latents` returned are kept."""

    factor = 8

    def encode_latents(self, images, generator=None):
        return F.avg_pool2d(images, self.factor)

    def decode_latents(self, latents):
        return F.interpolate(latents, scale_factor=self.factor, mode="nearest")

    def sample_latents(self, *args, **options):
        latents = super().sample_latents(*args, **options)
        self.sampled.append(latents)
        return latents


def build(case):
    c, args = case.config, case.args
    model = OverToyVAE(
        image_size=c["max_input_size"] * OverToyVAE.factor,
        crop_size=args.get("crop_size", 96),
        crop_stride=args.get("stride", 80),
        latent_channels=c["in_channels"],
        latent_size=c["max_input_size"],
        patch_size=c["patch_size"],
        num_message_tokens=c["num_msg_tokens"],
        fsq_levels=c["fsq_levels"],
        dim=c["hidden_size"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
    ).eval()
    model.sampled = []
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def predict(case):
    model, inputs = build(case), case.inputs
    x = inputs["x"] if "x" in inputs else inputs["crop"]
    t = inputs["t"] if "t" in inputs else torch.full((len(x),), case.args["t"])
    codes = model.quantizer.ids_to_codes(inputs["msg_ids"])
    velocity, message, offset = model.predictor(x, t, codes, inputs["offsets"])
    return {
        "velocity": velocity,
        "msg_raw": message,
        "msg_ids": model.quantizer(message)[1],
        "offset_pred": offset[:, None],
    }


def observe(case):
    model, args = build(case), case.args
    images = case.inputs["image_small"].repeat_interleave(args.get("upsample", 8), 2)
    images = images.repeat_interleave(args.get("upsample", 8), 3)
    order = {"raster_scan": "raster"}.get(args["order"]) if isinstance(args["order"], str) else None
    message = model.observe(
        images,
        order or args["order"],
        args["num_crops"],
        args["global_crop"],
        noise=case.inputs.get("noise"),
    )
    results = {"msg_ids": message.ids, "offsets": message.offset, "crop_ids": message.crops}
    if "reconstruction_index" in args:
        index = args["reconstruction_index"]
        results[f"one_step_latents_{index}"] = model.sampled[index]
    return results


def detokenize(case):
    model, args = build(case), case.args
    guidance = NormalizedGuidance(args["momentum"], args["norm_threshold"], args["eta"])
    latents = model.sample_latents(
        case.inputs["msg_ids"],
        case.inputs["offsets"],
        args["num_steps"],
        args["cfg_weight"],
        noise=case.inputs["noise"],
        solver=args["odesolver"],
        guidance=guidance,
    )
    return {"latents": latents}


RUNNERS = {
    "predict_full": predict,
    "predict_crop": predict,
    "tokenize_raster4": observe,
    "tokenize_global3": observe,
    "tokenize_order": observe,
    "adaptive3": observe,
    "detokenize_euler4_apg7.5": detokenize,
    "detokenize_midpoint2_nocfg": detokenize,
}
