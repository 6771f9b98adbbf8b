"""Verification of speculative sampling with given draws, and the distribution it works on."""

from __future__ import annotations

import torch

from tessera.generators.acceleration import distribution, verify
from tessera.generators.sampling import guide


def verification(case):
    inputs = case.inputs
    draft, q, p = inputs["draft"][None], inputs["q"][None], inputs["p"][None]
    # The fixture has no distribution after the last draft.
    p = torch.cat([p, torch.ones_like(p[:, :1])], dim=1)
    accepted, token = verify(draft, q, p, inputs["u"][None], inputs["w"][None])
    tokens = torch.cat([draft[0, : int(accepted)], token])[: draft.shape[1]]
    return {"accepted": accepted[0], "tokens": tokens}


def guidance(case):
    args = case.args
    guided = guide(*case.inputs["logits"], args["scale"])
    prob = distribution(guided[None, None], args["temperature"], args["top_k"] or None, 1.0)
    return {"guided": guided, "prob": prob[0, 0]}


RUNNERS = {
    "verify0": verification,
    "verify1": verification,
    "verify2": verification,
    "cfg": guidance,
}
