"""TiTok, two-stage and single-stage, discrete and continuous."""

from __future__ import annotations

from tessera.tokenizers.image.titok import TiTok
from tessera.weights.convert.titok import convert_state_dict
from tessera.weights.loading import load_strict


def options(case):
    """The arguments that TiTok and TA-TiTok share."""
    c = case.config
    shared = {
        f"{part}_{ours}": c[part][theirs]
        for part in ("encoder", "decoder")
        for ours, theirs in (("dim", "width"), ("depth", "layers"), ("heads", "heads"))
    }
    for key in ("image_size", "patch_size", "num_latent_tokens", "quantize_mode", "token_size"):
        shared[key] = c[key]
    if c["quantize_mode"] == "vq":
        shared |= {"codebook_size": c["codebook_size"], "use_l2_norm": c["use_l2_norm"]}
    return shared


def build(case):
    c = case.config
    assert c["two_stage"] == c["is_legacy"]
    model = TiTok(
        two_stage=c["two_stage"], pixel_decoder=c.get("pixel_decoder"), **options(case)
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def published(x):
    """``[B, K, C]`` -> the published layout ``[B, C, 1, K]``, or back."""
    return x.transpose(1, 2)[:, :, None] if x.ndim == 3 else x[:, :, 0].transpose(1, 2)


def encode(model, image):
    """Every output that an encode case may ask for; pictures in [0, 1]."""
    image = image * 2 - 1
    z = model.encode_latents(image)
    if model.quantizer is None:
        posterior = model.posterior(image)
        return {"moments": published(z), "mean": posterior.mean, "std": posterior.std}
    ids = model.encode(image)
    quantized = published(model.quantizer.ids_to_codes(ids))
    return {"z": published(z), "z_quantized": quantized, "indices": ids[:, None]}


def tokens(case):
    """Ids ``[B, K]`` or latents ``[B, K, C]`` of a decode case."""
    if "latent" in case.inputs:
        return published(case.inputs["latent"])
    return case.inputs["indices"].flatten(1).long()


def decode(case):
    model = build(case)
    results = {"image": (model.decode(tokens(case)) + 1) / 2}
    if case.config["two_stage"]:
        logits = model.head.proj(model.decoder(model.tokens_to_codes(tokens(case))))
        results["proxy_logits"] = logits.transpose(1, 2).unflatten(2, (model.grid, model.grid))
    return results


def sample_posterior(case):
    noise = published(case.inputs["noise"])
    return {"latent": published(build(case).encode(case.inputs["image"] * 2 - 1, noise=noise))}


RUNNERS = {
    "encode": lambda case: encode(build(case), case.inputs["image"]),
    "decode": decode,
    "sample_posterior": sample_posterior,
}
