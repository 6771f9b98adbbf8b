"""Phenaki's masked transformer: logits with and without the text, sampling."""

from __future__ import annotations

import torch

from tessera.generators.masked.phenaki import Phenaki
from tessera.weights.convert.phenaki import convert_state_dict
from tessera.weights.loading import load_strict


def build(case):
    c = case.config
    model = Phenaki(
        vocab_size=c["num_tokens"],
        max_tokens=c["max_seq_len"],
        dim=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        head_dim=c["dim_head"],
        text_dim=c["dim_context"],
    ).eval()
    load_strict(model, convert_state_dict(case.state(), dict(model.config)))
    return model


def text_mask(text):
    """The open reading takes rows of zeros for padding."""
    return text.any(-1)


@torch.no_grad()
def forward(case):
    model, text = build(case), case.inputs["text"]
    ids, grid = case.inputs["ids"].long(), tuple(case.inputs["shape"].tolist())
    seen = text_mask(text)
    masks = {"logits": seen, "logits_uncond": torch.zeros_like(seen)}
    return {
        name: model.logits(ids, grid, model.condition(text, mask)) for name, mask in masks.items()
    }


@torch.no_grad()
def sample(case):
    text, args = case.inputs["text"], case.args
    ids = build(case).generate(
        text,
        text_mask(text),
        [torch.Generator() for _ in text],
        tuple(case.inputs["shape"].tolist()),
        num_steps=args["steps"],
        guidance_scale=args["cond_scale"],
        temperature=args["starting_temperature"],
        noise=case.inputs["uniform"],
    )
    return {"ids": ids}


RUNNERS = {"forward": forward, "sample": sample}
