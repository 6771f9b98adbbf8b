"""How good a model is: what its tokens keep of a picture, and whether it draws what it is told."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from .. import __version__
from ..modalities.datasets import PERMISSIVE_STYLES, ImageTextDataset, StickerPack, open_dataset
from ..modalities.errors import InputError
from ..modalities.files import atomic_path
from ..modalities.image import fit_image, to_tensor
from ..pipelines.reconstruction import decode_tokens
from ..pipelines.seeds import check_seed
from ..tokenizers.base import Tokenizer
from ..weights.registry import find_model
from .metrics import (
    LPIPS_MIN_SIZE,
    diversity,
    frechet_distance,
    load_lpips,
    psnr,
    retrieval_ranks,
    ssim,
)

if TYPE_CHECKING:
    from ..pipelines.text_to_image import TextToImagePipeline

EXTRACTOR = "image features of the model's own CLIP (L2-normalised)"
COLOUR_STYLES = tuple(style for style in PERMISSIVE_STYLES if style != "glyph")


@torch.no_grad()
def evaluate(
    model: str | Path | TextToImagePipeline | Tokenizer,
    data: str | Path,
    names: int = 200,
    pictures: int = 256,
    seeds: int = 4,
    repeated: int = 50,
    batch_size: int = 8,
    seed: int = 0,
    lpips_backbone: str | Path | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a model on captioned pictures; print a table, write JSON, return the same.

    Of a sticker pack the test split is reconstructed, and names of the training and of the test
    split are drawn, one of each concept, no glyphs. Other data have no splits: all of it serves.

    Reconstruction, by number of tokens (powers of two): mean PSNR (dB), SSIM and LPIPS.
    Generation: the rank of the right name among the candidates by the model's own CLIP, and that
    of a real picture of each name, the ceiling; diversity (mean pairwise 1 - cosine of CLIP image
    features) of one prompt's pictures over seeds, beside that of real pictures of one name; the
    Frechet distance of one generated picture a name to the real ones in the same feature space,
    beside that of one real picture a name.

    Args:
        model: a text-to-image pipeline, or a tokenizer (which is only reconstructed with), or the
            name or folder of one.
        data: a sticker pack, a folder of captioned pictures, or WebDataset shards.
        names: names drawn of each split, and candidates that each picture is ranked against.
        pictures: pictures reconstructed.
        seeds: pictures of one prompt for its diversity.
        repeated: names that are drawn with all seeds.
        batch_size: pictures worked on together.
        seed: picks names and pictures, and counts up from there over what is drawn.
        lpips_backbone: torchvision's AlexNet weights; LPIPS is left out without them.
        out: JSON file to write.
        console: where progress and tables go; default stderr.

    Raises:
        InputError: a number out of range, no such model, data or file, or too little data.
    """
    for name, value, least in (
        ("names", names, 2),
        ("pictures", pictures, 1),
        ("seeds", seeds, 2),
        ("repeated", repeated, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")
    check_seed(seed)
    console = console or Console(stderr=True)
    # Entered first, so that a missing folder is known before minutes of work.
    with nullcontext() if out is None else atomic_path(out) as temporary:
        splits = _open_splits(data)
        lpips = None if lpips_backbone is None else load_lpips(lpips_backbone)
        label = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        if isinstance(model, (str, Path)):
            model = _load_model(model)
        tokenizer = model if isinstance(model, Tokenizer) else model.tokenizer
        start = time.perf_counter()
        with Progress(console=console, transient=True) as progress:
            report = {
                "model": label,
                "data": str(data),
                "software": {"tessera": __version__, "torch": torch.__version__},
                "seed": seed,
                "reconstruction": _reconstruct(
                    tokenizer, splits, pictures, batch_size, seed, lpips, progress
                ),
            }
            if model is not tokenizer:
                report["generation"] = _generate(
                    model, splits, names, seeds, repeated, batch_size, seed, progress
                )
        report["seconds"] = round(time.perf_counter() - start, 1)
        print_report(report, console)
        if temporary is not None:
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf8")
    return report


def sample_names(
    dataset: ImageTextDataset, count: int, rng: random.Random
) -> dict[str, tuple[int, ...]]:
    """Up to ``count`` names, each with its pictures, in random order.

    Stickers of one concept ("man cook", "woman cook": one ``base``) share a name drawn from
    theirs, since a CLIP trained on the pack does not tell them apart.
    """
    concepts: dict[str, dict[str, list[int]]] = {}
    for index in range(len(dataset)):
        name = dataset.name(index)
        concept = dataset.stickers[index].base if isinstance(dataset, StickerPack) else name
        concepts.setdefault(concept, {}).setdefault(name, []).append(index)
    chosen: dict[str, tuple[int, ...]] = {}
    for concept in rng.sample(sorted(concepts), len(concepts)):
        name = rng.choice(sorted(concepts[concept]))
        chosen.setdefault(name, tuple(concepts[concept][name]))
        if len(chosen) == count:
            break
    return chosen


def print_report(report: dict[str, Any], console: Console) -> None:
    """The tables of `evaluate`."""
    part = report["reconstruction"]
    side = part["image_size"]
    console.print(f"Reconstruction of {part['pictures']} pictures ({part['split']}), {side}x{side}")
    formats = {"tokens": "d", "psnr": ".2f", "ssim": ".3f", "lpips": ".3f"}
    console.print(
        _table(
            list(part["by_tokens"][0]),
            [[f"{row[k]:{formats[k]}}" for k in row] for row in part["by_tokens"]],
        )
    )
    if "generation" not in report:
        return

    part = report["generation"]
    console.print("Rank of the right name, by the model's own CLIP")
    console.print(
        _table(
            ["names", "pictures", "candidates", "top-1", "top-5", "mean rank"],
            [
                [
                    split,
                    f"{row['names']} {kind}",
                    str(row["candidates"]),
                    f"{row[kind]['top_1']:.1%}",
                    f"{row[kind]['top_5']:.1%}",
                    f"{row[kind]['mean_rank']:.1f}",
                ]
                for split, row in part["retrieval"].items()
                for kind in ("generated", "real")
            ],
        )
    )
    spread, distance = part["diversity"], part["frechet"]
    console.print(f"By the {EXTRACTOR}")
    console.print(
        _table(
            ["", "generated", "real"],
            [
                [
                    f"diversity of {spread['seeds']} pictures of one name",
                    _number(spread["generated"]),
                    _number(spread["real"]),
                ],
                [
                    f"Frechet distance of {distance['pictures']} pictures to "
                    f"{distance['references']} real ones",
                    _number(distance["generated"]),
                    _number(distance["real"]),
                ],
            ],
        )
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _load_model(name: str | Path) -> TextToImagePipeline | Tokenizer:
    folder, info = Path(name), find_model(str(name))
    is_tokenizer = info is not None and info.task.endswith("-tokenizer")
    is_tokenizer |= (folder / "config.json").is_file() and not (
        folder / "model_index.json"
    ).is_file()
    if is_tokenizer:
        from ..tokenizers.auto import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        if not isinstance(tokenizer, Tokenizer):
            raise InputError(f'"{name}" is a codec of sound: measure it with evaluate_audio.')
        return tokenizer
    from ..pipelines.text_to_image import TextToImagePipeline

    return TextToImagePipeline.from_pretrained(name)


def _open_splits(data: str | Path) -> dict[str, ImageTextDataset]:
    """The data by split; "train" and "test" of a sticker pack, otherwise "all"."""
    dataset = open_dataset(data)
    if not isinstance(dataset, StickerPack):
        return {"all": dataset}
    splits = {"train": dataset, "test": StickerPack(data, splits=("test",))}
    for split, part in splits.items():
        if not len(part):
            raise InputError(f'The {split} split of "{data}" is empty: give the whole pack.')
    return splits


def _read_pictures(dataset: ImageTextDataset, indices: Sequence[int], size: int) -> Tensor:
    """Pictures over white, ``[B, 3, size, size]`` in [-1, 1]."""
    return to_tensor([fit_image(dataset.image(i), size, background="white") for i in indices])


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _reconstruct(
    tokenizer: Tokenizer,
    splits: dict[str, ImageTextDataset],
    pictures: int,
    batch_size: int,
    seed: int,
    lpips: nn.Module | None,
    progress: Progress,
) -> dict[str, Any]:
    split = list(splits)[-1]
    dataset = splits[split]
    if lpips is not None and tokenizer.image_size < LPIPS_MIN_SIZE:
        raise InputError(
            f"LPIPS needs pictures of {LPIPS_MIN_SIZE} pixels or more, this model has "
            f"{tokenizer.image_size}: leave lpips_backbone out."
        )
    indices = random.Random(seed).sample(range(len(dataset)), min(pictures, len(dataset)))
    most = tokenizer.num_tokens
    lengths = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    if not tokenizer.ordered:
        lengths = [most]
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        metrics["lpips"] = lambda a, b: lpips(a.clamp(-1, 1), b).flatten()
    found: dict[int, dict[str, list[float]]] = {
        length: {name: [] for name in metrics} for length in lengths
    }
    task = progress.add_task("Reconstructing", total=len(indices) * len(lengths))
    for start, part in zip(
        range(0, len(indices), batch_size), _batches(indices, batch_size), strict=True
    ):
        images = _read_pictures(dataset, part, tokenizer.image_size)
        tokens = tokenizer.encode(images.to(tokenizer.device))
        for length in lengths:
            seeds = [seed + start + i for i in range(len(part))]
            decoded = decode_tokens(tokenizer, tokens[:, :length], seeds).float().cpu()
            for name, metric in metrics.items():
                found[length][name] += metric(decoded, images).tolist()
            progress.advance(task, len(part))
    return {
        "split": split,
        "pictures": len(indices),
        "image_size": tokenizer.image_size,
        "by_tokens": [
            {"tokens": length, **{name: fmean(values) for name, values in row.items()}}
            for length, row in found.items()
        ],
    }


def _generate(
    pipeline: TextToImagePipeline,
    splits: dict[str, ImageTextDataset],
    count: int,
    seeds: int,
    repeated: int,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    splits = {
        split: StickerPack(dataset.root, styles=COLOUR_STYLES, splits=(split,))
        if isinstance(dataset, StickerPack)
        else dataset
        for split, dataset in splits.items()
    }
    rng = random.Random(seed)
    names = {split: sample_names(dataset, count, rng) for split, dataset in splits.items()}
    names = {split: part for split, part in names.items() if part}
    first = next(iter(names), None)
    if first is None or len(names[first]) < 2:
        raise InputError("Generation is measured over at least 2 names: give more data.")
    chosen = {
        split: {name: rng.choice(pictures) for name, pictures in part.items()}
        for split, part in names.items()
    }

    # Every item (name p, picture s) has a seed of its own.
    once = {
        split: [(name, seed + p * seeds) for p, name in enumerate(part)]
        for split, part in names.items()
    }
    again = [
        (name, seed + p * seeds + s)
        for p, name in enumerate(list(names[first])[:repeated])
        for s in range(1, seeds)
    ]
    total = sum(map(len, once.values())) + len(again)
    task = progress.add_task("Drawing names", total=total)

    def draw(items: list[tuple[str, int]]) -> Tensor:
        """CLIP features ``[N, D]`` of generated pictures."""
        features = []
        for part in _batches(items, batch_size):
            generators = [torch.Generator().manual_seed(each % 2**32) for _, each in part]
            prompts = [name for name, _ in part]
            for partial in pipeline.stream(prompts, generator=generators, output_type="pt"):
                progress.update(task, description=f"Drawing names, token {partial.step}")
            features.append(pipeline.clip.encode_image(partial.images).float().cpu())
            progress.advance(task, len(part))
        return torch.cat(features)

    def look(dataset: ImageTextDataset, indices: Sequence[int]) -> Tensor:
        """CLIP features ``[N, D]`` of real pictures, seen at the model's own size."""
        features = []
        for part in _batches(indices, batch_size):
            images = _read_pictures(dataset, part, pipeline.image_size)
            features.append(pipeline.clip.encode_image(images.to(pipeline.device)).float().cpu())
        return torch.cat(features)

    generated = {split: draw(items) for split, items in once.items()}
    more = draw(again)
    real = {split: look(splits[split], list(part.values())) for split, part in chosen.items()}

    retrieval = {}
    for split, part in names.items():
        # Fewer names than asked for are filled up, so that every split has as many to choose from.
        candidates = list(dict.fromkeys([*part, *names[first]]))[:count]
        texts = torch.cat(
            [pipeline.clip.encode_text(some).float().cpu() for some in _batches(candidates, 64)]
        )
        matches = torch.arange(len(part))
        retrieval[split] = {
            "names": len(part),
            "candidates": len(candidates),
            "generated": _summary(retrieval_ranks(generated[split], texts, matches)),
            "real": _summary(retrieval_ranks(real[split], texts, matches)),
        }

    others = {
        name: [i for i in pictures if i != chosen[first][name]]
        for name, pictures in names[first].items()
    }
    alike = [
        i
        for name, pictures in names[first].items()
        if len(pictures) >= seeds
        for i in rng.sample(pictures, seeds)
    ]
    references = [i for pictures in others.values() for i in pictures]
    reference = look(splits[first], references) if len(references) > 1 else real[first]
    groups = more.unflatten(0, (-1, seeds - 1))
    return {
        "settings": {
            "num_tokens": pipeline.default_num_tokens,
            "num_inference_steps": pipeline.tokenizer.config.num_inference_steps,
            "guidance_scale": pipeline.config.guidance_scale,
            "temperature": pipeline.config.temperature,
            "top_k": pipeline.config.top_k,
            "top_p": pipeline.config.top_p,
        },
        "retrieval": retrieval,
        "diversity": {
            "extractor": EXTRACTOR,
            "seeds": seeds,
            "names": len(groups),
            "generated": diversity(
                torch.cat([generated[first][: len(groups), None], groups], dim=1)
            ),
            "real": diversity(look(splits[first], alike).unflatten(0, (-1, seeds)))
            if alike
            else None,
        },
        "frechet": {
            "extractor": EXTRACTOR,
            "dimensions": reference.shape[1],
            "pictures": len(generated[first]),
            "references": len(reference),
            "generated": frechet_distance(generated[first], reference),
            # Without other pictures of the names there is nothing to hold a real one against.
            "real": frechet_distance(real[first], reference) if len(references) > 1 else None,
        },
    }


def _summary(ranks: Tensor) -> dict[str, float]:
    ranks = ranks.double()
    return {
        "top_1": (ranks <= 1).double().mean().item(),
        "top_5": (ranks <= 5).double().mean().item(),
        "mean_rank": ranks.mean().item(),
    }
