"""A ViT whose tokens become fewer from layer to layer (ToMe, PiToMe, DyMU).

Runs any model of timm's ``VisionTransformer`` layout as it is: between attention and MLP of every
block the tokens merge, with the keys averaged over the heads as the metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .assignment import Assignment, merge
from .attention import attention_sized

Match = Callable[[int, Tensor, Tensor], Assignment | None]
Merge = Callable[[Tensor, Assignment, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ReducedTokens:
    """Output of the last block, before the last norm.

    Attributes:
        x: ``[B, M, D]``.
        size: ``[B, M, 1]``, original tokens of each.
        assignment: of the original tokens to these.
    """

    x: Tensor
    size: Tensor
    assignment: Assignment


def weighted_average(x: Tensor, a: Assignment, size: Tensor) -> tuple[Tensor, Tensor]:
    return merge(x, a, size=size, mode="wavg")


def encode_reduced(
    vit: nn.Module,
    images: Tensor,
    match: Match,
    *,
    prop_attn: bool = True,
    average: Merge = weighted_average,
) -> ReducedTokens:
    """Run a timm ``VisionTransformer`` and merge tokens in every block.

    Args:
        images: what the model takes, ``[B, C, H, W]``.
        match: called with (layer, metric ``[B, N, head_dim]``, valid bool ``[B, N]``); None merges
            nothing in that layer. For example
            ``lambda layer, metric, valid: match_bipartite(metric, 13, cls=True)``.
        prop_attn: keys count as often as they have tokens; off for MAE models.
        average: (x, assignment, size) -> the merged tokens and their sizes.
    """
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    size = torch.ones_like(x[..., :1], dtype=torch.float32)
    total = Assignment.identity(*x.shape[:2], x.device)
    for layer, block in enumerate(vit.blocks):
        out, metric = _attend(block.attn, block.norm1(x), size[..., 0], total, prop_attn)
        x = x + block.drop_path1(block.ls1(out))
        a = match(layer, metric, total.valid)
        if a is not None:
            x, size = average(x, a, size)
            total = total.then(a)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return ReducedTokens(x, size, total)


def classify(vit: nn.Module, tokens: ReducedTokens) -> Tensor:
    """The model's own head on the output of `encode_reduced`: logits ``[B, classes]``.

    An average is over the tokens that are left, without prefix tokens and padding.
    """
    x = vit.norm(tokens.x)
    if vit.global_pool != "avg":
        return vit.forward_head(x)
    counted = (tokens.assignment.rep >= vit.num_prefix_tokens)[..., None]
    pooled = (x * counted).sum(dim=1) / counted.sum(dim=1)
    return vit.head(vit.head_drop(vit.fc_norm(pooled)))


def _attend(
    attn: nn.Module, x: Tensor, size: Tensor | None, total: Assignment, prop_attn: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if not prop_attn:
        size = total.valid.float() if total.drops else None  # Hides the padding.
    out = attention_sized(q, k, v, size, scale=attn.scale)
    out = attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
    return out, k.mean(dim=1)
