"""KL-16: posterior and decoder."""

from __future__ import annotations

from tessera.tokenizers.image.kl16_vae import KL16VAE
from tessera.weights.convert.kl16_vae import convert_state_dict
from tessera.weights.loading import load_strict


def block_types(config, names, resolutions):
    """Plain or with attention, one a level, full resolution first."""
    sides = [config["resolution"] >> i for i in range(len(config["ch_mult"]))]
    return [names[side in resolutions] for side in sides]


def build(case):
    c = case.config
    down = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    up = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    model = KL16VAE(
        image_size=c["resolution"],
        block_out_channels=[c["ch"] * mult for mult in c["ch_mult"]],
        down_block_types=block_types(c, down, c["encoder_attn_resolutions"]),
        up_block_types=block_types(c, up, c["decoder_attn_resolutions"])[::-1],
        layers_per_block=c["num_res_blocks"],
        latent_channels=c["z_channels"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def encode(case):
    posterior = build(case).posterior(case.inputs["image"])
    return {"mean": posterior.mean, "logvar": posterior.logvar}


def decode(case):
    model = build(case)
    return {"image": model.decode_latents(case.inputs["latent"] * model.config.scaling_factor)}


RUNNERS = {"encode": encode, "decode": decode}
