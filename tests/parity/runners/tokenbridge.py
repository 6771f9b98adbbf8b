"""TokenBridge: dimension-wise quantizer, masked transformer, dimension-wise head."""

from __future__ import annotations

import torch

from tessera.generators.autoregressive.tokenbridge import TokenBridge
from tessera.tokenizers.quantizers.dimension_wise import gaussian_levels
from tessera.weights.convert.tokenbridge import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = TokenBridge(
        num_tokens=(c["img_size"] // c["vae_stride"]) ** 2,
        channels=c["vae_embed_dim"],
        levels=c["quant_levels"],
        value_range=(c["quant_min"], c["quant_max"]),
        std_range=c["std_range"],
        channel_order=c["channel_order"],
        num_classes=c["class_num"],
        encoder_dim=c["encoder_embed_dim"],
        encoder_depth=c["encoder_depth"],
        encoder_heads=c["encoder_num_heads"],
        decoder_dim=c["decoder_embed_dim"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_num_heads"],
        head_dim=c["channel_embed_dim"],
        head_depth=c["channel_depth"],
        head_heads=c["channel_heads"],
        mlp_ratio=c["mlp_ratio"],
        buffer_size=c["buffer_size"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def tables(case):
    boundaries, values = gaussian_levels(case.config["quant_levels"], case.config["std_range"])
    return {"reconstruction_values": values, "boundaries": boundaries}


def quantize(case):
    values, ids = build(case).quantizer(case.inputs["latents"])
    return {"indices": ids.flatten(2).transpose(1, 2), "dequant": values}


def encoder_decoder(case):
    model = build(case)
    latents, mask = case.inputs["latents"].flatten(2).transpose(1, 2), case.inputs["mask"]
    visible = mask.argsort(dim=1, stable=True)[:, : int((mask[0] == 0).sum())]
    every = torch.arange(mask.shape[1]).expand_as(mask)
    return {"z": model.features(latents, visible, every, model.classes(case.inputs["labels"]))}


def channel_logits(case):
    model, hidden = build(case), case.inputs["mask"].bool()
    targets = case.inputs["indices"][hidden][:, case.config["channel_order"]]
    return {"logits": model.head.logits(case.inputs["z"][hidden], targets)}


def channel_greedy(case):
    model = build(case)
    features = case.inputs["z"][case.args["item"], : case.args["positions"]]
    noise = torch.ones(len(features), model.config.channels, model.config.levels)
    return {"tokens": model.head.sample(features, case.args["temperature"], noise)}


def sample_greedy(case):
    model, labels = build(case), case.inputs["labels"]
    ids = model.generate(
        labels,
        [torch.Generator() for _ in labels],
        num_steps=case.args["num_iter"],
        guidance_scale=case.args["cfg"],
        guidance_schedule=case.args["cfg_schedule"],
        temperature=case.args["temperature"],
        orders=case.inputs["orders"].long(),
    )
    side = case.config["img_size"] // case.config["vae_stride"]
    latents = model.quantizer.ids_to_codes(ids).unflatten(1, (side, side, -1))
    return {"latents": latents.permute(0, 3, 1, 2)}


RUNNERS = {
    "tables": tables,
    "quantize": quantize,
    "encoder_decoder": encoder_decoder,
    "channel_logits": channel_logits,
    "channel_greedy": channel_greedy,
    "sample_greedy": sample_greedy,
}
