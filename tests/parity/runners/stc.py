"""STC: pruner over two chunks, cacher over a full and a partial chunk."""

from __future__ import annotations

from torch import nn

from tessera.kernels.tokens.stc import NoveltyPruner, TokenCacher
from tessera.weights.loading import load_strict


def new_pruner(case):
    return NoveltyPruner(
        case.args["tokens_per_frame"], case.args["keep"], case.args["channel_fraction"]
    )


def prune(case):
    x = case.inputs["features"]
    scorer, pruner = new_pruner(case), new_pruner(case)
    for other in case.after:
        scorer.scores(other.inputs["features"])
        pruner(other.inputs["features"])
    scores = scorer.scores(x)
    return {
        "kept": x[pruner(x).flatten()],
        "frame_score": scores.frame,
        "video_score": scores.video,
        "memory_score": scores.memory,
        "memory": scorer.total / scorer.chunks,
    }


def build_layer(case):
    state = case.state("layer.")
    width, hidden = state["mlp.0.weight"].shape[1], state["mlp.0.weight"].shape[0]
    layer = nn.Module()
    layer.layer_norm1 = nn.LayerNorm(width, eps=case.args["norm_eps"])
    layer.layer_norm2 = nn.LayerNorm(width, eps=case.args["norm_eps"])
    layer.self_attn = nn.Module()
    layer.self_attn.num_heads = case.args["num_heads"]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(layer.self_attn, name, nn.Linear(width, width))
    activation = {"gelu_tanh": nn.GELU("tanh"), "gelu": nn.GELU()}[case.args["activation"]]
    layer.mlp = nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))
    load_strict(layer, state)
    return layer


def cache(case):
    cacher = TokenCacher(build_layer(case), case.args["update_ratio"])
    return {"y0": cacher(case.inputs["x0"]), "y1": cacher(case.inputs["x1"])}


RUNNERS = {"prune0": prune, "prune1": prune, "cache_key": cache}
