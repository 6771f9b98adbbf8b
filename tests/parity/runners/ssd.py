"""SSD: the scan with all its options, Mamba-2 blocks, and the language model with its caches."""

from __future__ import annotations

import math

import torch

from tessera.generators.autoregressive.mamba import MambaLM
from tessera.generators.layers.mamba import Mamba2
from tessera.kernels.ssd.ops import ssd
from tessera.weights.convert.mamba import convert_state_dict
from tessera.weights.loading import load_strict


def limit(value):
    """``[least, greatest]`` with null for none."""
    least, greatest = value
    return (0.0 if least is None else least, math.inf if greatest is None else greatest)


def scan_inputs(case):
    i, a = case.inputs, case.args
    return {
        **{name: i[name] for name in ("x", "dt", "A", "B", "C")},
        **{name: i.get(name) for name in ("D", "z", "dt_bias", "seq_idx")},
        "initial_state": i.get("initial_states"),
        "dt_softplus": a["dt_softplus"],
        "dt_limit": limit(a["dt_limit"]),
    }


def scan(case):
    y, state = ssd(**scan_inputs(case), return_final_state=True)
    return {"y": y, "final_state": state}


def scan_varlen_states(case):
    inputs, item = scan_inputs(case), case.args["item"]
    for name in ("x", "dt", "B", "C", "z", "seq_idx"):
        if inputs[name] is not None:
            inputs[name] = inputs[name][item : item + 1]
    bounds = case.inputs["cu_seqlens"].tolist()
    return {"states": ssd(**inputs, cu_seqlens=bounds, return_final_state=True)[1]}


@torch.enable_grad()
def scan_backward(case):
    inputs = scan_inputs(case)
    names = {name: name for name in case.outputs} | {"initial_states": "initial_state"}
    leaves = {name: inputs[names[name]].requires_grad_() for name in case.outputs}
    y, state = ssd(**inputs, return_final_state=True)
    loss = (y * case.inputs["dy"]).sum() + (state * case.inputs["dstate"]).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def mixer_config(config):
    """Arguments of the published block as ours: chunk sizes and names of layers are not among them."""
    ours = {k: v for k, v in config.items() if k not in ("d_model", "chunk_size", "layer")}
    if "dt_limit" in ours:
        ours["dt_limit"] = limit(ours["dt_limit"])
    return ours


def block(case):
    prefix = case.args["prefix"]
    if "layer" in case.args:
        config = {"d_model": case.config["lm"]["d_model"], **case.config["lm"]["ssm_cfg"]}
    else:
        config = case.config[prefix.rstrip(".")]
    mixer = Mamba2(config["d_model"], **mixer_config(config)).eval()
    load_strict(mixer, case.state(prefix))
    return {"y": mixer(case.inputs["u"])}


def model(case):
    c = case.config["lm"]
    # The published MLP is rounded up to a multiple of 128.
    hidden = -(-c["d_intermediate"] // 128) * 128
    lm = MambaLM(
        dim=c["d_model"],
        depth=c["n_layer"],
        vocab_size=c["vocab_size"],
        vocab_multiple=c["pad_vocab_size_multiple"],
        mixer="ssd",
        mixer_config=mixer_config(c["ssm_cfg"]),
        mlp_hidden=hidden,
        tie_embeddings=c["tie_embeddings"],
    ).eval()
    load_strict(lm, convert_state_dict(case.state(case.args["prefix"]), dict(lm.config)))
    return lm


def lm_forward(case):
    lm = model(case)
    hidden, _ = lm.hidden(case.inputs["ids"])
    return {"hidden": hidden, "logits": lm.to_logits(hidden)}


def lm_greedy(case):
    lm, ids = model(case), case.inputs["ids"]
    hidden, states = lm.hidden(ids)
    kept = states[case.args["cache_layer"]]
    results = {
        "conv_state_after_prefill": kept["conv"].clone(),
        "ssm_state_after_prefill": kept["ssm"].clone(),
    }
    logits, tokens = [lm.to_logits(hidden[:, -1])], []
    for _ in range(case.args["num_steps"]):
        tokens.append(logits[-1][:, : lm.config.vocab_size].argmax(-1))
        hidden, states = lm.hidden(tokens[-1][:, None], states, one=True)
        logits.append(lm.to_logits(hidden[:, -1]))
    generators = [torch.Generator() for _ in ids]
    generated = lm.generate(ids, generators, case.args["num_steps"], temperature=0)
    assert torch.equal(generated, torch.stack(tokens, dim=1))
    return {**results, "tokens": generated, "logits": torch.stack(logits, dim=1)}


def lm_step_first(case):
    lm, ids = model(case), case.inputs["ids"]
    states, logits = lm.init_state(len(ids)), []
    for token in ids.unbind(1):
        hidden, states = lm.hidden(token[:, None], states, one=True)
        logits.append(lm.to_logits(hidden[:, -1]))
    return {"logits": torch.stack(logits, dim=1)}


RUNNERS = {
    "scan_plain": scan,
    "scan_full": scan,
    "scan_D_hdim": scan,
    "scan_seq_idx": scan,
    "scan_varlen_states": scan_varlen_states,
    "scan_backward": scan_backward,
    "lm_forward": lm_forward,
    "block_forward": block,
    "lm_greedy": lm_greedy,
    "lm_step_first": lm_step_first,
    "block_alt": block,
    "block_nonorm": block,
}
