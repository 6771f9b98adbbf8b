"""WavTokenizer: encode, decode, one step of its codebook, its mel loss; resampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tessera.modalities.audio import log_mel, resample, to_channels
from tessera.tokenizers.audio.wavtokenizer import WavTokenizer
from tessera.tokenizers.quantizers.ema import EMACodebook, ema_step
from tessera.weights.convert.wavtokenizer import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c, row = case.config, int(case.inputs.get("bandwidth_id", torch.zeros(1)).flatten()[0])
    model = WavTokenizer(
        sample_rate=c["sample_rate"],
        filters=c["n_filters"],
        strides=c["downsamples"][::-1],
        lstm_layers=c["lstm_layers"],
        latent_dim=c["latent_dim"],
        vocab_size=c["vq_bins"],
        dim=c["backbone"]["dim"],
        intermediate_dim=c["backbone"]["intermediate_dim"],
        num_layers=c["backbone"]["num_layers"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config), bandwidth_id=row))
    return model


def encode_decode(case):
    model = build(case)
    audio = case.inputs["wav"][:, None]
    codes = model.encode(audio)
    features = model.quantizer.ids_to_codes(codes[:, 0]).mT
    return {
        "latent": model.encode_latents(audio),
        "codes": codes.transpose(0, 1),
        "features": features,
        "backbone": model.backbone(features),
        "audio": model.decode(codes)[:, 0],
    }


def decode_codes(case):
    model = build(case)
    codes = case.inputs["codes"].transpose(0, 1)
    features = model.quantizer.ids_to_codes(codes[:, 0]).mT
    return {
        "after_pos_net": model.backbone.pos_net(model.backbone.embed(features)),
        "audio": model.decode(codes)[:, 0],
    }


def vq_ema_step(case):
    i = case.inputs
    codebook = EMACodebook(*i["embed"].shape)
    codebook.embed.copy_(i["embed"])
    vectors = i["x"].mT
    codes = codebook.nearest(vectors)
    embed, sums, size = ema_step(
        i["embed_avg"],
        i["cluster_size"],
        vectors.flatten(0, 1),
        codes.flatten(),
        decay=case.args["decay"],
        eps=case.args["eps"],
    )
    loss = F.mse_loss(vectors, codebook.ids_to_codes(codes))
    return {
        "codes": codes,
        "commit_loss": loss[None],
        "embed": embed,
        "embed_avg": sums,
        "cluster_size": size,
    }


def mel_loss(case):
    options = {key: value for key, value in case.args.items() if key != "sample_rate"}
    real, fake = (
        log_mel(case.inputs[name], case.args["sample_rate"], **options)
        for name in ("wav", "wav_hat")
    )
    return {"logmel": real, "loss": F.l1_loss(fake, real)[None]}


def resampled(case):
    wav = to_channels(case.inputs["wav"], 1)
    return {"wav24": resample(wav, int(case.inputs["sr"]), case.args["target_sr"])}


RUNNERS = {
    "encode_decode_odd": encode_decode,
    "encode_decode_short": encode_decode,
    "encode_decode_exact": encode_decode,
    "decode_codes": decode_codes,
    "vq_ema_step": vq_ema_step,
    "mel_loss": mel_loss,
    "resample_441_stereo": resampled,
    "resample_16k_mono": resampled,
}
