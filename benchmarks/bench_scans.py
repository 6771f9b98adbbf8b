"""Scans beside the forms that they replace: time, growth with length, and the bound of memory.

    python -m tessera.benchmarks.bench_scans --out scans.json [--device cuda]

writes ``scans.json`` and the same as tables, ``scans.md``. On a CPU the times are CPU-seconds of one
thread, least of the repeats, each form in turn, beside two baselines written here: the short listing
of the Mamba-2 paper (quadratic in the number of chunks) and a plain loop over chunks. On a GPU they are
between events, beside the time in which the least traffic passes at the measured bandwidth, beside
the kernels of mamba_ssm and flash-linear-attention if they are installed, and LinGen's block beside a
block of full attention, each alone and with the same MLP.

``TRITON_INTERPRET=1 ... --device rehearsal`` runs the GPU's part in Triton's interpreter, at sizes that
mean nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..generators.layers.mixer import build_mixer
from ..kernels.interpreter import enable_interpreter
from ..kernels.selective_scan.ops import selective_scan
from ..kernels.ssd.ops import ssd
from .report import machine, write_report


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        lengths: of the scans.
        heads, head_dim, state: of SSD; one group.
        batches: batch sizes (GPU).
        grids: token grids of the video blocks (GPU).
        width: of the video blocks.
    """

    lengths: tuple[int, ...] = (4096, 16384, 65536)
    heads: int = 16
    head_dim: int = 64
    state: int = 64
    batches: tuple[int, ...] = (1,)
    grids: tuple[tuple[int, int, int], ...] = ()
    width: int = 1024


# 17, 34 and 68 s of 512-pixel video: 1024 tokens a latent frame.
CUDA = Sizes(
    lengths=tuple(4096 * 4**i for i in range(5)),
    heads=32,
    state=128,
    batches=(1, 2),
    grids=((34, 32, 32), (68, 32, 32), (136, 32, 32)),
)
# Most tokens of a backward pass, which keeps the states between chunks.
TRAINED = 2**18
REHEARSAL = Sizes((70,), 2, 8, 8, (1,), ((8, 4, 2),), 64)


def published_listing(x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = 64):
    """The listing of arXiv 2405.21060: B, C of every head, states passed by a matrix over chunks.

    ``x [B, L, H, P]``, ``d [B, L, H]``, ``A [H]``, ``B, C [B, L, 1, N]``, L a multiple of ``chunk``.
    """

    def sums(a: Tensor) -> Tensor:
        """``[..., T]`` -> ``[..., T, T]``: what lies between a column and a row."""
        size = a.shape[-1]
        square = a[..., None].expand(*a.shape, size)
        lower = torch.ones(size, size, dtype=torch.bool).tril(-1)
        total = square.masked_fill(~lower, 0).cumsum(-2)
        return total.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), -math.inf)

    B, C = (t.expand(-1, -1, x.shape[2], -1).unflatten(1, (-1, chunk)) for t in (B, C))
    values = (x * d[..., None]).unflatten(1, (-1, chunk))
    a = (d * A).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2)
    total = a.cumsum(-1)
    inner = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, sums(a).exp(), values)
    rest = (total[..., -1:] - total).exp()
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, rest, values)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    passing = sums(torch.nn.functional.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", passing, states)[:, :-1]
    outer = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, total.exp())
    return (inner + outer).flatten(1, 2)


def plain_loop(x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = 64):
    """Chunks one after the other, one group; arguments as of `published_listing`, any length."""
    batch, length, heads, head_dim = x.shape
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1])
    outputs = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        rows_B, rows_C = B[:, part, 0], C[:, part, 0]
        total = (d[:, part] * A).cumsum(1).transpose(1, 2)
        values = (x[:, part] * d[:, part, :, None]).transpose(1, 2)
        lower = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool).tril()
        decay = (total[..., :, None] - total[..., None, :]).clamp(max=0).exp()
        scores = (rows_C @ rows_B.transpose(1, 2))[:, None] * torch.where(lower, decay, 0.0)
        y = scores @ values
        y = y + total.exp()[..., None] * (rows_C[:, None] @ state.transpose(2, 3))
        written = values * (total[..., -1:] - total).exp()[..., None]
        state = state * total[..., -1].exp()[..., None, None]
        state = state + written.transpose(2, 3) @ rows_B[:, None]
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def scan_inputs(
    sizes: Sizes, batch: int, length: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(kind)

    return {
        "x": draw(batch, length, sizes.heads, sizes.head_dim),
        "dt": draw(batch, length, sizes.heads, kind=torch.float32).sigmoid() / 10,
        "A": -1 - draw(sizes.heads, kind=torch.float32).abs(),
        "B": draw(batch, length, 1, sizes.state),
        "C": draw(batch, length, 1, sizes.state),
    }


def both_directions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t if k in ("x", "A") else torch.stack([t, t.flip(1)]) for k, t in tensors.items()}


