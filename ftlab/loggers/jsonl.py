"""metrics.jsonl and samples.jsonl: the run's own record, which plots and reports are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ftlab.loggers.base import RunInfo
from ftlab.outputs.files import append_jsonl, to_json
from ftlab.outputs.folder import Status


class JsonlLogger:
    """One object a line, written through to the operating system line by line.

    A killed process loses nothing that was logged; only a power loss can (an fsync per line would stall the
    loop). NaN and infinity are not JSON: they are written as null and spelled out under ``non_finite``.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._metrics: TextIO | None = None

    def start(self, info: RunInfo) -> None:
        self._folder = info.folder
        self._metrics = (info.folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        assert self._metrics is not None, "log() before start()"
        line: dict[str, Any] = {"step": step, **metrics}
        if non_finite := {key: str(value) for key, value in metrics.items() if not math.isfinite(value)}:
            line["non_finite"] = non_finite
        self._metrics.write(to_json(line) + "\n")

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        append_jsonl(self._folder / "samples.jsonl", ({"step": step, **sample} for sample in samples))

    def finish(self, status: Status, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:  # noqa: ARG002
        if self._metrics is not None:
            self._metrics.close()
