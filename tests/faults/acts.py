"""What trials do to a run when something in it has happened; all of it travels to the ranks by pickle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import ftlab.run
from ftlab.losses import Loss
from ftlab.training import loop
from tests.faults.trial import Event, Rank, digests


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


@dataclass(frozen=True)
class Spoil:
    """Bad numbers in some steps of a run, and a note of which steps change the state. Given to ``Plan.before``.

    Attributes:
        kind: ``loss`` of every micro-batch or of the last (``batch``); one element of a ``gradient`` or, from then on,
            of a ``parameter`` (``memory``: after the step).
        value: that it becomes; ``garbled``: the loss is of targets that are noise.
        ranks: on which this happens; null: all.
    """

    kind: str
    value: float | str
    steps: frozenset[int]
    ranks: tuple[int, ...] | None = None

    def __call__(self, rank: Rank) -> None:
        fit = ftlab.run.fit
        notes = (rank.plan.notes / f"updates-{rank.worker.rank}").open("a", buffering=1)

        def spoiled_fit(run: loop.Run) -> Any:
            progress = run.state.progress
            mine = self.ranks is None or run.parallel.rank in self.ranks

            def now() -> bool:
                return mine and progress.step + 1 in self.steps

            if self.kind in ("loss", "batch"):
                last = run.trainer.accumulation_steps(run.parallel.dp_size) if self.kind == "batch" else 1
                run.loss = _SpoiledLoss(run.loss, now, self.value, every=last)
            elif self.kind == "gradient":
                self._spoil_gradients(run.state.model, now)
            update = run.state.guard.update

            def watched_update(*arguments: Any) -> None:
                before = self._digest(run)
                update(*arguments)
                notes.write(json.dumps([progress.step + 1, before, self._digest(run)]) + "\n")

            run.state.guard.update = watched_update  # type: ignore[method-assign]
            train_step = loop.train_step

            def step(run: loop.Run, micro_batches: list[Any]) -> Any:
                if self.kind == "parameter" and now():
                    self._spoil_a_parameter(run.state.model)
                metrics = train_step(run, micro_batches)
                if self.kind == "memory" and now():
                    self._spoil_a_parameter(run.state.model)
                return metrics

            loop.train_step = step
            return fit(run)

        ftlab.run.fit = spoiled_fit

    def _spoil_a_parameter(self, model: torch.nn.Module) -> None:
        parameter = next(model.parameters()).detach()
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.view(-1)[0] = float(self.value)

    def _spoil_gradients(self, model: torch.nn.Module, now: Callable[[], bool]) -> None:
        def spoil(gradient: Tensor) -> Tensor:
            if now():
                gradient = gradient.clone()
                gradient.view(-1)[0] = float(self.value)
            return gradient

        def hook(module: Any, arguments: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(spoil)

        next(iter(model.get_submodule("blocks").children())).register_forward_hook(hook)

    @staticmethod
    def _digest(run: loop.Run) -> list[str]:
        found = digests(run, whole=False)
        return [found["weights"], found["optimizer"]]


class _SpoiledLoss:
    """In training only: evaluation has a loss of its own."""

    def __init__(self, loss: Loss, now: Callable[[], bool], value: float | str, every: int):
        self.loss, self.now, self.value, self.every = loss, now, value, every
        self.calls = 0

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if not self.now() or self.calls % self.every:
            return self.loss(hidden, head_weight, targets)
        if self.value == "garbled":
            noise = torch.randint_like(targets, len(head_weight))
            return self.loss(hidden, head_weight, torch.where(targets >= 0, noise, targets))
        return self.loss(hidden, head_weight, targets) * float(self.value)
