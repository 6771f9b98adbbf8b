"""VAR: multi-scale tokenizer and next-scale transformer."""

from __future__ import annotations

import torch

from tessera.generators.next_scale.var import VAR
from tessera.generators.sampling import guide, probabilities
from tessera.tokenizers.image.var_vqvae import MultiScaleVQVAE
from tessera.weights.convert import var, var_vqvae
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


def build_generator(case):
    c = case.config["var"]
    generator = VAR(
        vocab_size=case.config["vae"]["vocab_size"],
        code_dim=case.config["vae"]["z_channels"],
        patch_nums=c["patch_nums"],
        num_classes=c["num_classes"],
        dim=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_ratio=case.config["mlp_ratio"],
        l2_norm=c["attn_l2_norm"],
        shared_adaln=c["shared_aln"],
    ).eval()
    load_strict(generator, var.convert_state_dict(case.state("var."), dict(generator.config)))
    return generator


def encode(case):
    tokenizer = build_tokenizer(case)
    latents = tokenizer.encode_latents(case.inputs["image"])
    codes, ids, _ = tokenizer.quantizer(latents)
    return {"f": latents, "ids": ids, "f_hat": codes}


def decode(case):
    return {"image": build_tokenizer(case).decode(case.inputs["ids"])}


def var_input(case):
    return {"x": build_tokenizer(case).quantizer.next_inputs(case.inputs["ids"])}


def logits(case):
    return {"logits": build_generator(case).logits(case.inputs["x"], case.inputs["labels"])}


def filtered(case):
    values = case.inputs["logits"]
    probs = probabilities(
        values.flatten(0, 1), 1.0, case.args["top_k"] or None, case.args["top_p"] or 1.0
    )
    return {"probs": probs.view(values.shape)}


def sample_greedy(case):
    tokenizer, generator = build_tokenizer(case), build_generator(case)
    labels = case.inputs["labels"]
    scale = 1 + case.args["cfg"]
    ids = generator.generate(
        labels,
        [torch.Generator() for _ in labels],
        tokenizer.quantizer,
        guidance_scale=scale,
        top_k=case.args["top_k"] or generator.config.vocab_size,
        top_p=case.args["top_p"] or 1.0,
    )
    inputs = tokenizer.quantizer.next_inputs(ids)
    null = torch.full_like(labels, case.args["null_label"])
    last = case.config["var"]["patch_nums"][-1] ** 2
    both = generator.logits(inputs, labels), generator.logits(inputs, null)
    return {
        "ids": ids,
        "logits_last": guide(*both, scale)[:, -last:],
        "image": (tokenizer.decode(ids) + 1) / 2,
    }


RUNNERS = {
    "encode": encode,
    "decode": decode,
    "var_input": var_input,
    "logits": logits,
    "filter_topk_topp": filtered,
    "filter_topp": filtered,
    "sample_greedy": sample_greedy,
}
