"""Token sparse attention: scores, selection, attention of one prefill layer."""

from __future__ import annotations

from tessera.kernels.tokens.token_sparse_attention import (
    attention_token_sparse,
    select_tokens,
    token_scores,
)


def run(case):
    q, k, v = (case.inputs[name] for name in "qkv")
    args = case.args
    index = select_tokens(
        q,
        k,
        window=args["window"],
        pool_kernel=args["pool_kernel"],
        min_tokens=args["min_tokens"],
        coverage=args["coverage"],
    )
    return {
        "score": token_scores(q, k, args["window"]),
        "indices": index,
        "out": attention_token_sparse(q, k, v, index).flatten(2),
    }


RUNNERS = {"*": run}
