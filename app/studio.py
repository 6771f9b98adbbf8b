"""What all screens share: the model, its measured speed, the jobs and the folders."""

from __future__ import annotations

import json
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..modalities.errors import InputError
from ..modalities.text import MAX_PROMPT_CHARACTERS
from ..weights.registry import find_model, list_models, model_info, resolve_model
from .faults import explain
from .jobs import JobQueue
from .outputs import Outputs
from .sound_models import SoundModels
from .video_models import VideoModels

if TYPE_CHECKING:
    from ..pipelines.image_generation import ImageGenerationPipeline
    from ..tokenizers.base import Tokenizer

# What an empty prompt box runs; the first one is drawn once while the model warms up.
EXAMPLES = (
    "a red heart with an arrow",
    "a sleepy fox",
    "a slice of pizza",
    "a rocket in space",
    "a blue flower",
)


@dataclass
class Speed:
    """Seconds, measured in the last runs of this model.

    Attributes:
        token: to draw one token of one picture, shares of a batch included.
        decode: to turn the tokens of one picture into pixels.
        preview: the same with few steps.
    """

    token: float = 0.0
    decode: float = 0.0
    preview: float = 0.0

    def picture(self, tokens: int) -> float:
        return tokens * self.token + self.decode


@dataclass
class Card:
    """What the page must know of a model, of the first one before its weights are loaded.

    Attributes:
        num_tokens, default_num_tokens: the longest sequence and the usual one.
        temperature, num_steps: None where it takes none.
        takes_tokens: whether one can ask for fewer.
        num_classes, class_names: of a model that draws classes.
    """

    styles: list[str]
    num_tokens: int
    default_num_tokens: int
    guidance_scale: float
    temperature: float | None
    num_steps: int | None = None
    takes_tokens: bool = True
    num_classes: int = 0
    class_names: list[str] = field(default_factory=list)

    @property
    def example(self) -> str:
        """What an empty box runs."""
        if not self.num_classes:
            return EXAMPLES[0]
        return self.class_names[len(self.class_names) // 5] if self.class_names else "0"


class Studio:
    """The state behind the page.

    Args:
        model: a shipped name, a folder or a hub id.
        outputs: where pictures are kept.
        metadata: whether they carry how they were made.
        shared: strangers use the same server (a Space): everyone sees only what is their own, and
            nothing outlives the server.
        sounds, videos: the models of sound and of video; default: those that are there.

    Raises:
        InputError: no model of that name.
    """

    def __init__(
        self,
        model: str = "sticker",
        outputs: Path = Path("outputs"),
        metadata: bool = True,
        shared: bool = False,
        sounds: SoundModels | None = None,
        videos: VideoModels | None = None,
    ):
        self.model, self.shared, self.metadata = model, shared, metadata
        self.sounds, self.videos = sounds or SoundModels(), videos or VideoModels()
        self.boot = secrets.token_hex(4)  # Tells a page that it talks to a new server.
        self.source = resolve_model(model)
        self._scratch = tempfile.TemporaryDirectory(prefix="tessera-", ignore_cleanup_errors=True)
        self.scratch = Path(self._scratch.name)
        self.folder = self.scratch / "outputs" if shared else outputs.absolute()
        self.log_folder = self.scratch if shared else self.folder
        self.jobs = JobQueue()
        self.speed = Speed()
        self.pipeline: ImageGenerationPipeline | None = None
        self.failure = ""
        self.example = ""  # File with a picture of `EXAMPLES[0]`.
        self._loaded = threading.Event()
        self._tokenizers: dict[str, Tokenizer] = {}
        self._others: dict[str, ImageGenerationPipeline] = {}
        self._loading = threading.Lock()
        self._speeds: dict[str, Speed] = {}

    def start(self) -> None:
        """Load the model in a thread, if it is not there yet."""
        if self.loading:
            threading.Thread(target=self._load, name="tessera-model", daemon=True).start()

    def image_models(self) -> list[str]:
        """Models that make pictures without a download, the app's own first."""
        names = [self.name]
        for name in list_models():
            info = model_info(name)
            parts = [info] if info.tokenizer is None else [info, model_info(info.tokenizer)]
            if (
                info.task.endswith("-to-image")
                and name not in names
                and all(availability(part) != "needs download" for part in parts)
            ):
                names.append(name)
        return names

    def load(self, name: str | None) -> ImageGenerationPipeline:
        """One of `image_models`, as soon as it is there; None is the app's own. The last other one is
        kept beside it.

        Raises:
            InputError: another name, or it could not be loaded.
        """
        if name in (None, self.name):
            return self.wait()
        if name not in self.image_models():
            raise InputError(f'"{name[:80]}" is not on this computer: see the Models tab.')
        with self._loading:
            if name not in self._others:
                from .commands_shared import load_pipeline

                self._others.clear()
                self._others[name] = load_pipeline(name)
            return self._others[name]

    def speed_of(self, name: str | None) -> Speed:
        if name in (None, self.name):
            return self.speed
        return self._speeds.setdefault(name, Speed())

    def card_of(self, name: str | None) -> Card:
        """Of one of `image_models`; any but the app's own is loaded for it."""
        return self.card() if name in (None, self.name) else make_card(self.load(name))

    def wait(self) -> ImageGenerationPipeline:
        """The pipeline, as soon as it is there.

        Raises:
            InputError: it could not be loaded.
        """
        self._loaded.wait()
        if self.pipeline is None:
            raise InputError(self.failure)
        return self.pipeline

    @cached_property
    def sha256(self) -> str | None:
        """Of the model's weights, for the records."""
        from .commands_image import weights_sha256

        return weights_sha256(self.model)

    @property
    def loading(self) -> bool:
        return not self._loaded.is_set()

    @property
    def name(self) -> str:
        """What people call the model."""
        return Path(self.model).name

    def outputs(self, owner: str) -> Outputs:
        """Where the owner's pictures are: one folder for all, or one each on a shared server."""
        return Outputs(self.folder / owner if self.shared else self.folder, self.metadata)

    def card(self) -> Card:
        """Read from the configuration of a model like the shipped one; any other is loaded for it."""
        try:
            folder = Path(self.source)
            config = json.loads((folder / "model_index.json").read_text(encoding="utf8"))
            tokenizer = json.loads((folder / "tokenizer" / "config.json").read_text())
            num_tokens = tokenizer["num_registers"]
            if None in (
                config["default_num_tokens"],
                config["guidance_scale"],
                config["temperature"],
            ):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            if self.loading:
                self._load()
            return make_card(self.wait())
        return Card(
            styles=[style for style in config["styles"].split(",") if style],
            num_tokens=num_tokens,
            default_num_tokens=config["default_num_tokens"],
            guidance_scale=config["guidance_scale"],
            temperature=config["temperature"],
        )

    def headline(self) -> str:
        """Device, model and measured speed in one line."""
        if self.loading:
            info = find_model(self.model)
            size = f" ({info.size_mb:.0f} MB)" if info is not None and info.size_mb else ""
            return f"Loading {self.name}{size}…"
        if self.pipeline is None:
            return self.failure
        import torch

        device = self.pipeline.device
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        else:
            threads = torch.get_num_threads()
            where = f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"
        seconds = self.speed.picture(self.pipeline.default_num_tokens)
        if not seconds:
            return f"{self.name} · {where}"
        return f"{self.name} · {where} · about {duration(seconds)} a picture"

    def prompt_warning(self, prompt: str) -> str:
        """What of a prompt the model will not read, as a sentence; empty if all is read."""
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            return (
                f"Prompt has {len(prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are "
                "read, so shorten it."
            )
        if self.pipeline is None or self.pipeline.condition == "class" or not prompt.strip():
            return ""
        report = self.pipeline.prompt_report(prompt)
        if not report.cut:
            return ""
        cut = report.cut if len(report.cut) <= 80 else report.cut[:80] + "…"
        return (
            f"Prompt has {report.words} words; this model reads the first "
            f"{len(report.kept.split())}. Not read: “{cut}”"
        )

    def queue_note(self, job) -> str:
        """Where a waiting job stands."""
        ahead = self.jobs.ahead(job)
        if not ahead:
            return "starts now"
        seconds = sum(other.expected_seconds() for other in ahead)
        return f"{len(ahead)} before this" + (f", about {duration(seconds)}" if seconds else "")

    def tokenizer_names(self) -> list[str]:
        """Tokenizers that can be used without a download, the app's own model first."""
        names = [self.name]
        for name in list_models():
            info = model_info(name)
            usable = info.task == "image-tokenizer" or (
                info.shipped and info.task == "text-to-image"
            )
            if usable and name not in names and availability(info) != "needs download":
                names.append(name)
        return names

    def tokenizer(self, name: str) -> Tokenizer:
        """One of `tokenizer_names`; the last one used is kept beside the app's own.

        Raises:
            InputError: another name, or it could not be loaded.
        """
        if name == self.name:
            return self.wait().tokenizer
        if name not in self.tokenizer_names():
            raise InputError(f'"{name[:80]}" is not on this computer: see the Models tab.')
        if name not in self._tokenizers:
            from .commands_shared import load_tokenizer

            self._tokenizers.clear()
            self._tokenizers[name] = load_tokenizer(name)
        return self._tokenizers[name]

    def close(self) -> None:
        self.jobs.close()
        self._scratch.cleanup()

    def _load(self) -> None:
        try:
            from .commands_shared import load_pipeline

            pipeline = load_pipeline(self.model)
            self._warm_up(pipeline)
            self.pipeline = pipeline
        except Exception as error:  # Shown on the page; the thread has nobody else to tell.
            self.failure = explain(error)
        self._loaded.set()
        self.jobs.touch()

    def _warm_up(self, pipeline: ImageGenerationPipeline) -> None:
        """Draw one picture, so that the first real one is as fast as the others; measure it.

        The page shows it until there are others. Of a large model it would take too long.
        """
        if not quick(pipeline):
            return
        from ..modalities.image import save_image
        from ..pipelines.seeds import seed_generators

        start = time.perf_counter()
        for partial in pipeline.stream(
            make_card(pipeline).example, generator=seed_generators(0, 1), output_type="tokens"
        ):
            last = partial
        drawn = time.perf_counter()
        (image,) = last.decode(slice(None), None)
        decoded = time.perf_counter()
        last.preview()
        self.speed = Speed(
            token=(drawn - start) / pipeline.default_num_tokens,
            decode=decoded - drawn,
            preview=time.perf_counter() - decoded,
        )
        save_image(image, self.scratch / "example.webp")
        self.example = str(self.scratch / "example.webp")


def make_card(pipeline: ImageGenerationPipeline) -> Card:
    """The card of a loaded model."""
    settings = pipeline.settings
    classes = pipeline.condition == "class"
    return Card(
        styles=[] if classes else pipeline.styles,
        num_tokens=pipeline.num_tokens,
        default_num_tokens=settings.get("num_tokens", pipeline.num_tokens),
        guidance_scale=settings["guidance_scale"],
        temperature=settings.get("temperature"),
        num_steps=settings.get("num_steps"),
        takes_tokens="num_tokens" in settings,
        num_classes=pipeline.num_classes if classes else 0,
        class_names=pipeline.class_names if classes else [],
    )


def quick(pipeline: ImageGenerationPipeline) -> bool:
    """Whether a picture is a matter of seconds on this device."""
    weights = sum(p.numel() for p in pipeline.generator.parameters())
    return pipeline.device.type != "cpu" or weights < 100e6


def duration(seconds: float) -> str:
    """``0.42`` -> ``"0.4 s"``, ``75`` -> ``"1 min 15 s"``."""
    if seconds >= 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{max(seconds, 0.1):.1f} s"


def availability(info) -> str:
    """ "shipped", "on disk" (in the hub's cache) or "needs download"."""
    if info.shipped:
        return "shipped"
    from ..weights.loading import is_cached

    return "on disk" if is_cached(info) else "needs download"