def cpu_seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least CPU time of each; they take turns, so that what else runs meets all of them."""
    best = dict.fromkeys(functions, math.inf)
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - start)
    return best


def forward_backward(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> None:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    function(**leaves).sum().backward()


def measure_cpu(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """A row a length: CPU-seconds of every form."""
    rows = []
    for length in sizes.lengths:
        tensors = scan_inputs(sizes, 1, length, "cpu", torch.float32)
        positional = list(tensors.values())
        both = both_directions(tensors)
        channels = sizes.heads * sizes.head_dim
        u = torch.randn(1, channels, length)
        s6 = {
            "u": u,
            "delta": torch.rand(1, channels, length) / 10,
            "A": -torch.rand(channels, 16) - 1,
            "B": torch.randn(1, 16, length),
            "C": torch.randn(1, 16, length),
        }
        functions = {
            "loop": lambda a=positional: plain_loop(*a),
            "ssd": lambda t=tensors: ssd(**t),
            "ssd, both directions": lambda t=both: ssd(**t, direction="both"),
            "ssd, forward and backward": lambda t=tensors: forward_backward(ssd, t),
        }
        with torch.no_grad():
            seconds = cpu_seconds({k: functions[k] for k in list(functions)[:3]}, repeats)
            few = max(repeats // 3, 1)
            seconds |= cpu_seconds(
                {
                    "listing": lambda a=positional: published_listing(*a),
                    "selective scan": lambda t=s6: selective_scan(**t),
                },
                few,
            )
        with torch.enable_grad():
            seconds |= cpu_seconds({k: functions[k] for k in list(functions)[3:]}, few)
        rows.append({"length": length, **seconds})
    return rows


def event_seconds(function: Callable[[], Any], repeats: int, device: str) -> tuple[float, float]:
    """(median of the repeats, first call), in seconds; CPU time in a rehearsal."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.process_time()
            function()
            times.append(time.process_time() - begin)
    return sorted(times[1:])[(len(times) - 1) // 2], times[0]


def bandwidth(device: str) -> float:
    """Bytes/s of a large copy, read and written."""
    a = torch.empty(2**28 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / event_seconds(lambda: b.copy_(a), 10, device)[0]


def public_kernels() -> dict[str, Callable[..., Tensor]]:
    """The public Triton kernels that are installed: for timing only."""
    found: dict[str, Callable[..., Tensor]] = {}
    with suppress(ImportError):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        found["mamba_ssm"] = partial(mamba_chunk_scan_combined, chunk_size=256)
    with suppress(ImportError):
        from fla.ops.simple_gla import chunk_simple_gla

        def gated_attention(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            B, C = (t.expand(-1, -1, x.shape[2], -1).contiguous() for t in (B, C))
            values = (x * dt[..., None]).to(x.dtype)
            return chunk_simple_gla(q=C, k=B, v=values, g=dt * A, scale=1.0)[0]

        found["flash-linear-attention"] = gated_attention
    return found


def measure_gpu_scans(sizes: Sizes, repeats: int, device: str) -> list[dict[str, Any]]:
    """A row for each batch, length and dtype: seconds, the bound of traffic, and the error."""
    rows, rate, public = [], bandwidth(device), public_kernels()
    for batch in sizes.batches:
        for length in sizes.lengths:
            for dtype in (torch.bfloat16, torch.float32):
                tensors = scan_inputs(sizes, batch, length, device, dtype)
                both = both_directions(tensors)
                # x, B, C and y once, the float32 dt once.
                inner = sizes.heads * sizes.head_dim
                least = 2 * (inner + sizes.state) * dtype.itemsize + 4 * sizes.heads
                with torch.no_grad():
                    y = ssd(**tensors, backend="triton")
                    # A causal scan's first part is the scan of the first part.
                    part = {k: t if k == "A" else t[:, :16384] for k, t in tensors.items()}
                    exact = ssd(**{k: t.double() for k, t in part.items()}, backend="torch")
                    error = float((y[:, :16384].double() - exact).abs().max() / exact.abs().max())
                    seconds, first = event_seconds(
                        lambda t=tensors: ssd(**t, backend="triton"), repeats, device
                    )
                    twice, _ = event_seconds(
                        lambda t=both: ssd(**t, direction="both", backend="triton"),
                        repeats,
                        device,
                    )
                    theirs = {
                        name: event_seconds(lambda f=f, t=tensors: f(**t), repeats, device)[0]
                        for name, f in public.items()
                    }
                trained = None
                if batch * length <= TRAINED:
                    trained, _ = event_seconds(
                        lambda t=tensors: forward_backward(
                            lambda **a: ssd(**a, backend="triton"), t
                        ),
                        repeats,
                        device,
                    )
                rows.append(
                    {
                        "batch": batch,
                        "length": length,
                        "dtype": str(dtype).removeprefix("torch."),
                        "ssd": seconds,
                        "first call": first,
                        "bound": batch * length * least / rate,
                        "share of bandwidth": batch * length * least / rate / seconds,
                        "both directions": twice,
                        "forward and backward": trained,
                        **theirs,
                        # A public kernel scans one direction a call.
                        "best public twice / both directions": (
                            2 * min(theirs.values()) / twice if theirs else None
                        ),
                        "error": error,
                    }
                )
    return rows


def measure_gpu_blocks(sizes: Sizes, repeats: int, device: str) -> list[dict[str, Any]]:
    """LinGen's block beside full attention of the same width in bfloat16: mixers, then with MLPs."""
    rows = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    mate = build_mixer("mate", sizes.width, layer=3).to(device, dtype).eval()
    attention = build_mixer("attention", sizes.width).to(device, dtype).eval()
    mlp = nn.Sequential(
        nn.LayerNorm(sizes.width),
        nn.Linear(sizes.width, 4 * sizes.width),
        nn.GELU(),
        nn.Linear(4 * sizes.width, sizes.width),
    ).to(device, dtype)
    for grid in sizes.grids:
        tokens = math.prod(grid)
        x = torch.randn(1, tokens, sizes.width, device=device, dtype=dtype)
        with torch.no_grad():
            ours, _ = event_seconds(lambda x=x, g=grid: mate(x, grid=g), repeats, device)
            full, _ = event_seconds(lambda x=x: attention(x), repeats, device)
            rest, _ = event_seconds(lambda x=x: mlp(x), repeats, device)
        rows.append(
            {
                "tokens": tokens,
                "mate": ours,
                "attention": full,
                "ratio": full / ours,
                "mlp": rest,
                "ratio with mlp": (full + rest) / (ours + rest),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --: |" * len(rows[0])]
    return lines + ["| " + " | ".join(map(text, row.values())) + " |" for row in rows]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the targets are stated in: shares of the loop, growth, and the price of a direction."""
    found = []
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        found.append(
            {
                "length": row["length"],
                "ssd / loop": row["ssd"] / row["loop"],
                "listing / ssd": row["listing"] / row["ssd"],
                "both / one": row["ssd, both directions"] / row["ssd"],
                "growth": None if before is None else row["ssd"] / before["ssd"],
            }
        )
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    machine = report["machine"]
    lines = [
        f"{machine['name']}, {machine['threads']} thread, torch {machine['torch']}, Python "
        f"{machine['python']}. {machine['heads']} heads x {machine['head_dim']}, state "
        f"{machine['state']}, one group.",
        "",
    ]
    for name in ("seconds", "ratios", "scans", "blocks"):
        if report.get(name):
            lines += [f"{name}:", "", *table(report[name]), ""]
    return "\n".join(lines)


def measure(sizes: Sizes, device: str, repeats: int) -> dict[str, Any]:
    """All tables for a device: cpu, cuda, or rehearsal."""
    if device == "cpu":
        rows = measure_cpu(sizes, repeats)
        return {"seconds": rows, "ratios": ratios(rows)}
    device = "cpu" if device == "rehearsal" else device
    return {
        "scans": measure_gpu_scans(sizes, repeats, device),
        "blocks": measure_gpu_blocks(sizes, repeats, device),
    }


def report_on(device: str, repeats: int) -> dict[str, Any]:
    """The machine and all tables, with one thread."""
    torch.set_num_threads(1)
    about = machine(device)
    if device == "rehearsal":
        enable_interpreter()
    sizes = {"cuda": CUDA, "rehearsal": REHEARSAL}.get(device, Sizes())
    shape = {"heads": sizes.heads, "head_dim": sizes.head_dim, "state": sizes.state}
    return {"machine": about | shape, **measure(sizes, device, repeats)}


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; the tables go beside it.")],
    device: Annotated[str, typer.Option(help="cpu, cuda, or rehearsal.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each form.")] = 5,
) -> None:
    """Measure the scans on this machine."""
    write_report(out, partial(report_on, device, repeats), markdown)


if __name__ == "__main__":
    typer.run(main)
