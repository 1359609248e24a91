"""What trials do to a run when something in it has happened; all of it travels to the ranks by pickle."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.trial import Event, Rank


@dataclass
class KillAt:
    """SIGKILL at the ``nth`` event of a kind; of any kind when ``point`` is null.

    Attributes:
        hit: whether it came to that, in this process.
    """

    rank: int
    point: str | None
    nth: int
    saving_only: bool = False
    seen: int = 0

    def __call__(self, event: Event, rank: Rank) -> None:
        if event.rank == self.rank and self.point in (None, event.point) and (event.saves or not self.saving_only):
            if self.seen == self.nth:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen += 1


@dataclass
class TellAt:
    """Tell the test that event ``number`` has come, and go on ``after_s`` later."""

    rank: int
    number: int
    after_s: float

    def __call__(self, event: Event, rank: Rank) -> None:
        if event.rank == self.rank and event.number == self.number:
            rank.tell(event)
            time.sleep(self.after_s)


@dataclass
class RaiseAt:
    """Let the ``nth`` event of a kind fail with an ``OSError``."""

    rank: int
    point: str
    nth: int
    errno: int
    seen: int = 0

    def __call__(self, event: Event, rank: Rank) -> None:
        if event.rank == self.rank and event.point == self.point:
            self.seen += 1
            if self.seen - 1 == self.nth:
                raise OSError(self.errno, os.strerror(self.errno), event.path)


@dataclass
class RemoveAt:
    """Remove a folder below the run's after a step."""

    step: int
    below: str

    def __call__(self, event: Event, rank: Rank) -> None:
        if event.rank == 0 and event.operation == "step" and event.step == self.step:
            shutil.rmtree(rank.root / self.below)


@dataclass
class Slowly:
    """Let every change of a checkpoint take its time, while the weights go on changing; then ``act``.

    A write in the background begins only when a step has been taken since it was staged.
    """

    seconds: float
    act: KillAt | None = None

    def __call__(self, event: Event, rank: Rank) -> None:
        if event.saves:
            in_background = threading.current_thread() is not threading.main_thread()
            deadline = time.monotonic() + 2.0
            while (
                in_background and rank.step == event.step and event.operation == "open" and time.monotonic() < deadline
            ):
                time.sleep(0.001)
            time.sleep(self.seconds)
        if self.act is not None:
            self.act(event, rank)


@dataclass
class Journal:
    """Keep every change with the content that files had then, for `tests.faults.power`; told at the end of the run."""

    entries: list[tuple[str, str, bytes]] = field(default_factory=list)

    def __call__(self, event: Event, rank: Rank) -> None:
        if not event.path:
            return
        path = rank.root / event.path
        content = path.read_bytes() if event.operation in ("write", "fsync", "close") else b""
        self.entries.append((event.operation, event.path, content))
        rank.tell(self.entries[-1])


@dataclass
class HoldAt:
    """Tell the test that the run begins (step 0) or has done a step, and go on when there is a file."""

    steps: tuple[int, ...]
    until: Path

    def __call__(self, event: Event, rank: Rank) -> None:
        begins = event.operation == "start" and 0 in self.steps
        if begins or (event.operation == "step" and event.step in self.steps):
            rank.tell(event)
            deadline = time.monotonic() + 60
            while not self.until.exists() and time.monotonic() < deadline:
                time.sleep(0.005)


@dataclass(frozen=True)
class Measure:
    """Tell memory in bytes, open files, threads and children of the rank after every so many steps."""

    every: int

    def __call__(self, event: Event, rank: Rank) -> None:
        if event.operation == "step" and event.step % self.every == 0:
            process = psutil.Process()
            gc.collect()
            rank.tell(
                (
                    event.step,
                    process.memory_info().rss,
                    process.num_fds(),
                    process.num_threads(),
                    len(process.children()),
                )
            )
