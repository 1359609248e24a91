"""One run's record: passes everything on to its loggers and closes the folder however the run ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ftlab.loggers.base import Logger, RunInfo
from ftlab.outputs.folder import RunFolder, Status

log = logging.getLogger(__name__)


class Recorder:
    """The loggers of one run as one, and its ``run.json``; on ranks other than 0 no loggers, and a silent folder."""

    def __init__(self, folder: RunFolder, loggers: Sequence[Logger]):
        self.folder = folder
        self.latest: dict[str, float] = {}  # the newest value of every metric
        self.artifacts: list[Path] = []
        self._loggers = loggers
        self._started = False

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar of the first logger that has one; ``advance(n)`` after n more items."""
        for logger in self._loggers:
            if hasattr(logger, "progress"):
                return logger.progress(label, total)
        return _silent()

    def start(self, info: RunInfo) -> None:
        """Open every logger; before this, nothing is passed on."""
        for logger in self._loggers:
            logger.start(info)
        self._started = True

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Pass on one step's metrics."""
        self.latest |= metrics
        for logger in self._loggers:
            logger.log(metrics, step)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Pass on answers generated after ``step``."""
        for logger in self._loggers:
            logger.log_samples(samples, step)

    def sync(self) -> None:
        """Make sure of what was logged so far, before a checkpoint counts on it.

        Raises:
            OSError: the disk does not take it.
        """
        for logger in self._loggers:
            if hasattr(logger, "sync"):
                logger.sync()

    def finish(self, status: Status, error: BaseException | None, *, hurry: bool = False, **fields: Any) -> None:
        """Close ``run.json``, draw the plots and close the loggers; called once, whatever happened before.

        In this order, because a rank that lost another may not have the time for all of it; in a ``hurry`` there
        are no plots.
        """
        self.folder.finish(status, error=error, metrics=self.latest, **fields)
        if self._started and self._loggers:
            if not hurry:
                from ftlab.plots import draw_plots  # with matplotlib: a sixth of what a start would load

                self.artifacts += draw_plots(self.folder.path)
            for logger in self._loggers:
                logger.finish(status, self.latest, self.artifacts)


@contextmanager
def _silent() -> Iterator[Callable[[int], None]]:
    yield lambda _: None
