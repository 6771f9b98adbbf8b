"""Token reduction beside the published forms: time, memory, and what a transformer block gains.

    python -m tessera.benchmarks.bench_token_reduction --out tokens.json [--device cuda]

(``TRITON_INTERPRET=1 ... --device rehearsal``: on a CPU, at sizes that mean nothing) writes ``tokens.json`` and the same as tables, ``tokens.md``. The published forms are written here as
their papers and code do it: all scores in one matrix. On a CPU the times are CPU-seconds of one
thread, least of the repeats, each form in turn; on a GPU they are between events. Extra memory is
the peak of what a call allocates beyond its result. Last comes a whole diffusion transformer, from
noised latents to its answer, without and with merging in all of its blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..kernels.tokens.assignment import merge
from ..kernels.tokens.patch import apply_token_merging
from ..kernels.tokens.pitome import match_energy
from ..kernels.tokens.todre import select_diverse
from ..kernels.tokens.tome import match_bipartite
from ..kernels.tokens.tome_sd import match_grid
from ..tokenizers.image.flextok import DecoderBlock, FlowDecoder
from .report import machine, write_report


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        side: rows and columns of the picture's tokens; half of them merge.
        features, picks: shape of the features of diverse selection, and tokens picked.
        blocks: token counts of the transformer blocks, of width ``width`` and heads of 64.
        models: token counts of the whole transformer, of ``depth`` such blocks.
    """

    batch: int = 2
    side: int = 64
    channels: int = 320
    features: tuple[int, int] = (576, 1024)
    picks: int = 58
    blocks: tuple[int, ...] = (256, 1024, 2304, 4096)
    width: int = 768
    models: tuple[int, ...] = (1024, 4096)
    depth: int = 4


CUDA = Sizes(blocks=(1024, 4096, 16384), width=1152, models=(4096, 16384), depth=28)
REHEARSAL = Sizes(1, 4, 8, (12, 8), 3, (16,), 64, (16,), 2)


def published_merge(
    x: Tensor, sources: Tensor, stay: Tensor, targets: Tensor, to: Tensor
) -> Tensor:
    """Gather, scatter and concatenate."""
    width = x.shape[-1]
    kept = x.gather(1, stay[..., None].expand(-1, -1, width))
    moved = x.gather(1, sources[..., None].expand(-1, -1, width))
    into = x.gather(1, targets[..., None].expand(-1, -1, width))
    index = to[..., None].expand(-1, -1, width)
    return torch.cat([kept, into.scatter_reduce(1, index, moved, "mean")], dim=1)


