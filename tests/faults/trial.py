"""What one rank of a trial does: a real run through ``ftlab.run``, watched, and stopped where a plan says.

Imported by the process that all trials are forked from, so everything slow is imported here once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 -- imported late by ftlab, and slow
import numpy as np
import torch
import torch._dynamo
import torch.distributed._composable
import torch.distributed.fsdp
from torch import Tensor
from torch.distributed.tensor import DTensor

import ftlab.assembly.experiment
import ftlab.assembly.run
import ftlab.data.tiny
import ftlab.distributed.ddp
import ftlab.distributed.fsdp
import ftlab.outputs.folder
import ftlab.plots
import ftlab.run
from ftlab.distributed.env import WorkerEnv
from ftlab.losses import Loss
from ftlab.storage import disk
from ftlab.training import loop
from ftlab.training.run import Run


@dataclass(frozen=True)
class Event:
    """Something that just happened in a rank: a change on disk, or ``start``, ``step``, ``eval``.

    Attributes:
        number: counts the rank's events from 0.
        path: of what was changed, below the run's folder; else empty.
    """

    number: int
    rank: int
    operation: str
    path: str
    step: int

    @property
    def saves(self) -> bool:
        """Whether this was part of writing or removing a checkpoint."""
        return "checkpoints" in self.path

    @property
    def point(self) -> str:
        """Its name whatever the step: the operation and the file."""
        name = Path(self.path).name
        if name.startswith("step_"):
            name = "step_N" + Path(name).suffix
        elif self.path.endswith(".tmp"):
            name = self.path
        return f"{self.operation} {name}" if self.path else self.operation


Act = Callable[["Event", "Rank"], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a trial runs.

    Attributes:
        config: resolved; ``paths.output_dir`` is the run's folder.
        notes: a folder in which each rank writes down what it saw.
        act: called after every event, in the thread that it happened in.
        noise: whether the loss draws from every global random generator, so that their states matter.
        whole: digest whole tensors, so that any number of ranks can be compared.
        before: called in the rank before anything else, to break something.
        foretells: whether memory is foretold first, which takes most of a trial's seconds.
    """

    config: dict[str, Any]
    notes: Path
    act: Act | None = None
    noise: bool = True
    whole: bool = False
    before: Callable[[Rank], None] | None = None
    attempt: int = 0
    foretells: bool = False


@dataclass
class Outcome:
    """What a rank says when it has ended by itself.

    Attributes:
        began, ended: digests of the state, part by part, before the first step and after the last.
        step: steps done.
    """

    exit_code: int = -1
    began: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    step: int = -1


