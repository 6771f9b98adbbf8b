"""Token merging inside the blocks of a generator, without retraining.

Around a sub-layer the tokens of the picture merge and then get their rows' outputs back; the residual
stream keeps its length (tome_sd.py). Nothing is lost for good, but the result changes: merging is off
until it is applied, and stays off below the length at which it pays.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...modalities.errors import InputError
from .assignment import Assignment, merge, unmerge
from .dymu import match_threshold
from .pitome import match_energy
from .tome_sd import match_grid

# Tokens from which a block gains, by device type: measured on a CPU, see docs/token_reduction.md;
# elsewhere the shortest length at which published measurements show a gain over fused attention.
MIN_TOKENS = {"cpu": 256}
MIN_TOKENS_ELSEWHERE = 2048


@dataclass(frozen=True)
class MergeLayout:
    """Where a block keeps what may run on merged tokens.

    The block's first argument is its tokens ``[B, N, D]``; those of the picture come first, in
    raster order.

    Attributes:
        attention, cross_attention, mlp: names of sub-modules that map ``[B, N, D]`` to the same; None
            where a block has none that may merge.
        count: the block's argument that says how many tokens are the picture's; None = all.
    """

    attention: str | None
    mlp: str | None
    cross_attention: str | None = None
    count: str | None = None


# By full name: kernels import no models. VAR's attention fills a cache, one entry a token.
LAYOUTS = {
    "tessera.generators.next_scale.var.Block": MergeLayout(None, "mlp"),
    "tessera.tokenizers.image.flextok.DecoderBlock": MergeLayout("attn", "mlp", count="patches"),
    "diffusers.models.attention.BasicTransformerBlock": MergeLayout("attn1", "ff", "attn2"),
}
METHODS = ("tome_sd", "pitome", "dymu")


class TokenMerging:
    """What `apply_token_merging` put into a model; a context manager that takes it out again.

    Attributes:
        blocks: number of blocks that can merge.
        merged: block calls since then that merged; 0 after a run means that it was too short.
    """

    def __init__(
        self,
        model: nn.Module,
        match: Callable[[Tensor, tuple[int, int]], Assignment | None],
        blocks: list[tuple[nn.Module, MergeLayout, list[str]]],
        hw: tuple[int, int] | None,
        max_downsample: int,
        min_tokens: int | None,
        reuse: int,
    ):
        self.model, self.match, self.hw = model, match, hw
        self.max_downsample, self.min_tokens, self.reuse = max_downsample, min_tokens, reuse
        self.blocks, self.merged = len(blocks), 0
        self.current: Assignment | None = None  # Of the block that runs now.
        self.last: Assignment | None = None
        self.tokens = 0
        self.wrapped: list[nn.Module] = []
        self.hooks = []
        for index, (block, layout, names) in enumerate(blocks):
            for name in names:
                self._wrap(getattr(block, name), keys=name == layout.attention)
            before = self._before(block, layout, index)
            self.hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
            self.hooks.append(block.register_forward_hook(self._after, always_call=True))

    def remove(self) -> None:
        """Take the merging out: the model computes what it did before, bit by bit."""
        for hook in self.hooks:
            hook.remove()
        for module in self.wrapped:
            del module.forward
        self.hooks, self.wrapped = [], []
        if getattr(self.model, "_token_merging", None) is self:
            del self.model._token_merging

    def __enter__(self) -> TokenMerging:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def _before(self, block: nn.Module, layout: MergeLayout, index: int) -> Callable[..., None]:
        signature = inspect.signature(block.forward)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            bound = signature.bind(*args, **kwargs).arguments
            x = next(iter(bound.values()))
            self.tokens = bound[layout.count] if layout.count else x.shape[1]
            least = self.min_tokens
            if least is None:
                least = MIN_TOKENS.get(x.device.type, MIN_TOKENS_ELSEWHERE)
            self.current = None
            if self.tokens < least:
                return
            grid = self._grid(self.tokens)
            if grid is None:
                return
            old = self.last
            if index % self.reuse and old is not None and old.row.shape == (len(x), self.tokens):
                self.current = old
            else:
                self.current = self.last = self.match(x[:, : self.tokens], grid)
            if self.current is not None:
                self.merged += 1

        return hook

    def _after(self, *_: Any) -> None:
        self.current = None

    def _grid(self, tokens: int) -> tuple[int, int] | None:
        """Rows and columns of the block's tokens; None where its resolution is not to be merged."""
        if self.hw is None:
            side = math.isqrt(tokens)
            if side * side != tokens:
                raise InputError(
                    f"{tokens} tokens are no square picture: pass hw=(rows, columns) of its grid."
                )
            return side, side
        rows, columns = self.hw
        # tomesd's rule: how far this block is below the resolution of the latents.
        down = math.ceil(math.sqrt(rows * columns // tokens)) if tokens else 0
        if not 1 <= down <= self.max_downsample:
            return None
        return math.ceil(rows / down), math.ceil(columns / down)

    def _wrap(self, module: nn.Module, keys: bool) -> None:
        forward = module.forward

        def merged(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            a, tokens = self.current, self.tokens
            if a is None:
                return forward(x, *args, **kwargs)
            if keys:
                total = x.shape[1]
                args = tuple(_merge_argument(value, a, tokens, total) for value in args)
                kwargs = {
                    name: _merge_argument(value, a, tokens, total) for name, value in kwargs.items()
                }
            rows = a.rep.shape[1]
            y = forward(torch.cat([merge(x[:, :tokens], a), x[:, tokens:]], 1), *args, **kwargs)
            return torch.cat([unmerge(y[:, :rows], a), y[:, rows:]], dim=1)

        module.forward = merged
        self.wrapped.append(module)


def _merge_argument(value: Any, a: Assignment, tokens: int, total: int) -> Any:
    """An argument of attention for the merged tokens: masks over keys, slices of queries."""
    if isinstance(value, slice) and value.stop == tokens:
        return slice(value.start, a.rep.shape[1])
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] != total:
        return value
    if value.shape[-2] != 1:
        raise InputError(
            f"Attention under a mask {list(value.shape)} that differs by query cannot merge tokens."
        )
    mask = value.expand(len(a.rep), *value.shape[1:])
    index = a.rep.long().view(len(mask), *[1] * (mask.ndim - 2), -1)
    index = index.expand(*mask.shape[:-1], -1)
    return torch.cat([mask[..., :tokens].gather(-1, index), mask[..., tokens:]], dim=-1)


def apply_token_merging(
    model: nn.Module,
    method: str = "tome_sd",
    ratio: float = 0.5,
    *,
    hw: tuple[int, int] | None = None,
    stride: tuple[int, int] = (2, 2),
    generator: torch.Generator | None = None,
    margin: float = 0.5,
    threshold: float = 0.9,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    max_downsample: int = 1,
    min_tokens: int | None = None,
    reuse: int = 1,
    layouts: Mapping[str, MergeLayout] | None = None,
) -> TokenMerging:
    """Merge tokens inside the blocks of a model; applying again replaces the settings.

    Works on FlexTok's flow decoder, on VAR (its MLPs, at the scales that are long enough), and on
    every diffusers model of ``BasicTransformerBlock`` s. Models that write one token at a time under a
    causal mask (FlexAR) have no tokens to merge.

    Args:
        method: "tome_sd" (a destination in each cell), "pitome" (by energy), or "dymu" (as many as
            are above the threshold; batches of 1).
        ratio: share of the picture's tokens that merge, in [0, 1); 0 changes nothing. "tome_sd" can
            merge 1 - 1 / (cell size), the others half. For "dymu" the largest share.
        hw: rows and columns of the picture's tokens (of a UNet: of its latents); default a square.
        stride: rows and columns of a cell of "tome_sd".
        generator: draws the destinations anew in every block ("tome_sd", not for odd batches, whose
            guided halves would differ); default the first token of each cell.
        margin: of the energy of "pitome".
        threshold: cosine from which "dymu" merges.
        merge_attn, merge_crossattn, merge_mlp: sub-layers that run on merged tokens.
        max_downsample: of a UNet, how far below the latents' resolution blocks merge.
        min_tokens: below these a block runs as it is; default the measured length of the device.
        reuse: blocks in turn that share one matching.
        layouts: more kinds of blocks, by the full name of their class.

    Returns:
        A handle with ``remove()``; also a context manager.

    Raises:
        InputError: a setting out of range, or no block that can merge.
    """
    if method not in METHODS:
        raise InputError(f'The method "{method}" is none of {", ".join(METHODS)}.')
    if not 0 <= ratio < 1:
        raise InputError(f"The ratio must be at least 0 and below 1, got {ratio}.")
    if reuse < 1:
        raise InputError(f"reuse must be 1 or more, got {reuse}.")
    known = {**LAYOUTS, **(layouts or {})}
    chosen = (merge_attn, merge_crossattn, merge_mlp)
    blocks = []
    for module in model.modules():
        layout = known.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if layout is not None:
            names = (layout.attention, layout.cross_attention, layout.mlp)
            blocks.append(
                (module, layout, [n for n, on in zip(names, chosen, strict=True) if on and n])
            )
    if not any(names for _, _, names in blocks):
        raise InputError(
            f"{type(model).__name__} has no such sub-layer in which tokens can merge: this is for "
            "flow decoders, diffusion transformers and, with merge_mlp, VAR; pass layouts for blocks "
            "of your own."
        )

    def match(x: Tensor, grid: tuple[int, int]) -> Assignment | None:
        r = int(x.shape[1] * ratio)
        if r == 0:
            return None
        if method == "pitome":
            return match_energy(x, 1 - ratio, margin)[0]
        if method == "dymu":
            return match_threshold(x, threshold, max_r=r)
        draw = generator if len(x) % 2 == 0 else None
        return match_grid(x, grid, r, stride=stride, generator=draw)

    remove_token_merging(model)
    merging = TokenMerging(
        model,
        match,
        blocks,
        hw,
        max_downsample,
        min_tokens,
        reuse,
    )
    model._token_merging = merging
    return merging


def remove_token_merging(model: nn.Module) -> None:
    """Undo `apply_token_merging`; without effect on other models."""
    merging = getattr(model, "_token_merging", None)
    if merging is not None:
        merging.remove()