def published_tome(metric: Tensor, r: int) -> Tensor:
    """ToMe, match and merge (mean), with the matrix of all scores."""
    normed = metric / metric.norm(dim=-1, keepdim=True)
    best, to = (normed[:, ::2] @ normed[:, 1::2].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    odd = torch.arange(1, metric.shape[1], 2, device=metric.device).expand(len(metric), -1)
    sources = order[:, :r]
    return published_merge(metric, 2 * sources, 2 * order[:, r:], odd, to.gather(1, sources))


def published_tome_sd(metric: Tensor, side: int, r: int) -> Tensor:
    """ToMe for Stable Diffusion, the first token of each 2 x 2 cell being the destination."""
    cells = torch.arange(side * side, device=metric.device).view(side, side)
    is_target = torch.zeros(side, side, dtype=torch.bool, device=metric.device)
    is_target[::2, ::2] = True
    sources, targets = cells[~is_target], cells[is_target]
    normed = metric / metric.norm(dim=-1, keepdim=True)
    best, to = (normed[:, sources] @ normed[:, targets].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    moved = order[:, :r]
    each = targets.expand(len(metric), -1)
    return published_merge(metric, sources[moved], sources[order[:, r:]], each, to.gather(1, moved))


def published_pitome(metric: Tensor, r: int, margin: float) -> Tensor:
    """PiToMe's ordered variant: the T x T matrix, its ELU, its mean, and a gathered r x r part."""
    normed = F.normalize(metric, dim=-1)
    similarity = normed @ normed.transpose(1, 2)
    energy = F.elu(similarity - margin).mean(dim=-1)
    order = energy.argsort(dim=-1, descending=True)
    a, b = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
    rows = similarity.gather(1, a[..., None].expand(-1, -1, similarity.shape[2]))
    to = rows.gather(2, b[:, None].expand(-1, r, -1)).argmax(dim=-1)
    return published_merge(metric, a, order[:, 2 * r :], b, to)


def published_diverse_loop(x: Tensor, k: int, pivot: int) -> list[int]:
    """The pseudo-code of ToDRE's first version: a product with all tokens for each pick."""
    normed = F.normalize(x, dim=-1)
    picks, score = [pivot], normed @ normed[pivot]
    score[pivot] = torch.inf
    for _ in range(k - 1):
        pick = int(score.argmin())
        score = torch.maximum(score, normed @ normed[pick])
        score[pick] = torch.inf
        picks.append(pick)
    return picks


def published_diverse_matrix(x: Tensor, k: int, pivot: int) -> list[int]:
    """DivPrune's form: all distances, then the minimum over the rows of all picks, each time."""
    normed = F.normalize(x, dim=-1)
    distance = 1 - normed @ normed.T
    picks = [pivot]
    for _ in range(k - 1):
        nearest = distance[torch.tensor(picks, device=x.device)].min(dim=0).values
        nearest[picks] = -torch.inf
        picks.append(int(nearest.argmax()))
    return picks


def least_seconds(functions: list[Callable[[], Any]], device: str, repeats: int) -> list[float]:
    """Least time of each function, called in turn, after one call that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, found in zip(functions, times, strict=True):
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                torch.cuda.synchronize()
                found.append(start.elapsed_time(end) / 1000)
            else:
                begin = time.process_time()
                function()
                found.append(time.process_time() - begin)
    return [min(found[1:]) for found in times]


def extra_bytes(function: Callable[[], Any], device: str) -> int:
    """Most bytes that a call has allocated at once, less those of its result."""
    function()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        result = function()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del result
        return extra
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    del result
    now = peak = 0
    # Summaries count what an operator keeps; only the raw events have every allocation.
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak - now


@torch.no_grad()
def measure(sizes: Sizes, device: str = "cpu", repeats: int = 5) -> list[dict[str, Any]]:
    """Rows of (case, seconds and extra bytes, published and ours)."""
    torch.manual_seed(0)
    tokens = sizes.side**2
    r = tokens // 2
    metric = torch.randn(sizes.batch, tokens, sizes.channels, device=device)
    features = torch.randn(1, *sizes.features, device=device)
    k, pivot = sizes.picks, torch.zeros(1, dtype=torch.int64, device=device)
    shape = f"({sizes.batch}, {tokens}, {sizes.channels})"
    picked = f"{k} of {sizes.features[0]} x {sizes.features[1]}"

    def diverse() -> Tensor:
        return select_diverse(features, k, pivot, objective="max")

    cases = [
        (
            f"ToMe match + merge {shape}, r {r}",
            lambda: published_tome(metric, r),
            lambda: merge(metric, match_bipartite(metric, r)),
        ),
        (
            f"ToMe-SD match + merge {shape}, r {r}",
            lambda: published_tome_sd(metric, sizes.side, r),
            lambda: merge(metric, match_grid(metric, (sizes.side, sizes.side), r)),
        ),
        (
            f"PiToMe match + merge {shape}, keep 0.5",
            lambda: published_pitome(metric, r, 0.5),
            lambda: merge(metric, match_energy(metric, 0.5, 0.5)[0]),
        ),
        (
            f"k-center {picked}, against the matrix form",
            lambda: published_diverse_matrix(features[0], k, 0),
            diverse,
        ),
        (
            f"k-center {picked}, against the loop",
            lambda: published_diverse_loop(features[0], k, 0),
            diverse,
        ),
    ]
    rows = []
    for name, published, ours in cases:
        seconds = least_seconds([published, ours], device, repeats)
        extra = [extra_bytes(function, device) for function in (published, ours)]
        rows.append(
            {
                "case": name,
                "published_seconds": seconds[0],
                "seconds": seconds[1],
                "ratio": seconds[1] / seconds[0],
                "published_extra_mb": extra[0] / 1e6,
                "extra_mb": extra[1] / 1e6,
            }
        )
    return rows


@torch.no_grad()
def measure_blocks(sizes: Sizes, device: str = "cpu", repeats: int = 3) -> list[dict[str, Any]]:
    """A block of FlexTok's flow decoder without and with merging: in attention, and in the MLP too."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = DecoderBlock(sizes.width, 64, 4.0).to(device, dtype).eval()
    modulation = 0.1 * torch.randn(1, 2, 6, sizes.width, device=device, dtype=dtype)
    rows = []
    for tokens in sizes.blocks:
        # The picture's tokens and 64 of its condition.
        x = torch.randn(sizes.batch, tokens + 64, sizes.width, device=device, dtype=dtype)

        def plain(x: Tensor = x, tokens: int = tokens) -> Tensor:
            return block(x, None, modulation, tokens)

        def merged(method: str, mlp: bool, plain: Callable[[], Tensor] = plain) -> Callable:
            def run() -> Tensor:
                with apply_token_merging(block, method, 0.5, merge_mlp=mlp, min_tokens=0):
                    return plain()

            return run

        settings = [(m, mlp) for m in ("tome_sd", "pitome") for mlp in (False, True)]
        functions = [plain, *(merged(m, mlp) for m, mlp in settings)]
        alone, *others = least_seconds(functions, device, repeats)
        for (method, mlp), seconds in zip(settings, others, strict=True):
            rows.append(
                {
                    "tokens": tokens,
                    "method": method,
                    "on": "attention and MLP" if mlp else "attention",
                    "plain_seconds": alone,
                    "seconds": seconds,
                    "gain": alone / seconds,
                }
            )
    return rows


@torch.no_grad()
def measure_models(sizes: Sizes, device: str = "cpu", repeats: int = 3) -> list[dict[str, Any]]:
    """FlexTok's flow decoder end to end (one evaluation), with 32 condition tokens."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    side = max(math.isqrt(count) for count in sizes.models)
    model = FlowDecoder(16, 2, side, 32, sizes.width, sizes.depth, 64, 4.0, 6, 1000.0)
    model = model.to(device, dtype).eval()
    rows = []
    for count in sizes.models:
        side = math.isqrt(count)
        x = torch.randn(sizes.batch, 16, 2 * side, 2 * side, device=device, dtype=dtype)
        t = torch.full((sizes.batch,), 0.5, device=device, dtype=dtype)
        codes = torch.randn(sizes.batch, 32, 6, device=device, dtype=dtype)

        def plain(x: Tensor = x, t: Tensor = t, codes: Tensor = codes) -> Tensor:
            return model(x, t, *model.condition(codes))

        def merged(method: str, plain: Callable[[], Tensor] = plain) -> Callable:
            def run() -> Tensor:
                with apply_token_merging(model, method, 0.5, merge_mlp=True, min_tokens=0):
                    return plain()

            return run

        methods = ("tome_sd", "pitome")
        alone, *others = least_seconds([plain, *map(merged, methods)], device, repeats)
        for method, seconds in zip(methods, others, strict=True):
            rows.append(
                {
                    "tokens": count,
                    "method": method,
                    "plain_seconds": alone,
                    "seconds": seconds,
                    "gain": alone / seconds,
                }
            )
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    machine = report["machine"]
    unit = "GPU s" if machine["device"] == "cuda" else "CPU-s"
    lines = [
        f"{machine['name']}, {machine['threads']} thread(s), torch {machine['torch']}.",
        "",
        f"| case | published {unit} | {unit} | ratio | published extra MB | extra MB |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['case']} | {row['published_seconds']:.4f} | {row['seconds']:.4f} "
            f"| {row['ratio']:.2f} | {row['published_extra_mb']:.2f} | {row['extra_mb']:.2f} |"
        )
    lines += [
        "",
        f"| block of {machine['width']}, half merged | tokens | plain {unit} | merged {unit} | gain |",
        "| --- | --: | --: | --: | --: |",
    ]
    for row in report["blocks"]:
        lines.append(
            f"| {row['method']}, {row['on']} | {row['tokens']} | {row['plain_seconds']:.4f} "
            f"| {row['seconds']:.4f} | {row['gain']:.2f} |"
        )
    lines += [
        "",
        f"| transformer of {machine['depth']} blocks of {machine['width']}, half merged | tokens "
        f"| plain {unit} | merged {unit} | gain |",
        "| --- | --: | --: | --: | --: |",
    ]
    for row in report["models"]:
        lines.append(
            f"| {row['method']} | {row['tokens']} | {row['plain_seconds']:.4f} "
            f"| {row['seconds']:.4f} | {row['gain']:.2f} |"
        )
    return "\n".join([*lines, ""])


def report_on(device: str, repeats: int) -> dict[str, Any]:
    """The machine and all tables, with one thread."""
    torch.set_num_threads(1)
    sizes = {"cuda": CUDA, "rehearsal": REHEARSAL}.get(device, Sizes())
    shape = {"width": sizes.width, "depth": sizes.depth}
    kind = "cpu" if device == "rehearsal" else device
    return {
        "machine": machine(device) | shape,
        "rows": measure(sizes, kind, repeats),
        "blocks": measure_blocks(sizes, kind, repeats),
        "models": measure_models(sizes, kind, repeats),
    }


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the tables go beside it.")],
    device: Annotated[str, typer.Option(help="cpu, cuda, or rehearsal.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each form.")] = 5,
) -> None:
    """Measure token reduction on this machine."""
    write_report(out, partial(report_on, device, repeats), markdown)


if __name__ == "__main__":
    typer.run(main)