class Rank:
    """One rank of a trial."""

    def __init__(self, plan: Plan, worker: WorkerEnv, tell: Callable[[Any], None]):
        self.plan, self.worker, self.tell = plan, worker, tell
        self.root = Path(plan.config["paths"]["output_dir"])
        self.outcome = Outcome()
        self.step = 0
        self._number = 0
        self._flushed: set[str] = set()
        self._lock = threading.Lock()
        self._events = (plan.notes / f"events-{worker.rank}").open("a", buffering=1)
        self._samples = (plan.notes / f"samples-{worker.rank}").open("a", buffering=1)

    def note(self, operation: str, path: Path | None = None) -> None:
        """Write down an event and act on it."""
        if operation in ("fsync", "fsync_folder"):
            # Told is not done: what counts is the system call.
            assert os.path.realpath(path or "") in self._flushed, f"{operation} {path} was told, but not done"
            self._flushed.discard(os.path.realpath(path or ""))
        below = "" if path is None else os.path.relpath(path, self.root)
        if below.startswith("..") and set(Path(below).parts) != {".."}:
            return  # the cache of tokenised rows, which is there or not; folders above the run's are its own affair
        with self._lock:
            event = Event(self._number, self.worker.rank, operation, below, self.step)
            self._number += 1
        self._events.write(json.dumps(asdict(event)) + "\n")
        if self.plan.act is not None:
            self.plan.act(event, self)

    def run(self) -> Outcome:
        """Train as the plan says, from the configuration to the exit code."""
        self._watch()
        for seed in (random.seed, np.random.seed, lambda _: torch.seed()):
            seed(None)  # whatever is found here must not matter
        if self.plan.before is not None:
            self.plan.before(self)
        self.note("start")
        if self.worker.world_size == 1:
            self.outcome.exit_code = ftlab.run.train(self.plan.config, self.worker)
        else:
            self.outcome.exit_code = ftlab.run.train_in_team(self.plan.config, self.worker, None)
        logging.shutdown()
        return self.outcome

    def _watch(self) -> None:
        fit, train_step, evaluate = ftlab.run.fit, loop.train_step, loop.evaluate_if_due

        def watched_fit(run: Run) -> Any:
            self.step = run.state.progress.step
            if self.plan.noise:
                run.loss = _Noisy(run.loss, 1 + self.worker.rank)
            self.outcome.began = digests(run, whole=self.plan.whole)
            try:
                return fit(run)
            finally:
                self.outcome.step = run.state.progress.step
                while not self.outcome.ended:
                    with suppress(KeyboardInterrupt):  # another rank has failed, and this one is told to go
                        self.outcome.ended = digests(run, whole=self.plan.whole)

        def watched_step(run: Run, micro_batches: list[Any]) -> Any:
            metrics = train_step(run, micro_batches)
            self.step = run.state.progress.step + 1
            ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
            self._samples.write(json.dumps([self.step, ids]) + "\n")
            self.note("step")
            return metrics

        def watched_evaluation(run: Run) -> Any:
            self.note("eval")
            return evaluate(run)

        fsync = os.fsync

        def watched_fsync(fd: int) -> None:
            fsync(fd)
            self._flushed.add(os.readlink(f"/proc/self/fd/{fd}"))

        os.fsync = watched_fsync
        _put(ftlab.run, "fit", watched_fit)
        _put(loop, "train_step", watched_step)
        _put(loop, "evaluate_if_due", watched_evaluation)
        _put(disk, "observer", self.note)
        # Slow, and nothing that a kill could harm.
        _put(ftlab.plots, "draw_plots", lambda folder: [])
        _put(ftlab.outputs.folder, "code_state", lambda: {"commit": None, "dirty": None})
        _put(ftlab.assembly.run, "peak_flops", lambda *_: 1e12)
        if not self.plan.foretells:
            _put(ftlab.assembly.experiment, "foretell_memory", lambda *_: None)


def _put(module: Any, name: str, value: Any) -> None:
    assert hasattr(module, name), f"{module.__name__} has no {name} any more"
    setattr(module, name, value)


class _Noisy:
    """A loss that depends on the state of every global random generator, on each rank in its own way."""

    def __init__(self, loss: Loss, n_draws: int):
        self.loss, self.n_draws = loss, n_draws

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        noise = sum(torch.rand(()).item() + random.random() + float(np.random.rand()) for _ in range(self.n_draws))
        return self.loss(hidden, head_weight, targets) * (1 + 0.01 * noise)


def digests(run: Run, *, whole: bool) -> dict[str, str]:
    """sha256 of each part of the state, taken from the live objects and not by the code under test.

    Args:
        whole: gather sharded tensors, a collective, and leave the generators out, of which every rank has its own.
    """
    state = run.state

    def tensor(value: Tensor) -> bytes:
        if isinstance(value, DTensor):
            value = value.full_tensor() if whole else value.to_local()
        return str((value.dtype, tuple(value.shape))).encode() + value.detach().contiguous().numpy().tobytes()

    def of(pieces: Iterator[bytes]) -> str:
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        return digest.hexdigest()

    def optimizer() -> Iterator[bytes]:
        for name, parameter in state.model.named_parameters():
            for key, value in sorted(state.optimizer.state.get(parameter, {}).items()):
                yield f"{name}.{key}".encode()
                yield tensor(value) if isinstance(value, Tensor) else repr(value).encode()
        for group in state.optimizer.param_groups:
            yield repr({key: value for key, value in sorted(group.items()) if key != "params"}).encode()

    progress = {key: value for key, value in asdict(state.progress).items() if key != "train_s"}
    if run.ends_epoch:  # two ways to say where that is
        progress |= {"epoch": progress["epoch"] + 1, "epoch_step": 0}
    generators = [torch.get_rng_state().numpy().tobytes(), repr(random.getstate()), repr(np.random.get_state())]
    rows = [] if whole else run.loader.order(progress["epoch"]).tolist()
    parts = {
        "weights": of(tensor(value) for value in state.model.state_dict().values()),
        "optimizer": of(optimizer()),
        "schedule": repr((state.scheduler.last_epoch, state.scheduler.get_last_lr())),
        "scaler": repr(state.scaler.state_dict()),
        "progress": repr(progress),
        "rows": repr((rows, run.loader.global_batch_size)),
    }
    return parts if whole else parts | {"generators": hashlib.sha256(repr(generators).encode()).hexdigest()}
