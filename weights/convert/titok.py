"""Published TiTok and TA-TiTok state dicts -> `TiTok` (names of bytedance/1d-tokenizer's checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modalities.errors import InputError
from .maskgit_vqgan import rename as rename_vqgan

_ANY = r"\.(weight|bias)"
RENAME = [
    (r"latent_tokens", r"encoder.latent_tokens"),
    (r"((?:en|de)coder)\.(class_embedding|positional_embedding)", r"\1.\2"),
    (
        r"((?:en|de)coder)\.latent_token_positional_embedding",
        r"\1.latent_positional_embedding",
    ),
    (rf"((?:en|de)coder)\.(ln_pre|ln_post){_ANY}", r"\1.\2.\3"),
    (rf"((?:en|de)coder)\.transformer\.(\d+)\.(ln_1|ln_2){_ANY}", r"\1.blocks.\2.\3.\4"),
    (r"((?:en|de)coder)\.transformer\.(\d+)\.attn\.in_proj_(\w+)", r"\1.blocks.\2.attn.qkv.\3"),
    (rf"((?:en|de)coder)\.transformer\.(\d+)\.attn\.out_proj{_ANY}", r"\1.blocks.\2.attn.proj.\3"),
    (rf"((?:en|de)coder)\.transformer\.(\d+)\.mlp\.c_fc{_ANY}", r"\1.blocks.\2.mlp.0.\3"),
    (rf"((?:en|de)coder)\.transformer\.(\d+)\.mlp\.c_proj{_ANY}", r"\1.blocks.\2.mlp.2.\3"),
    (rf"encoder\.patch_embed{_ANY}", r"encoder.patch_embed.\1"),
    (rf"encoder\.conv_out{_ANY}", r"encoder.proj.\1"),
    (r"decoder\.mask_token", r"decoder.mask_token"),
    (rf"decoder\.decoder_embed{_ANY}", r"decoder.embed.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.embedding.weight"),
]
TWO_STAGE = [
    (rf"decoder\.ffn\.([02]){_ANY}", r"head.proj.\1.\2"),
    (r"pixel_quantize\.embedding\.weight", r"head.codebook.weight"),
]
SINGLE_STAGE = [
    (rf"decoder\.ffn\.0{_ANY}", r"head.proj.\1"),
    (rf"decoder\.conv_out{_ANY}", r"head.conv_out.\1"),
]
# 1x1 convolutions over tokens, linear layers here.
_POINTWISE = re.compile(r"encoder\.conv_out\.weight|decoder\.ffn\.\d\.weight")
# Published name of a size -> dim, depth, heads.
_SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}


def read_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """What a published config.json states of the arguments of `TiTok`.

    Raises:
        InputError: an unknown size, patches of two sizes, or a mixture of both kinds of models.
    """
    node = model_node(published)
    two_stage = node.get("finetune_decoder", True)
    if node and node.get("is_legacy", True) != two_stage:
        raise InputError("This TiTok is neither a two-stage nor a single-stage model.")
    config = shared_config(published)
    return {**config, "two_stage": two_stage} if node else config


def model_node(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """``model.vq_model`` of a published config.json, empty where there is none."""
    return published.get("model", {}).get("vq_model", {})


def shared_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """What TiTok and TA-TiTok state alike."""
    node = model_node(published)
    config: dict[str, Any] = {}
    for part, theirs in (("encoder", "vit_enc"), ("decoder", "vit_dec")):
        size = node.get(f"{theirs}_model_size")
        if size is None:
            continue
        if size not in _SIZES:
            raise InputError(f'Unknown model size "{size}": TiTok has {", ".join(_SIZES)}.')
        names = (f"{part}_dim", f"{part}_depth", f"{part}_heads")
        config |= dict(zip(names, _SIZES[size], strict=True))
    if node.get("vit_enc_patch_size") != node.get("vit_dec_patch_size"):
        raise InputError("Encoder and decoder of a TiTok have patches of one size.")
    names = {"vit_enc_patch_size": "patch_size"}
    names |= dict.fromkeys(("codebook_size", "token_size", "use_l2_norm", "num_latent_tokens"))
    config |= {ours or name: node[name] for name, ours in names.items() if name in node}
    if node:
        config["quantize_mode"] = node.get("quantize_mode", "vq")
    crop = published.get("dataset", {}).get("preprocessing", {}).get("crop_size")
    return config if crop is None else {**config, "image_size": crop}


def convert_state_dict(
    published: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename, and drop the two last axes of 1x1 kernels.

    Args:
        config: arguments of `TiTok`.

    Raises:
        InputError: a name that no published TiTok of this kind has.
    """
    rules = RENAME + (TWO_STAGE if config["two_stage"] else SINGLE_STAGE)
    return apply_rules(published, rules, "TiTok")


def apply_rules(
    published: Mapping[str, Tensor], rules: list[tuple[str, str]], model: str
) -> dict[str, Tensor]:
    """Rename by the first rule that fits the whole name; the pixel decoder has rules of its own."""
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        new = None
        if name.startswith("pixel_decoder."):
            new = rename_vqgan(name.removeprefix("pixel_decoder."))
            new = new and f"head.pixel_decoder.{new}"
        for pattern, replacement in rules:
            if re.fullmatch(pattern, name):
                new = re.sub(pattern, replacement, name)
                break
        if new is None:
            raise InputError(f'"{name}" is not a weight of a published {model} of this kind.')
        if _POINTWISE.fullmatch(name) and value.ndim == 4:
            value = value[..., 0, 0]
        state[new] = value
    return state
