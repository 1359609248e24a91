"""What a logger is told, and when. The loop talks to this and to nothing below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ftlab.outputs.folder import Status


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known when training starts."""

    folder: Path
    run_id: str  # the run's for ever, however often it goes on
    first_step: int  # optimizer steps done before; 0 for a new run
    logged_until: int  # the last step that loggers of earlier sessions were told of
    name: str
    config: dict[str, Any]  # resolved, secrets already masked
    seed: int
    total_steps: int  # optimizer steps
    global_batch_size: int  # sequences per optimizer step
    model: str  # name for people, e.g. llama_tiny
    n_params: int
    weights: str | None  # where they come from; None: random
    dataset: str
    n_train_samples: int | None
    n_val_samples: int
    device: str  # e.g. "cpu", "NVIDIA H200 × 4"
    precision: str
    next_commands: tuple[str, ...]  # what to type once the run is completed


class Logger(Protocol):
    """A sink for one run; lives on rank 0 only. Calls come in the order start, log*, finish.

    Metric keys are ``train/…``, ``val/…``, ``perf/…``, ``memory/…``, and ``epoch`` and ``tokens``; values are
    host numbers. A step may be logged twice, once with its training and once with its validation metrics.
    """

    def start(self, info: RunInfo) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Generations: ``sample_id, prompt, generated, reference``, and ``family, correct`` or None."""

    def finish(self, status: Status, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """End of the run, whatever the reason.

        Args:
            status: how it ended; never ``running``.
            summary: final metrics under the keys that ``log`` uses.
            artifacts: files worth showing: plots, data report, the exported folder.
        """
