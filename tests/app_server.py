"""The web app over the tiny pipeline, for tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from tessera.app.jobs import Job
from tessera.app.main import build, serve
from tessera.app.sound_models import SoundModels
from tessera.app.studio import Studio
from tessera.app.video_models import VideoModels
from tessera.tests.tiny import tiny_pipeline, tiny_sound, tiny_voice
from tessera.tests.tiny_video import tiny_block_pipeline, tiny_interpolation, tiny_masked_pipeline


@dataclass
class Server:
    """A running app.

    Attributes:
        hold_at: generation waits after this token until it is None or the job is stopped.
    """

    studio: Studio
    url: str = ""
    hold_at: int | None = None

    @property
    def pictures(self) -> list[Path]:
        return sorted(self.studio.folder.glob("????-??-??/*.png"))

    def running(self) -> list[Job]:
        return [job for job in self.studio.jobs._jobs if job.state == "running"]


def tiny_model(folder: Path) -> Path:
    """A saved tiny pipeline."""
    if not folder.exists():
        tiny_pipeline().save_pretrained(folder)
    return folder


def held(server: Server) -> None:
    """Let the pipeline stop at ``server.hold_at``."""
    pipeline = server.studio.wait()
    inner = pipeline.stream

    def stream(*arguments, **options):
        for partial in inner(*arguments, **options):
            yield partial
            while partial.step == server.hold_at and not any(
                job.cancel.is_set() for job in server.running()
            ):
                time.sleep(0.02)

    pipeline.stream = stream


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@contextmanager
def paused(server: Server, pipeline: Any, here: Callable[[int, Any], bool]) -> Iterator[Event]:
    """A pipeline's stream waits behind each piece (number, piece) that ``here`` picks, until the event
    is set or the job is stopped."""
    release, inner = Event(), pipeline.stream

    def stream(*arguments, **options):
        for number, piece in enumerate(inner(*arguments, **options)):
            yield piece
            while here(number, piece) and not release.is_set():
                if any(job.cancel.is_set() for job in server.running()):
                    break
                release.wait(0.05)

    pipeline.stream = stream
    try:
        yield release
    finally:
        release.set()
        del pipeline.stream


@contextmanager
def tiny_studio(folder: Path) -> Iterator[Server]:
    """A studio with the model loaded, without a page."""
    for name, make in (
        ("tiny-voice", tiny_voice),
        ("tiny-sound", tiny_sound),
        ("tiny-blocks", tiny_block_pipeline),
        ("tiny-masked", tiny_masked_pipeline),
        ("tiny-between", tiny_interpolation),
    ):
        if not (folder / name).exists():
            make().save_pretrained(folder / name)
    sounds = SoundModels(str(folder / "tiny-voice"), str(folder / "tiny-sound"))
    videos = VideoModels(
        [folder / "tiny-blocks", folder / "tiny-masked"], [folder / "tiny-between"]
    )
    studio = Studio(
        str(tiny_model(folder / "tiny")), folder / "outputs", sounds=sounds, videos=videos
    )
    studio.start()
    server = Server(studio)
    held(server)
    try:
        yield server
    finally:
        server.hold_at = None
        studio.close()


@contextmanager
def running_app(folder: Path) -> Iterator[Server]:
    """Serve the app on a free port; uploads up to 1 MB."""
    with tiny_studio(folder) as server:
        demo = build(server.studio)
        try:
            _, server.url, _ = serve(
                demo,
                server.studio,
                server_name="127.0.0.1",
                quiet=True,
                max_file_size="1mb",
            )
            yield server
        finally:
            server.hold_at = None
            demo.close()
