"""Work in the background: one worker, first in first out, every job with its owner.

A job belongs to an owner key, not to a connection: a page that was reloaded asks for the jobs of
its owner again. Stopping sets an event that the work looks at after every token.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modalities.errors import InputError
from ..modalities.image import save_image
from .faults import explain

if TYPE_CHECKING:
    from PIL import Image

    from .studio import Studio

KEEP_SECONDS = 3600


class Job(ABC):
    """One piece of work.

    Attributes:
        kind: which screen shows it.
        state: "queued", "running", "done", "stopped" or "failed".
        error: one sentence, where it failed.
        cancel: set when it is to stop.
        seconds: how long it ran.
    """

    kind: str

    def __init__(self, owner: str):
        self.id = secrets.token_hex(8)
        self.owner = owner
        self.state = "queued"
        self.error = ""
        self.cancel = threading.Event()
        self.started = self.finished = 0.0
        self.touch: Callable[[], None] = lambda: None

    @abstractmethod
    def run(self) -> None:
        """Do the work, call `touch` when there is something to see, return soon after `cancel`."""

    def afterwards(self) -> Iterator[None]:
        """Further steps for when nobody waits for the worker; a queued job goes before each."""
        return iter(())

    def expected_seconds(self) -> float:
        """How long the rest will take; 0 if unknown."""
        return 0.0

    @abstractmethod
    def dispose(self) -> None:
        """Remove files that nobody can see any more."""

    @abstractmethod
    def view(self) -> dict[str, Any]:
        """What the page shows: plain JSON values."""

    @property
    def pending(self) -> bool:
        return self.state in ("queued", "running")

    @property
    def seconds(self) -> float:
        return (self.finished or time.monotonic()) - self.started if self.started else 0.0


class StudioJob(Job):
    """A job that shows files of its own, and may save others in the outputs folder."""

    def __init__(self, studio: Studio, owner: str):
        super().__init__(owner)
        self.studio = studio

    @property
    def scratch(self) -> Path:
        """A folder that goes with the job."""
        folder = self.studio.scratch / self.id
        folder.mkdir(exist_ok=True)
        return folder

    def show(self, image: Image.Image) -> str:
        """Write a picture where only the page finds it; returns its path."""
        path = self.scratch / f"{time.monotonic_ns()}.webp"
        save_image(image, path)
        return str(path)

    def saved(self) -> list[str]:
        """Names of its files in the outputs folder."""
        return []

    def dispose(self) -> None:
        shutil.rmtree(self.studio.scratch / self.id, ignore_errors=True)
        if self.studio.shared:
            folder = self.studio.outputs(self.owner).folder
            for name in self.saved():
                (folder / name).unlink(missing_ok=True)

    def view(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "state": self.state,
            "stopping": self.pending and self.cancel.is_set(),
            "note": self.studio.queue_note(self) if self.state == "queued" else "",
            "error": self.error,
            "took": 0 if self.pending else round(self.seconds, 1),
        }


class JobQueue:
    """Jobs of all owners and the thread that does them.

    Args:
        max_waiting: queued jobs altogether.
        max_per_owner: queued jobs of one owner.
        keep_seconds: how long a finished job can be seen.
    """

    def __init__(
        self, max_waiting: int = 16, max_per_owner: int = 8, keep_seconds: float = KEEP_SECONDS
    ):
        self.max_waiting, self.max_per_owner = max_waiting, max_per_owner
        self.keep_seconds = keep_seconds
        self.version = 0
        self._jobs: list[Job] = []
        self._afterwards: deque[tuple[Job, Iterator[None]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tessera-jobs", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Append all the jobs or none.

        Raises:
            InputError: too many are waiting.
        """
        with self._changed:
            self._expire()
            waiting = [job for job in self._jobs if job.state == "queued"]
            own = [job for job in waiting if job.owner == jobs[0].owner]
            if len(own) + len(jobs) > self.max_per_owner:
                raise InputError(
                    f"{len(own) + len(jobs)} of your jobs would be waiting, the limit is "
                    f"{self.max_per_owner}: wait for one to finish, or stop one."
                )
            if len(waiting) + len(jobs) > self.max_waiting:
                raise InputError(
                    f"{len(waiting)} jobs are waiting already, the limit is {self.max_waiting}: "
                    "try again in a minute."
                )
            for job in jobs:
                job.touch = self.touch
            self._jobs += jobs
            self.touch()

    def touch(self) -> None:
        """Say that something changed."""
        with self._changed:
            self.version += 1
            self._changed.notify_all()

    def of(self, owner: str, kind: str | None = None) -> list[Job]:
        """An owner's jobs, oldest first."""
        with self._changed:
            self._expire()
            return [j for j in self._jobs if j.owner == owner and kind in (None, j.kind)]

    def find(self, owner: str, job_id: str) -> Job | None:
        """The owner's job of that id; other people's jobs are not found."""
        return next((job for job in self.of(owner) if job.id == job_id), None)

    def stop(self, job: Job) -> None:
        """Ask a job to end soon; one that waits will not start."""
        with self._changed:
            job.cancel.set()
            if job.state == "queued":
                job.state, job.finished = "stopped", time.monotonic()
            self.touch()

    def active(self, owner: str, kind: str | None = None) -> bool:
        """Whether something of the owner's is still to come."""
        with self._changed:
            later = any(j.owner == owner and kind in (None, j.kind) for j, _ in self._afterwards)
        return later or any(job.pending for job in self.of(owner, kind))

    def ahead(self, job: Job) -> list[Job]:
        """Pending jobs before this one."""
        with self._changed:
            before = self._jobs[: self._jobs.index(job)] if job in self._jobs else []
            return [other for other in before if other.pending]

    def close(self) -> None:
        """Stop everything and wait for the worker."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.cancel.set()
            self._changed.notify_all()
        self._thread.join(timeout=10)

    def _expire(self) -> None:
        oldest = time.monotonic() - self.keep_seconds
        for job in self._jobs:
            if not job.pending and job.finished <= oldest:
                job.dispose()
        self._jobs = [job for job in self._jobs if job.pending or job.finished > oldest]

    def _next(self) -> Job | None:
        return next((job for job in self._jobs if job.state == "queued"), None)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._next() is None and not self._afterwards:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._next()
                if job is not None:
                    job.state, job.started = "running", time.monotonic()
            if job is None:
                self._step_afterwards()
            else:
                self._do(job)

    def _do(self, job: Job) -> None:
        self.touch()
        try:
            job.run()
            state = "stopped" if job.cancel.is_set() else "done"
        except Exception as error:  # The worker outlives whatever one job does.
            job.error, state = explain(error), "failed"
        with self._changed:
            # In one step, so that a page that watches sees the end and the rest together.
            self._afterwards.append((job, job.afterwards()))
            job.state, job.finished = state, time.monotonic()
            self.touch()

    def _step_afterwards(self) -> None:
        _, steps = self._afterwards[0]
        try:
            next(steps)
        except StopIteration:
            self._afterwards.popleft()
        except Exception as error:
            explain(error)
            self._afterwards.popleft()
        self.touch()
