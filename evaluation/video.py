"""How good models of video are: what tokens keep of a clip, what is drawn, and frames in between."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from .. import __version__
from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..modalities.video import composite, fit_frames
from ..modalities.video_datasets import (
    AnimatedPack,
    ClipFolder,
    ClipList,
    ClipShards,
    ClipTextDataset,
)
from ..pipelines.seeds import check_seed
from ..pipelines.video_reconstruction import decode_clip, encode_clip
from ..tokenizers.base import Tokenizer
from ..weights.registry import list_models
from .metrics import LPIPS_MIN_SIZE, frechet_distance, load_lpips, psnr, retrieval_ranks, ssim

if TYPE_CHECKING:
    from ..generators.conditioning.clip import TextImageCLIP
    from ..pipelines.frame_interpolation import FrameInterpolationPipeline
    from ..pipelines.text_to_video import TextToVideoPipeline

OWN_EXTRACTOR = "frames and their changes by the model's CLIP (mean features, mean |differences|)"
I3D_EXTRACTOR = "I3D, 400 logits at 224 px"
I3D_SIZE = 224
# Most frames of a clip for the Frechet distance, as in published figures.
FRECHET_FRAMES = 16

Extractor = Callable[[Tensor], Tensor]


def open_clips(data: str | Path, **window: Any) -> dict[str, ClipTextDataset]:
    """A pack, folder, list or shards of clips by split; "train" and "test" of an animated pack,
    otherwise "all".

    Args:
        window: ``num_frames`` and ``size`` of the clips; an animated pack's are spread over the loop.

    Raises:
        InputError: no clips there.
    """
    path = Path(data)
    if (path / "animated.jsonl").is_file():
        splits = {
            name: AnimatedPack(path, ("real",), (name,), **window) for name in ("train", "test")
        }
        for name, part in splits.items():
            if not len(part):
                raise InputError(f'The {name} split of "{data}" is empty: give the whole pack.')
        return splits
    if (path / "clips.jsonl").is_file():
        return {"all": ClipList(path / "clips.jsonl", **window)}
    if path.suffix == ".jsonl":
        return {"all": ClipList(path, **window)}
    if path.suffix == ".tar" or "{" in path.name or any(path.glob("*.tar")):
        return {"all": ClipShards(data, **window)}
    return {"all": ClipFolder(path, **window)}


def clip_extractor(clip: TextImageCLIP) -> Extractor:
    """Clips ``[B, 3, T, H, W]`` in [-1, 1] -> ``[B, 2 D]``: the mean of the frames' features, and the
    mean absolute difference of neighbours."""

    def extract(video: Tensor) -> Tensor:
        frames = video.transpose(1, 2)
        found = clip.encode_image(frames.flatten(0, 1).to(clip.device)).float().cpu()
        found = found.unflatten(0, frames.shape[:2])
        moved = found.diff(dim=1).abs()
        moved = moved.mean(1) if moved.shape[1] else torch.zeros_like(found[:, 0])
        return torch.cat([found.mean(1), moved], dim=1)

    return extract


def load_i3d(path: str | Path) -> Extractor:
    """I3D of Kinetics-400 as TorchScript, such as the ``i3d_torchscript.pt`` of StyleGAN-V: clips
    ``[B, 3, T, H, W]`` in [-1, 1] -> logits ``[B, 400]``. Frames are resized to 224 here.

    TorchScript is a program: give only a file that you trust.

    Raises:
        InputError: no such file, or none of TorchScript.
    """
    try:
        model = torch.jit.load(str(path), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f'"{path}" is not I3D as TorchScript: give i3d_torchscript.pt of StyleGAN-V.'
        ) from error

    def extract(video: Tensor) -> Tensor:
        size = (I3D_SIZE, I3D_SIZE)
        frames = F.interpolate(video.transpose(1, 2).flatten(0, 1), size, mode="bilinear")
        video = frames.unflatten(0, (len(video), -1)).transpose(1, 2)
        return model(video, rescale=False, resize=False, return_features=True).float()

    return extract


def motion(video: Tensor) -> float:
    """Mean absolute difference of neighbouring frames of ``[..., T, H, W]``; 0 stands still."""
    return float(video.diff(dim=-3).abs().mean()) if video.shape[-3] > 1 else 0.0


@torch.no_grad()
def evaluate_video(
    model: str | Path | TextToVideoPipeline | Tokenizer,
    data: str | Path,
    clips: int = 64,
    names: int = 100,
    seed: int = 0,
    lpips_backbone: str | Path | None = None,
    i3d: str | Path | None = None,
    scorer: TextImageCLIP | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a model of video; print a table, write JSON, return the same.

    Reconstruction (of the test split, if there is one): PSNR (dB), SSIM and LPIPS, each over the
    frames of a clip and then over clips. Generation, of one clip a name: how near its middle frame,
    and the mean of its frames, are to the right name among all by CLIP, beside real clips;
    the Frechet distance to real clips, with its extractor; the mean difference of neighbouring frames
    beside that of real clips.

    Args:
        model: a text-to-video pipeline, or a tokenizer (which is only reconstructed with), or the
            name or folder of one.
        data: an animated pack, or a folder, list or shards of captioned clips.
        clips: clips reconstructed.
        names: names drawn, and candidates that each clip is ranked against.
        seed: picks clips and names, and counts up from there over what is drawn.
        lpips_backbone: torchvision's AlexNet weights; LPIPS is left out without them.
        i3d: see `load_i3d`; without it the Frechet distance is over features of CLIP, and says so.
        scorer: the CLIP that judges; default the shipped "sticker"'s, else the pipeline's own.
        out: JSON file to write.
        console: where progress and tables go; default stderr.

    Raises:
        InputError: a number out of range, no such model, data or file, or too little data.
    """
    for name, value, least in (("clips", clips, 1), ("names", names, 2)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")
    check_seed(seed)
    console = console or Console(stderr=True)
    # Entered first, so that a missing folder is known before minutes of work.
    with nullcontext() if out is None else atomic_path(out) as temporary:
        lpips = None if lpips_backbone is None else load_lpips(lpips_backbone)
        label = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        if isinstance(model, (str, Path)):
            model = _load(model)
        tokenizer = model if isinstance(model, Tokenizer) else model.tokenizer
        frames = tokenizer.num_frames if model is tokenizer else model.default_num_frames
        splits = open_clips(data, num_frames=frames)
        report: dict[str, Any] = {
            "model": label,
            "data": str(data),
            "software": {"tessera": __version__, "torch": torch.__version__},
            "seed": seed,
        }
        with Progress(console=console, transient=True) as progress:
            report["reconstruction"] = _reconstruct(tokenizer, splits, clips, seed, lpips, progress)
            if model is not tokenizer:
                extractor = None if i3d is None else load_i3d(i3d)
                judge = scorer or _scorer(model)
                report["generation"] = _generate(
                    model, splits, names, seed, judge, extractor, progress
                )
        _print(report, console)
        if temporary is not None:
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf8")
    return report


@torch.no_grad()
def evaluate_interpolation(
    model: str | Path | FrameInterpolationPipeline,
    data: str | Path,
    triplets: int = 2,
    size: int | None = None,
    lpips_backbone: str | Path | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure frames made between frames: PSNR (dB), SSIM and LPIPS of the middle of three real ones,
    beside the mean of its neighbours and the nearer of them (the first).

    Args:
        model: a pipeline, or the name or folder of one.
        data: a folder or list of clips, such as the clips pack.
        triplets: of each clip, spread evenly over it; the middle frame is held out.
        size: of squares that clips are cut to; default: as they are.
        lpips_backbone: torchvision's AlexNet weights; LPIPS is left out without them.
        out: JSON file to write.
        console: where progress and the table go; default stderr.

    Raises:
        InputError: a number out of range, no such model, data or file, or clips that are too short.
    """
    if triplets < 1:
        raise InputError(f"triplets must be at least 1, got {triplets}.")
    console = console or Console(stderr=True)
    with nullcontext() if out is None else atomic_path(out) as temporary:
        lpips = None if lpips_backbone is None else load_lpips(lpips_backbone)
        label = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        if isinstance(model, (str, Path)):
            from ..pipelines.frame_interpolation import FrameInterpolationPipeline

            model = FrameInterpolationPipeline.from_pretrained(model)
        dataset = list(open_clips(data, size=size).values())[-1]
        metrics = _metrics(lpips)
        found: dict[str, dict[str, list[float]]] = {
            way: {name: [] for name in metrics} for way in ("model", "average", "nearest")
        }
        used = 0
        with Progress(console=console, transient=True) as progress:
            for i in progress.track(range(len(dataset)), description="Interpolating"):
                video = composite(dataset.clip(i).frames)
                count = min(triplets, video.shape[1] // 3)
                for k in range(count):
                    at = round((k + 0.5) * (video.shape[1] - 2) / count)
                    first, truth, last = video[:, at : at + 3].transpose(0, 1)[:, None]
                    made = list(model.stream([first[0], last[0]]))[1][None]
                    guesses = {"model": made, "average": (first + last) / 2, "nearest": first}
                    used += 1
                    for way, guess in guesses.items():
                        for name, metric in metrics.items():
                            found[way][name] += metric(guess, truth).tolist()
        if not used:
            raise InputError(f'The clips of "{data}" have fewer than three frames each.')
        report = {
            "model": label,
            "data": str(data),
            "software": {"tessera": __version__, "torch": torch.__version__},
            "interpolation": {
                "clips": len(dataset),
                "triplets": used,
                **{
                    way: {name: fmean(values) for name, values in row.items()}
                    for way, row in found.items()
                },
            },
        }
        _print(report, console)
        if temporary is not None:
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf8")
    return report


def _load(name: str | Path) -> TextToVideoPipeline | Tokenizer:
    from ..pipelines.loading import pipeline_class
    from ..pipelines.text_to_video import TextToVideoPipeline
    from ..tokenizers.auto import AutoTokenizer, tokenizer_class

    if pipeline_class(name) is None and tokenizer_class(name) is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not isinstance(tokenizer, Tokenizer) or tokenizer.num_frames == 1:
            raise InputError(f'"{name}" is no tokenizer of video.')
        return tokenizer
    return TextToVideoPipeline.from_pretrained(name)


def _scorer(pipeline: TextToVideoPipeline) -> TextImageCLIP:
    """The CLIP that ships, so that figures of several models compare; else the pipeline's own."""
    from ..generators.conditioning.clip import TextImageCLIP
    from ..weights.registry import model_info

    if "sticker" in list_models(shipped=True):
        return TextImageCLIP.from_pretrained(model_info("sticker").folder / "clip").eval()
    if not isinstance(pipeline.clip, TextImageCLIP):
        raise InputError("No CLIP is there to judge with: pass one as scorer.")
    return pipeline.clip


def _metrics(lpips: nn.Module | None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        found["lpips"] = lambda a, b: lpips(a.clamp(-1, 1), b).flatten()
    return found


def _read(dataset: ClipTextDataset, index: int, size: int) -> Tensor:
    """A clip over white, ``[1, 3, T, size, size]``."""
    frames = composite(dataset.clip(index).frames).transpose(0, 1)
    return fit_frames(frames, size, "contain").transpose(0, 1)[None]


def _reconstruct(
    tokenizer: Tokenizer,
    splits: dict[str, ClipTextDataset],
    count: int,
    seed: int,
    lpips: nn.Module | None,
    progress: Progress,
) -> dict[str, Any]:
    split = list(splits)[-1]
    dataset, size = splits[split], tokenizer.image_size
    if lpips is not None and size < LPIPS_MIN_SIZE:
        raise InputError(
            f"LPIPS needs frames of {LPIPS_MIN_SIZE} pixels or more, this model has {size}: leave "
            "lpips_backbone out."
        )
    indices = random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))
    metrics = _metrics(lpips)
    found: dict[str, list[float]] = {name: [] for name in metrics}
    tokens = frames = 0
    for index in progress.track(indices, description="Reconstructing"):
        video = _read(dataset, index, size)
        ids = encode_clip(tokenizer, video.to(tokenizer.device))
        again = decode_clip(tokenizer, ids, video.shape[2]).float().cpu()
        tokens, frames = tokens + ids.shape[1], frames + video.shape[2]
        pair = [each[0].transpose(0, 1) for each in (again, video)]
        for name, metric in metrics.items():
            found[name].append(fmean(metric(*pair).tolist()))
    bits = None
    if tokenizer.vocab_size is not None:
        bits = tokens * math.log2(tokenizer.vocab_size) / frames
    return {
        "split": split,
        "clips": len(indices),
        "frames": frames,
        "image_size": size,
        "bits_per_frame": bits,
        **{name: fmean(values) for name, values in found.items()},
    }


def _generate(
    pipeline: TextToVideoPipeline,
    splits: dict[str, ClipTextDataset],
    count: int,
    seed: int,
    scorer: TextImageCLIP,
    extractor: Extractor | None,
    progress: Progress,
) -> dict[str, Any]:
    dataset = next(iter(splits.values()))
    chosen: dict[str, int] = {}
    for index in random.Random(seed).sample(range(len(dataset)), len(dataset)):
        if len(chosen) < count:
            chosen.setdefault(dataset.name(index), index)
    if len(chosen) < 2:
        raise InputError("Generation is measured over at least 2 names: give more data.")
    names = list(chosen)
    kind = OWN_EXTRACTOR if extractor is None else I3D_EXTRACTOR
    extract = extractor or clip_extractor(scorer)
    texts = torch.cat([scorer.encode_text(names[i : i + 32]) for i in range(0, len(names), 32)])
    rows: dict[str, dict[str, list]] = {
        way: {"middle": [], "all": [], "features": [], "motion": []}
        for way in ("generated", "real")
    }
    task = progress.add_task("Drawing names", total=len(names))
    for number, index in enumerate(chosen.values()):
        made = pipeline(
            dataset.captions(index)[0], seed=(seed + number) % 2**32, output_type="pt"
        ).frames
        real = _read(dataset, index, pipeline.image_size)
        for way, video in (("generated", made), ("real", real)):
            seen = scorer.encode_image(video[0].transpose(0, 1).to(scorer.device)).float().cpu()
            rows[way]["middle"].append(seen[len(seen) // 2])
            rows[way]["all"].append(F.normalize(seen.mean(0), dim=0))
            rows[way]["features"].append(extract(video[:, :, :FRECHET_FRAMES])[0])
            rows[way]["motion"].append(motion(video))
        progress.advance(task)
    matches, texts = torch.arange(len(names)), texts.float().cpu()
    report: dict[str, Any] = {"names": len(names)}
    for way, row in rows.items():
        report[way] = {"motion": fmean(row["motion"])}
        for part in ("middle", "all"):
            queries = torch.stack(row[part])
            ranks = retrieval_ranks(queries, texts, matches)
            report[way][part] = {
                "top_1": float((ranks <= 1).float().mean()),
                "top_5": float((ranks <= 5).float().mean()),
                "mean_rank": float(ranks.float().mean()),
                "cosine": float((queries * texts).sum(1).mean()),
            }
    generated, real = (torch.stack(rows[way]["features"]) for way in ("generated", "real"))
    distance = frechet_distance(generated, real)
    report["frechet"] = {"extractor": kind, "clips": len(names), "distance": distance}
    still = report["real"]["motion"] == 0
    report["motion_ratio"] = (
        None if still else report["generated"]["motion"] / report["real"]["motion"]
    )
    return report


def _print(report: dict[str, Any], console: Console) -> None:
    """The tables of a report."""
    if "reconstruction" in report:
        part = report["reconstruction"]
        table = Table("clips", "frames", "bits a frame", "PSNR", "SSIM", "LPIPS")
        numbers = [part["bits_per_frame"], part["psnr"], part["ssim"], part.get("lpips")]
        shown = [
            "-" if value is None else f"{value:.{digits}f}"
            for value, digits in zip(numbers, (0, 2, 3, 3), strict=True)
        ]
        table.add_row(str(part["clips"]), str(part["frames"]), *shown)
        console.print(f"Reconstruction ({part['split']}), {part['image_size']} px")
        console.print(table)
    if "generation" in report:
        part = report["generation"]
        table = Table("", "top-1", "top-5", "mean rank", "all frames top-5", "motion")
        for way in ("generated", "real"):
            row = part[way]
            table.add_row(
                way,
                f"{row['middle']['top_1']:.1%}",
                f"{row['middle']['top_5']:.1%}",
                f"{row['middle']['mean_rank']:.1f}",
                f"{row['all']['top_5']:.1%}",
                f"{row['motion']:.4f}",
            )
        console.print(f"Rank of the right one of {part['names']} names, on the middle frame")
        console.print(table)
        frechet = part["frechet"]
        console.print(
            f"Frechet distance of {frechet['clips']} clips: {frechet['distance']:.3f} by "
            f"{frechet['extractor']}"
        )
    if "interpolation" in report:
        part = report["interpolation"]
        names = list(part["model"])
        table = Table("", *(name.upper() for name in names))
        for way in ("model", "average", "nearest"):
            table.add_row(way, *(f"{part[way][name]:.3f}" for name in names))
        console.print(f"The middle of three frames, {part['triplets']} of {part['clips']} clips")
        console.print(table)
