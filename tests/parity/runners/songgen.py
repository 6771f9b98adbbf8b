"""Codebook patterns, conditions, logits and losses, and greedy songs of one and of two tracks."""

from __future__ import annotations

import torch

from tessera.generators.autoregressive.songgen import (
    TRACKS,
    SongGen,
    combine_tracks,
    sequence_template,
    start_columns,
)
from tessera.generators.conditioning.t5 import T5Encoder
from tessera.tokenizers.audio.patterns import apply_template, delay_template
from tessera.weights.convert.songgen import convert_state_dict
from tessera.weights.convert.t5 import convert_state_dict as t5_state_dict
from tessera.weights.loading import load_strict

VARIANTS = {"mixed_pro": None}


def build(case):
    c, pattern = case.config, case.args["pattern"]
    lyrics, published = c["lyrics"], case.state(variant=VARIANTS.get(pattern, pattern))
    model = SongGen(
        pattern=pattern,
        num_codebooks=c["codebooks"],
        codebook_size=c["codebook_size"],
        dim=c["hidden"],
        depth=c["layers"],
        heads=c["heads"],
        mlp_hidden=c["ffn"],
        max_positions=c["max_pos"],
        text_dim=c["t5"]["d_model"],
        lyrics_vocab=c["prompt_vocab"],
        lyrics_dim=lyrics["output_size"],
        lyrics_depth=lyrics["num_blocks"],
        lyrics_heads=lyrics["attention_heads"],
        lyrics_hidden=lyrics["linear_units"],
        voice_layers=published["mert_layer_agg.weight"].shape[1],
        voice_dim=published["audio_mert_to_dec_proj.weight"].shape[1],
    ).eval()
    load_strict(model, convert_state_dict(published, dict(model.config)))
    return model


def condition(case):
    """Text features of the checkpoint's T5, lyrics, and the states of the stub that hears a voice."""
    inputs, config = case.inputs, case.config["t5"] | {"feed_forward_proj": "gated-gelu"}
    t5 = T5Encoder(**config).eval()
    load_strict(t5, t5_state_dict(case.state("text_encoder."), config))
    mask = inputs["attention_mask"].bool()
    features = t5(inputs["input_ids"], mask)
    stub = case.args["mert_stub"]
    rows = (torch.arange(stub[k]).float() for k in ("layers", "frames", "channels"))
    layer, frame, channel = torch.meshgrid(*rows, indexing="ij")
    voice = inputs["ref_voice_values"]
    item = torch.arange(len(voice)).float()[:, None, None, None]
    states = torch.cos(0.1 * layer + 0.3 * frame + 0.01 * channel + item)
    lyrics = (inputs["prompt_input_ids"], inputs["prompt_attention_mask"].bool())
    return features, mask, *lyrics, states, voice.any(1)


def delay_mask(case):
    a, results = case.args, {}
    length = int(case.inputs["max_length"])
    for name in ("start", "prompt"):
        mask = delay_template(case.inputs[name], length, a["bos"], a["pad"])
        results[f"mask_{name}"] = mask.flatten(0, 1)
        results[f"ids_{name}"] = start_columns(mask).flatten(0, 1)
    start = case.inputs["start"]
    short = delay_template(start, a["tooshort_max_length"], a["bos"], a["pad"])
    results |= {"mask_tooshort": short.flatten(0, 1), "ids_tooshort": start.flatten(0, 1)}
    results["applied"] = apply_template(case.inputs["seq"], results["mask_prompt"])
    return results


def tracks(case):
    a, results = case.args, {}
    named = {"accompaniment": case.inputs["acc"], "vocal": case.inputs["vocal"]}
    for pattern in a["patterns"]:
        given = [named[name] for name in TRACKS[pattern]]
        results[f"combined_{pattern}"] = combine_tracks(given, pattern, a["bos"], a["pad"])
        start = [torch.full_like(track[..., :1], a["bos"]) for track in given]
        prompt = [torch.cat(pair, dim=-1) for pair in zip(start, given, strict=True)]
        for name, prompts in (("start", start), ("prompt", prompt)):
            length = int(case.inputs["max_length"])
            mask = sequence_template(prompts, pattern, length, a["bos"], a["pad"])
            results[f"mask_{name}_{pattern}"] = mask.flatten(0, 1)
            results[f"ids_{name}_{pattern}"] = start_columns(mask).flatten(0, 1)
    return results


@torch.no_grad()
def forward(case):
    model = build(case)
    given = condition(case)
    memory, mask = model.condition(*given, project_text=case.args["project_text"])
    labels, vocal_labels = (case.inputs[k].mT for k in ("labels", "vocal_labels"))
    hidden = model.hidden(model.inputs(labels), model.memories(memory), mask)
    logits = model.logits(hidden)
    losses = model.codebook_losses(logits, labels)
    vocal = model.codebook_losses(model.logits(hidden, model.vocal_head), vocal_labels)
    return {
        "lyrics": memory[:, -case.inputs["prompt_input_ids"].shape[1] :],
        "cond": memory,
        "cond_mask": mask.long(),
        "logits": logits.flatten(0, 1),
        "codebook_losses": losses,
        "vocal_codebook_losses": vocal,
        "loss": losses.mean()[None],
        "vocal_loss": vocal.mean()[None],
    }


@torch.no_grad()
def forward_parallel(case):
    model = build(case)
    memories = model.memories(case.inputs["cond"])
    ids = case.inputs["decoder_input_ids"].unflatten(0, (-1, model.rows))
    hidden = model.hidden(ids, memories, case.inputs["cond_mask"].bool())
    return {"logits": model.logits(hidden).flatten(0, 1)}


@torch.no_grad()
def generate(case):
    model = build(case)
    *given, states, present = condition(case)
    settings = {
        "generators": [torch.Generator() for _ in present],
        "voice_states": states,
        "voice_mask": present,
        "max_length": int(case.inputs["max_length"]),
        "temperature": 1.0 if case.args["sample"] else 0.0,
        "project_text": "always" if case.args["project_text"] else "reference",
    }
    *_, raw = model.stream(*given, raw=True, **settings)
    songs = model.generate(*given, **settings)
    codes = [
        item[name] for item in songs for name in ("mixed", "vocal", "accompaniment") if name in item
    ]
    results = {f"codec_input_{i}": each for i, each in enumerate(codes)}
    return results | {"raw": raw.flatten(0, 1)}


RUNNERS = {
    "delay_mask": delay_mask,
    "tracks": tracks,
    "forward": forward,
    "forward_parallel": forward_parallel,
    "*": generate,
}
