"""Log records to the run folder and the terminal, secrets masked."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

from ftlab.outputs.secrets import mask_secrets


class _MaskingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # The finished text, not the message: tracebacks carry secrets too.
        return mask_secrets(super().format(record))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Looks ``sys.stderr`` up anew for each line: a live progress bar replaces it, to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _LogFile(logging.FileHandler):
    """A full disk costs lines of the log, not a page on the terminal for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's own name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


_handlers: list[logging.Handler] = []


def setup_logging(folder: Path, rank: int) -> None:
    """Send the ``ftlab`` logger and the process's warnings to the run folder and to stderr, secrets masked.

    Rank 0 writes ``train.log`` and talks on the terminal from INFO up; rank i writes ``rank<i>.log`` and
    talks from WARNING up; where the folder is on another machine, it has no file. A second call (the next run in
    this process) takes the place of the first.
    """
    loggers = [logging.getLogger("ftlab"), logging.getLogger("py.warnings")]
    while _handlers:
        handler = _handlers.pop()
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
    if folder.is_dir():
        to_file = _LogFile(folder / ("train.log" if rank == 0 else f"rank{rank}.log"), encoding="utf-8")
        to_file.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _handlers.append(to_file)
    to_terminal = _StderrHandler(sys.stderr)
    to_terminal.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    to_terminal.setFormatter(_MaskingFormatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    _handlers.append(to_terminal)
    for logger in loggers:
        for handler in _handlers:
            logger.addHandler(handler)
    logging.getLogger("ftlab").setLevel(logging.INFO)
    logging.captureWarnings(False)  # else, where somebody put Python's own display back, True would do nothing
    logging.captureWarnings(True)
