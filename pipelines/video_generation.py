"""What the pipelines that make video share: scene after scene, frames out of tokens as they come."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..generators.masked.phenaki import scene_frames
from ..modalities.errors import InputError
from ..modalities.image import load_image, to_pil, to_tensor
from ..modalities.video import (
    MAX_BYTES,
    Source,
    Video,
    composite,
    count_pictures,
    fit_frames,
    load_video,
)
from ..tokenizers.auto import AutoTokenizer
from ..tokenizers.base import Tokenizer
from ..weights.loading import find_files, licence_notice, load_folder, load_published
from ..weights.registry import (
    VIDEO_TASKS,
    ModelInfo,
    find_model,
    list_models,
    resolve_model,
    video_generator_classes,
)
from . import loading
from .seeds import check_seed, random_seed, seed_generators
from .video_writers import SETTINGS, VideoGenerator, VideoWriter, video_writer

OUTPUT_TYPES = ("pil", "np", "pt")
# Longer clips are refused on a CPU; two minutes at eight frames a second.
MAX_CPU_FRAMES = 1024
# Operations a second of one CPU thread in these models, for estimates: few reach it.
CPU_SPEED = 2e10

Start = Source | Video | Tensor | Sequence[Image.Image]


@dataclass
class VideoPipelineOutput(BaseOutput):
    """Clips.

    Attributes:
        frames: a list of PIL frames a clip; float ``[B, T, H, W, 3]`` in [0, 1] for "np"; float
            ``[B, 3, T, H, W]`` in [-1, 1] for "pt".
        frame_rate: frames a second.
        tokens: of each round, ids int64 ``[B, n]`` or latents ``[B, n, latent_dim]``; those of the
            frames that a round went on from included.
        seeds: of each clip.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor
    frame_rate: float
    tokens: list[Tensor]
    seeds: list[int]


@dataclass
class VideoPartial:
    """What is there after ``step`` of ``total`` steps.

    Attributes:
        scene: that is being written, from 0.
        frames: a function: the clips so far float ``[B, 3, n, S, S]``, n from 0; it decodes what is
            new, and for a generator that writes all frames at once shows them unfinished.
        finish: a function: what a call returns that ends here.
        output: set in the last one.
    """

    step: int
    total: int
    scene: int
    frames: Callable[[], Tensor]
    finish: Callable[[], VideoPipelineOutput]
    output: VideoPipelineOutput | None = None

    def preview(self) -> list[list[Image.Image]]:
        """The frames so far of each clip."""
        return to_frames(self.frames())


@dataclass(frozen=True)
class Round:
    """One clip of a generator: ``new`` frames of a scene behind ``known`` ones."""

    scene: int
    known: int
    new: int


@dataclass
class Run:
    """One call, checked.

    Attributes:
        conditions: of each scene, arguments of the generator's ``stream``.
        rounds: what is written, in order.
        frames: wanted in all; the last step may give more.
        start: frames ``[B, 3, T, S, S]`` in [-1, 1] to go on from.
        keep_start: they are the first of the clip.
    """

    conditions: list[dict[str, Tensor]]
    rounds: list[Round]
    frames: int
    frame_rate: float
    seeds: list[int]
    settings: dict[str, Any]
    start: Tensor | None
    keep_start: bool
    output_type: str


