"""MaskGen over continuous tokens: features, diffusion head, its process, whole sampling runs."""

from __future__ import annotations

import torch

from tessera.generators.flow.diffusion import GaussianDiffusion, spaced_timesteps
from tessera.generators.masked.maskgen import MaskGenKL
from tessera.generators.sampling import guide
from tessera.weights.convert.maskgen import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = MaskGenKL(
        latent_dim=c["token_size"],
        num_tokens=c["num_latent_tokens"],
        scale_factor=c["scale_factor"],
        dim=c["decoder_embed_dim"],
        depth=c["decoder_depth"],
        heads=c["decoder_num_heads"],
        head_dim=c["diffloss_w"],
        head_depth=c["diffloss_d"],
        text_dim=c["text_embed_dim"],
        micro_dim=c["micro_condition_embed_dim"] if c["micro_condition"] else 0,
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def forward(case):
    model, inputs = build(case), case.inputs
    score = inputs["aesthetic"]
    condition = model.transformer.condition(inputs["condition"], inputs["pooled"][:, 0], score)
    return {
        "micro": model.transformer.embed_score(score * case.args["aesthetic_factor"] / 100),
        "z": model.features(inputs["tokens"], inputs["mask"].bool(), condition),
    }


def diffusion_head(case):
    head, inputs = build(case).head, case.inputs
    return {"eps_and_var": head(inputs["x"], inputs["t"], inputs["z"])}


def diffusion_head_cfg(case):
    head, inputs = build(case).head, case.inputs
    x = inputs["x"].chunk(2)[0].repeat(2, 1)
    noise, variance = head(x, inputs["t"], inputs["z"]).chunk(2, dim=-1)
    noise = guide(*noise.chunk(2), case.args["guidance_scale"]).repeat(2, 1)
    return {"eps_and_var": torch.cat([noise, variance], dim=-1)}


def process(case, timesteps=None):
    assert case.args.get("noise_schedule", "cosine") == "cosine"
    assert case.args.get("variance", "learned_range") == "learned_range"
    return GaussianDiffusion(timesteps, case.args["num_train_timesteps"])


def diffusion_loss(case):
    head, inputs, full = build(case).head, case.inputs, process(case)
    step = inputs["t"].long()
    x = full.add_noise(inputs["x0"], step, inputs["noise"])
    output = head(x, step, inputs["z"])
    mse, bound = full.losses(output, inputs["x0"], x, step, inputs["noise"])
    return {"mse": mse, "vb": bound, "loss": mse + bound}


def schedule(case):
    count = int(case.inputs["num_sampling_steps"])
    kept = process(case, spaced_timesteps(count, case.args["num_train_timesteps"]))
    return {
        "timestep_map": kept.timesteps,
        "alphas_cumprod": kept.alphas_cumprod,
        "posterior_log_variance_clipped": kept.posterior_log_variance_clipped,
    }


def sample(case):
    model, args, inputs = build(case), case.args, case.inputs
    steps = int(inputs["num_iter"])
    tokens = model.generate(
        inputs["condition"],
        inputs["pooled"][:, 0],
        [torch.Generator() for _ in inputs["condition"]],
        null_features=inputs["null_condition"],
        null_pooled=inputs["null_pooled"][:, 0],
        aesthetic_score=inputs["aesthetic"],
        num_steps=steps,
        guidance_scale=args["cfg"],
        guidance_schedule=args["cfg_schedule"],
        temperature=args["temperature"],
        diffusion_steps=args["timesteps"],
        orders=inputs["orders"],
        noise=[
            torch.cat([inputs[f"noise_init_{s}"][None], inputs[f"noise_step_{s}"]])
            for s in range(steps)
        ],
    )
    return {"latent": tokens.transpose(1, 2)[:, :, None]}


RUNNERS = {
    "forward": forward,
    "diffusion_head": diffusion_head,
    "diffusion_head_cfg": diffusion_head_cfg,
    "diffusion_loss": diffusion_loss,
    "schedule": schedule,
    "sample": sample,
}
