"""What is wrong with a run from its start: given to ``Plan.before``, and to the ranks by pickle."""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import ftlab.run
from ftlab.distributed.heartbeat import Watch
from ftlab.loggers import wandb as wandb_logger
from ftlab.losses import Loss
from ftlab.training import loop
from ftlab.training.run import Run
from ftlab.training.wishes import Wishes
from tests.faults.trial import Rank, digests


@dataclass(frozen=True)
class Spoil:
    """Bad numbers in some steps of a run, and a note of which steps change the state. Given to ``Plan.before``.

    Attributes:
        kind: ``loss`` of every micro-batch or of the last (``batch``); one element of a ``gradient`` or, from then on,
            of a ``parameter`` (``memory``: after the step).
        value: that it becomes, or the factor of a loss.
        ranks: on which this happens; null: all.
    """

    kind: str
    value: float
    steps: frozenset[int]
    ranks: tuple[int, ...] | None = None

    def __call__(self, rank: Rank) -> None:
        fit = ftlab.run.fit
        notes = (rank.plan.notes / f"updates-{rank.worker.rank}").open("a", buffering=1)

        def spoiled_fit(run: Run) -> Any:
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

            def step(run: Run, micro_batches: list[Any]) -> Any:
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
        local.view(-1)[0] = self.value

    def _spoil_gradients(self, model: torch.nn.Module, now: Callable[[], bool]) -> None:
        def spoil(gradient: Tensor) -> Tensor:
            if now():
                gradient = gradient.clone()
                gradient.view(-1)[0] = self.value
            return gradient

        def hook(module: Any, arguments: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(spoil)

        next(iter(model.get_submodule("blocks").children())).register_forward_hook(hook)

    @staticmethod
    def _digest(run: Run) -> list[str]:
        found = digests(run, whole=False)
        return [found["weights"], found["optimizer"]]


class _SpoiledLoss:
    """In training only: evaluation has a loss of its own."""

    def __init__(self, loss: Loss, now: Callable[[], bool], value: float, every: int):
        self.loss, self.now, self.value, self.every = loss, now, value, every
        self.calls = 0

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if not self.now() or self.calls % self.every:
            return self.loss(hidden, head_weight, targets)
        return self.loss(hidden, head_weight, targets) * self.value


@dataclass(frozen=True)
class DiskFails:
    """Let every change below the run's folder fail while some steps are done.

    Attributes:
        errno: ENOSPC lets files be opened; EROFS does not.
    """

    errno: int
    first: int
    last: int

    def __call__(self, rank: Rank) -> None:
        root = str(rank.root)

        def failing(name: str, of: Callable[[Any], str]) -> None:
            real = getattr(os, name)

            def change(target: Any, *arguments: Any, **options: Any) -> Any:
                if self.first <= rank.step <= self.last and of(target).startswith(root):
                    raise OSError(self.errno, os.strerror(self.errno), of(target))
                return real(target, *arguments, **options)

            setattr(os, name, change)

        def of_fd(fd: int) -> str:
            return os.readlink(f"/proc/self/fd/{fd}")

        for name in ("write", "fsync"):
            failing(name, of_fd)
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            failing(name, os.fspath)
        real_open = builtins.open

        def open_(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            path = os.fspath(file) if not isinstance(file, int) else ""
            fails = self.first <= rank.step <= self.last and str(path).startswith(root)
            if fails and set(mode) & set("wax+"):
                raise OSError(self.errno, os.strerror(self.errno), path)
            return real_open(file, mode, *arguments, **options)

        builtins.open = io.open = open_  # type: ignore[assignment]


@dataclass(frozen=True)
class WithWandb:
    """Show the run to a W&B server, and note the time that this takes of the training thread's.

    Attributes:
        hosts: a file to read names of hosts from in place of the machine's; null: the machine's.
    """

    url: str
    hosts: Path | None = None

    def __call__(self, rank: Rank) -> None:
        for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
            del os.environ[name]
        os.environ |= {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
        if self.hosts is not None:
            new_mounts = 0x00020000
            assert ctypes.CDLL(None, use_errno=True).unshare(new_mounts) == 0, "no right to"
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            subprocess.run(["mount", "--bind", str(self.hosts), "/etc/hosts"], check=True)
        wandb_logger._UPLOAD_TIMEOUT_S = 4.0
        wandb_logger._FINISH_TIMEOUT_S = 20.0
        seconds = 0.0
        fit, log = ftlab.run.fit, wandb_logger.WandbLogger.log

        def timed(*arguments: Any) -> None:
            nonlocal seconds
            began = time.perf_counter()
            log(*arguments)
            seconds += time.perf_counter() - began

        def timed_fit(run: Run) -> Any:
            try:
                return fit(run)
            finally:
                (rank.plan.notes / "seconds").write_text(json.dumps([seconds, run.state.progress.train_s]))

        wandb_logger.WandbLogger.log = timed  # type: ignore[method-assign]
        ftlab.run.fit = timed_fit


@dataclass(frozen=True)
class ToldBefore:
    """SIGTERM to one rank before it begins a phase, which it does once all ranks can know that it will not."""

    rank: int
    phase: str

    def __call__(self, rank: Rank) -> None:
        beat, told = Watch.beat, False

        def late(watch: Watch, step: int, phase: str) -> None:
            nonlocal told
            if phase == self.phase and not told:
                told = True
                os.kill(os.getpid(), signal.SIGTERM)
                while watch.board.failure() is None:
                    time.sleep(0.01)
            beat(watch, step, phase)

        if rank.worker.rank == self.rank:
            Watch.beat = late  # type: ignore[method-assign]


@dataclass(frozen=True)
class ToldBeforeTheLoopListens:
    """SIGTERM to one rank when signals are the loop's already, but its handlers are not there yet."""

    rank: int

    def __call__(self, rank: Rank) -> None:
        listening = Wishes.listening

        def told(wishes: Wishes) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return listening(wishes)

        if rank.worker.rank == self.rank:
            Wishes.listening = told  # type: ignore[method-assign]
