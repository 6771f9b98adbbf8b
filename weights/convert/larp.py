"""Published LARP tokenizers -> `LARP` (names of hywang66/LARP's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .titok import apply_rules

_ANY = r"\.(weight|bias)"
_RULES = [
    (rf"x_embedder\.proj{_ANY}", r"encoder.patch_embed.\1"),
    (r"encoder_latent_query_embed", r"encoder.queries"),
    (r"decoder_patch_query_token_type_embed", r"decoder.patch_token"),
    (rf"((?:en|de)coder\.blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj)){_ANY}", r"\1.\2"),
    (rf"((?:en|de)coder\.blocks\.\d+\.mlp\.)fc1{_ANY}", r"\g<1>0.\2"),
    (rf"((?:en|de)coder\.blocks\.\d+\.mlp\.)fc2{_ANY}", r"\g<1>2.\2"),
    (rf"bottleneck\.in_linear{_ANY}", r"to_codes.\1"),
    (rf"bottleneck\.out_linear{_ANY}", r"from_codes.\1"),
    (r"bottleneck\.regularizer\.embedding\.weight", r"quantizer.embedding.weight"),
    (rf"final_layer\.norm_final{_ANY}", r"decoder.norm.\1"),
    (rf"final_layer\.linear{_ANY}", r"decoder.proj.\1"),
    (r"prior_model\.pos_emb", r"prior.positions"),
    (rf"prior_model\.(input_proj|head){_ANY}", r"prior.\1.\2"),
    (rf"prior_model\.ln_f{_ANY}", r"prior.norm.\1"),
    (rf"prior_model\.blocks\.(\d+)\.ln([12]){_ANY}", r"prior.blocks.\1.norm\2.\3"),
    (
        rf"prior_model\.blocks\.(\d+)\.attn\.(query|key|value|proj){_ANY}",
        r"prior.blocks.\1.attn.\2.\3",
    ),
    (rf"prior_model\.blocks\.(\d+)\.mlp\.([02]){_ANY}", r"prior.blocks.\1.mlp.\2.\3"),
]
# Fixed tables, recomputed by our modules.
_TABLES = ("encoder_patch_pe", "decoder_latent_pe", "decoder_patch_query_embed")
_ARGUMENTS = {
    "input_size": "image_size",
    "frame_num": "num_frames",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "decoder_patch_size": "decoder_patch_size",
    "decoder_temporal_patch_size": "decoder_temporal_patch_size",
    "bottleneck_token_num": "num_latent_tokens",
    "encoder_hidden_size": "encoder_dim",
    "encoder_depth": "encoder_depth",
    "encoder_num_heads": "encoder_heads",
    "decoder_hidden_size": "decoder_dim",
    "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_heads",
}


def read_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """What a published config.json states of the arguments of `LARP`."""
    config = {ours: published[name] for name, ours in _ARGUMENTS.items() if name in published}
    bottleneck = published.get("bottleneck", {}).get("args", {})
    if "bottleneck_dim" in bottleneck:
        config["code_dim"] = bottleneck["bottleneck_dim"]
    regularizer = bottleneck.get("regularizer", {}).get("args", {})
    for name, ours in (
        ("codebook_size", "codebook_size"),
        ("l2_normalized", "l2_norm"),
        ("stochastic_temperature", "code_temperature"),
    ):
        if name in regularizer:
            config[ours] = regularizer[name]
    return config


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename; join the prior's query, key and value; leave it out where ``prior_depth`` is 0.

    Raises:
        InputError: a name that no published LARP has.
    """
    kept = {name: value for name, value in published.items() if name not in _TABLES}
    state = apply_rules(kept, _RULES, "LARP tokenizer")
    if not config["prior_depth"]:
        return _flat({n: value for n, value in state.items() if not n.startswith("prior.")})
    for name in [n for n in state if ".attn.query." in n]:
        parts = [state.pop(name.replace(".query.", f".{w}.")) for w in ("query", "key", "value")]
        state[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    if "prior.positions" in state:
        state["prior.positions"] = state["prior.positions"][0].contiguous()
    return _flat(state)


def _flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "decoder.patch_token" in state:
        state["decoder.patch_token"] = state["decoder.patch_token"].flatten()
    return state