class VideoGenerationPipeline(DiffusionPipeline):
    """A generator over a tokenizer; see its children.

    Attributes:
        condition: what it draws from.
        name: that it was loaded by.
    """

    condition: ClassVar[str]
    name: str | None = None

    def set_up(self, tokenizer: Tokenizer, generator: VideoGenerator) -> None:
        """Raise InputError unless the two fit each other and this kind of pipeline."""
        conditions = video_writer(tokenizer, generator).conditions
        if self.condition not in conditions:
            wanted = " or a ".join(conditions)
            raise InputError(
                f"This {type(generator).__name__} goes on from {wanted}, not from a "
                f"{self.condition}: load it by load_video_pipeline."
            )
        self.register_modules(tokenizer=tokenizer, generator=generator)

    @cached_property
    def writer(self) -> VideoWriter:
        return video_writer(self.tokenizer, self.generator)

    @property
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        return self.tokenizer.image_size

    @property
    def default_num_frames(self) -> int:
        return self.config.get("num_frames") or self.tokenizer.num_frames

    @property
    def settings(self) -> dict[str, Any]:
        """What a call may set of the generator, with the values that it has otherwise."""
        return self.writer.settings()

    # Loading

    @classmethod
    def from_pretrained(
        cls, name: str | Path, files: str | Path | None = None, **options: Any
    ) -> VideoGenerationPipeline:
        """Load a model by name.

        Args:
            name: a shipped model by its plain name; a published generator by its registered name or
                hub id, with the tokenizer that belongs to it; a folder of ``save_pretrained``, of a
                pipeline or of a generator alone; or the hub id of a saved pipeline.
            files: folder with the published files of the generator; default: the hub's cache, then a
                download.
            options: parts in place of the model's own, ``tokenizer=`` (also by name or folder) and
                ``clip=``; or others of diffusers' ``from_pretrained``.

        Raises:
            InputError: nothing of that name, another kind of model, damaged files, or parts that do
                not fit each other.
        """
        info, folder = find_video_model(name), Path(name)
        saved = folder.is_dir() and not (info is not None and info.shipped)
        alone = saved and not (folder / "model_index.json").is_file()
        if files is not None or alone or (not saved and info is not None and not info.shipped):
            pipeline = cls._from_generator(
                name, files, None if saved and files is None else info, options
            )
        else:
            pipeline = loading.load_folder(cls, super().from_pretrained, name, **options)
        pipeline.name = str(name)
        return pipeline

    @classmethod
    def _from_generator(
        cls,
        name: str | Path,
        files: str | Path | None,
        info: ModelInfo | None,
        options: dict[str, Any],
    ) -> VideoGenerationPipeline:
        tokenizer = options.pop("tokenizer", None) or (info and info.tokenizer)
        if tokenizer is None:
            raise InputError(
                f'"{name}" holds a generator alone: pass its tokenizer too, tokenizer="NAME" or a '
                "folder."
            )
        if info is None:
            generator = load_folder(Path(name), "generator", video_generator_classes(), {})
        else:
            notice = licence_notice(info)
            if notice is not None:
                warnings.warn(notice, stacklevel=3)
            generator = load_published(info, find_files(info, files))
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        dtype = options.pop("dtype", None)
        pipeline = cls(tokenizer=tokenizer, generator=generator, **options)
        return pipeline if dtype is None else pipeline.to(dtype)

    # Making

    def _prepare(
        self,
        scenes: Sequence[dict[str, Tensor]],
        seconds: Sequence[float] | None,
        num_frames: int | None,
        frame_rate: float | None,
        start: Start | None,
        keep_start: bool,
        seeds: list[int],
        prime_frames: int,
        max_frames: int | None,
        output_type: str,
        settings: dict[str, Any],
    ) -> Run:
        if output_type not in OUTPUT_TYPES:
            raise InputError(
                f'Unknown output_type "{output_type}": choose from {", ".join(OUTPUT_TYPES)}.'
            )
        rate = self.config.frame_rate if frame_rate is None else frame_rate
        if not 0 < rate <= 240:
            raise InputError(f"Frames per second must be above 0 and at most 240, got {rate}.")
        if prime_frames < 1:
            raise InputError(
                f"A clip goes on from at least 1 frame, got prime_frames={prime_frames}."
            )
        settings = self._check_settings(settings)
        if start is not None and not self.writer.continues:
            raise InputError(
                f"{type(self.generator).__name__} writes whole clips and cannot go on from frames: "
                "leave the frames out, or choose another model."
            )
        frames, available = None, 0
        if start is not None:
            frames = self._start(start, len(seeds))
            available = self.writer.known(frames.shape[2], prime_frames)
            frames = frames[:, :, -available:]
        if seconds is None:
            wanted = self.default_num_frames if num_frames is None else num_frames
            counts = [wanted - available if keep_start else wanted]
        else:
            if num_frames is not None:
                raise InputError("A story has its own length: leave num_frames out.")
            self._check_seconds(seconds, rate)
            step = self.writer.step
            counts = scene_frames(seconds, rate, step, continues=available > 0)
            wanted = sum(counts) + (available if keep_start else 0)
        if counts[0] < 1:
            least = 1 + available if keep_start else 1
            raise InputError(f"A clip here has at least {least} frames, got {wanted}.")
        self._check_size(wanted, len(seeds), settings, prime_frames, max_frames)
        rounds = self._rounds(counts, available, prime_frames)
        return Run(
            list(scenes), rounds, wanted, rate, seeds, settings, frames, keep_start, output_type
        )

    def _check_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.settings
        for name, value in given.items():
            if name not in SETTINGS:
                raise InputError(f'There is no setting "{name}": leave it out.')
            if value is None:
                continue
            if name not in found:
                raise InputError(
                    f"{type(self.generator).__name__} takes no {name}: leave it out. This model "
                    f"takes {', '.join(found) or 'none'}."
                )
            found[name] = value
        return found

    def _check_seconds(self, seconds: Sequence[float], rate: float) -> None:
        if not self.writer.continues and len(seconds) > 1:
            raise InputError(
                f"{type(self.generator).__name__} cannot go on from frames: tell it one scene."
            )
        for value in seconds:
            if not 0 < value * rate < 1e9:
                raise InputError(f"A scene must last longer than 0 seconds, got {value}.")

    def _rounds(self, counts: Sequence[int], available: int, prime_frames: int) -> list[Round]:
        rounds = []
        for scene, left in enumerate(counts):
            while left > 0:
                known = self.writer.known(available, prime_frames)
                new = self.writer.new(known, left)
                rounds.append(Round(scene, known, new))
                available, left = available + new, left - new
        if len(rounds) > 1 and not self.writer.continues:
            raise InputError(
                f"{type(self.generator).__name__} makes clips of at most {self.writer.window} "
                f"frames, got {sum(counts)}."
            )
        return rounds

    def _check_size(
        self,
        frames: int,
        clips: int,
        settings: dict[str, Any],
        prime_frames: int,
        max_frames: int | None,
    ) -> None:
        """Refuse, with an estimate, what this machine would not hold or not finish in a sitting."""
        # As tensors while it is made, once more in what is returned, and as bytes in pictures.
        needed = clips * frames * 3 * self.image_size**2 * (4 + 4 + 1)
        limit = max_frames
        if limit is None and self.device.type == "cpu":
            limit = MAX_CPU_FRAMES
        if needed <= MAX_BYTES and (limit is None or frames * clips <= limit):
            return
        rounds = self._rounds([frames], 0, prime_frames)[:1]
        writer, size = self.writer, sum(p.numel() for p in self.generator.parameters())
        known = writer.known(rounds[0].new, prime_frames)
        count = max(1, -(-frames // max(1, writer.new(known, frames))))
        passes = clips * count * writer.passes(rounds[0].new, settings)
        seconds = 2 * size * passes / (CPU_SPEED * torch.get_num_threads())
        time = f"at least {duration(seconds)} on this CPU and " if self.device.type == "cpu" else ""
        most = int(MAX_BYTES / (needed / (clips * frames)))
        most = most if limit is None else min(most, limit)
        several = f" in {clips} clips" if clips > 1 else ""
        raise InputError(
            f"{frames * clips:,} frames of {self.image_size} x {self.image_size} pixels{several} "
            f"would take {time}{needed / 1e9:.2f} GB of memory in {count:,} rounds of the model, "
            f"the limit is {most:,} frames: ask for fewer, and go on from the last ones of that "
            "clip."
        )

    def _start(self, source: Start, batch: int) -> Tensor:
        """Frames to go on from, ``[B, 3, T, S, S]``."""
        if isinstance(source, Tensor):
            frames = source
            if frames.ndim not in (4, 5) or frames.shape[-4] not in (3, 4) or not frames.shape[-3]:
                raise InputError(
                    "Frames to go on from have the shape [3 or 4, frames, height, width], with a "
                    f"batch before or not, got {list(frames.shape)}."
                )
            clips = list(frames if frames.ndim == 5 else frames[None])
            if len(clips) not in (1, batch):
                raise InputError(f"{batch} clips cannot go on from those of {len(clips)}.")
        else:
            clips = [read_frames(source)]
        clips = [
            fit_frames(composite(clip).transpose(0, 1).float(), self.image_size).transpose(0, 1)
            for clip in clips
        ]
        frames = torch.stack(clips)
        if not bool(torch.isfinite(frames).all()):
            raise InputError("Some pixels to go on from are not finite numbers: clean them first.")
        return frames.to(self.device).expand(batch, -1, -1, -1, -1)

    def _num_steps(self, run: Run) -> int:
        """Of the generator."""
        return sum(self.writer.num_yields(r.known, r.new, run.settings) for r in run.rounds)

    @torch.no_grad()
    def _stream(self, run: Run, steps_before: int = 0) -> Iterator[VideoPartial]:
        """Yield a `VideoPartial` after each step of the generator, counted from ``steps_before``."""
        writer, device = self.writer, self.device
        streams = [seed_generators(seed, 1)[0] for seed in run.seeds]
        total = steps_before + self._num_steps(run)
        last, done, tokens_done, step = run.start, [], [], steps_before
        for number, each in enumerate(run.rounds):
            prime = None
            if each.known:
                prime = writer.encode(last[:, :, -each.known :].to(device))
            # The frames that a round went on from are seen again where they begin the clip.
            kept = number == 0 and run.keep_start
            first = 0 if kept else each.known
            end = each.known + each.new
            decode, condition = writer.decoder(), run.conditions[each.scene]
            for tokens in writer.write(condition, prime, end, streams, run.settings):
                step += 1

                def frames(
                    tokens: Tensor = tokens,
                    part: slice = slice(first, end),
                    decode: Callable[[Tensor], Tensor] = decode,
                    before: tuple[Tensor, ...] = tuple(done),
                    known: int = each.known if kept else 0,
                ) -> Tensor:
                    now = decode(tokens)
                    if now.numel() == 0 or now.shape[2] < known:
                        now = run.start if known else now
                    now = [now[:, :, part].float().cpu()] if now.numel() else []
                    shown = [*before, *now]
                    if not shown:
                        return torch.empty(len(run.seeds), 3, 0, self.image_size, self.image_size)
                    return torch.cat(shown, dim=2)[:, :, : run.frames]

                def finish(
                    frames: Callable[[], Tensor] = frames,
                    written: tuple[Tensor, ...] = (*tokens_done, tokens),
                ) -> VideoPipelineOutput:
                    return self._output(frames(), list(written), run)

                partial = VideoPartial(step, total, each.scene, frames, finish)
                if step < total:
                    yield partial
            clip = decode(tokens)[:, :, :end].float().cpu()
            done.append(clip[:, :, first:])
            tokens_done.append(tokens)
            seen = clip[:, :, each.known :]
            last = seen if last is None else torch.cat([last.cpu(), seen], dim=2)
            # Only what the next round may go on from is held beside the result.
            longest = each.new if number + 1 == len(run.rounds) else run.rounds[number + 1].known
            last = last[:, :, -max(1, longest) :]
        partial.output = self._output(torch.cat(done, dim=2)[:, :, : run.frames], tokens_done, run)
        yield partial

    def _output(self, frames: Tensor, tokens: list[Tensor], run: Run) -> VideoPipelineOutput:
        shown: Any = frames
        if run.output_type == "pil":
            shown = to_frames(frames)
        elif run.output_type == "np":
            shown = ((frames + 1) / 2).permute(0, 2, 3, 4, 1).numpy()
        return VideoPipelineOutput(
            frames=shown, frame_rate=run.frame_rate, tokens=tokens, seeds=run.seeds
        )

    def _collect(
        self,
        partials: Iterator[VideoPartial],
        callback: Callable[[VideoPartial], bool | None] | None,
    ) -> VideoPipelineOutput:
        for partial in partials:
            if callback is not None and callback(partial) is False:
                break
        return partial.output or partial.finish()


def to_frames(video: Tensor) -> list[list[Image.Image]]:
    """Clips ``[B, 3, T, H, W]`` in [-1, 1] -> PIL frames of each."""
    return [to_pil(clip.transpose(0, 1)) if clip.shape[1] else [] for clip in video]


def read_frames(source: Source | Video | Sequence[Image.Image]) -> Tensor:
    """A clip, a picture, a file of either or a list of pictures -> ``[3 or 4, T, H, W]`` in [-1, 1].

    Raises:
        InputError: none of these, or pictures of several sizes.
    """
    if isinstance(source, Video):
        return source.frames
    if isinstance(source, str | Path | bytes):
        if count_pictures(source) == 1:
            return to_tensor([load_image(source)]).transpose(0, 1)
        return load_video(source).frames
    pictures = [source] if isinstance(source, Image.Image) else list(source)
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise InputError("Frames to go on from are a file, a tensor, a Video or PIL pictures.")
    if len({picture.size for picture in pictures}) > 1:
        raise InputError("The frames to go on from have several sizes: make them one.")
    return to_tensor(pictures).transpose(0, 1)


def item_seeds(seed: int | None, count: int) -> list[int]:
    """The seed of each clip: ``seed``, ``seed + 1``, ... (wrapping at 2**32)."""
    seed = random_seed() if seed is None else check_seed(seed)
    return [generator.initial_seed() for generator in seed_generators(seed, count)]


def duration(seconds: float) -> str:
    """ "40 seconds", "12 minutes", "3.5 hours"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def find_video_model(name: str | Path) -> ModelInfo | None:
    """The registered model of that name or hub id that makes video.

    Raises:
        InputError: a plain name of nothing, or a model of something else.
    """
    info, folder = find_model(str(name), "-to-video"), Path(name)
    if folder.is_dir() and (info is None or not info.shipped):
        return None
    if info is None and "/" in str(name):
        return None
    if info is None:
        known = ", ".join(each for task in VIDEO_TASKS for each in list_models(task=task))
        raise InputError(
            f'There is no video model "{name}" here: give a folder, a hub id ("owner/name"), or one '
            f"of {known}."
        )
    if info.task not in VIDEO_TASKS:
        raise InputError(f'"{info.name}" is a {info.task} model and makes no video.')
    return info


def condition_of(name: str | Path) -> str:
    """What a model draws from, "text", "class" or "frames", without loading it.

    Raises:
        InputError: nothing of that name that makes video.
    """
    info, folder = find_video_model(name), Path(name)
    if info is not None and not info.shipped:
        return {"frame-prediction": "frames"}.get(info.task, info.task.removesuffix("-to-video"))
    kinds = {
        "TextToVideoPipeline": "text",
        "ClassToVideoPipeline": "class",
        "ImageToVideoPipeline": "frames",
    }
    found = loading.pipeline_class(name)
    if found is None and folder.is_dir():
        try:
            config = json.loads((folder / "config.json").read_text("utf8"))
        except (OSError, ValueError):
            config = {}
        if config.get("frame_prediction") or config.get("text_length", 1) == 0:
            return "frames"
        ids = config.get("_class_name") == "NBP" and config.get("text_dim") is None
        if ids or config.get("_class_name") == "LARPGenerator":
            return "class"
        if config.get("_class_name") in video_generator_classes():
            return "text"
    if found is None and info is None and not folder.is_dir():
        try:
            found = DiffusionPipeline.load_config(resolve_model(name))["_class_name"]
        except InputError:
            raise
        except Exception as error:  # No network, no such repository, or another kind of it.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f'"{name}" could not be loaded from the hub: {reason}') from error
    if found not in kinds:
        raise InputError(f'"{name}" holds no model that makes video.')
    return kinds[found]
