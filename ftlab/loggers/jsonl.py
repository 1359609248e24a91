"""metrics.jsonl and samples.jsonl: the run's own record, which plots and reports are made from."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlab.loggers.base import RunInfo
from ftlab.outputs.files import to_json
from ftlab.outputs.folder import Status
from ftlab.storage.disk import LineFile

log = logging.getLogger(__name__)


class JsonlLogger:
    """One object a line, written through to the operating system line by line.

    A killed process loses nothing that was logged; a power loss what came after the last checkpoint, which begins
    with `sync` (an fsync per line would stall the loop). What a full disk does not take is written once it does. NaN
    and infinity are not JSON: they are written as null and spelled out under ``non_finite``.
    """

    def __init__(self) -> None:
        self._files: dict[str, LineFile] = {}
        self._told = False

    def start(self, info: RunInfo) -> None:
        self._files = {name: LineFile(info.folder / f"{name}.jsonl") for name in ("metrics", "samples")}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        line: dict[str, Any] = {"step": step, **metrics}
        if non_finite := {key: str(value) for key, value in metrics.items() if not math.isfinite(value)}:
            line["non_finite"] = non_finite
        self._append("metrics", [line])

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        self._append("samples", [{"step": step, **sample} for sample in samples])

    def sync(self) -> None:
        """Make sure of all that was logged: a checkpoint counts on it.

        Raises:
            OSError: the disk does not take it.
        """
        for file in self._files.values():
            file.sync()

    def finish(self, status: Status, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:  # noqa: ARG002
        for file in self._files.values():
            file.close()

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        assert self._files, "log() before start()"
        file = self._files[name]
        file.add(to_json(row) for row in rows)
        try:
            file.write()
            self._told = False
        except OSError as error:
            if not self._told:
                log.warning("%s cannot be written: %s; its lines are kept until it can", file.path.name, error.strerror)
            self._told = True
