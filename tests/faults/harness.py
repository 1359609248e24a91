"""Trials from the outside: ranks forked in a moment, killed at will, and the run folder that they leave."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from ftlab.config.check import compose_config
from ftlab.distributed.env import WorkerEnv
from ftlab.storage.checkpoints import Checkpoints
from tests.distributed.jobs import TINY
from tests.faults.trial import Event, Outcome, Plan, Rank

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch", "transformers", "ftlab.run", "tests.faults.trial"])

WAIT_S = 120.0  # for a trial that takes two seconds on a free machine; the machine may be anything but free
SHORT = (
    *TINY,
    *("dataset.val_fraction=0.25", "trainer.max_steps=12", "trainer.batch_size=2"),
    *("trainer.gradient_accumulation_steps=2", "evaluation.every_steps=4", "evaluation.n_samples=1"),
    *("evaluation.max_new_tokens=2", "checkpoint.every_steps=3", "checkpoint.keep_last=2", "optimizer.lr=0.01"),
)
"""A run of 12 steps with accumulation, validation and four checkpoints, of which two go again."""


@functools.cache
def compose(*overrides: str) -> dict[str, Any]:
    """The resolved configuration of a short run."""
    return compose_config([*SHORT, *overrides])


def config_of(folder: Path, *overrides: str, resume: int | str | None = None, again: bool = False) -> dict[str, Any]:
    """The configuration of a run in ``folder``; ``again``: going on from its newest checkpoint or from ``resume``."""
    config = json.loads(json.dumps(compose(*overrides)))
    config["paths"]["output_dir"] = str(folder)
    if again:
        config["resume"] = {"run": str(folder), "at": resume, "overrides": []}
    return config


class Trial:
    """The ranks of one run, started; a context that none of them outlives.

    Args:
        together: when one rank is killed, all are: the machine is lost, not a process.
    """

    def __init__(self, plan: Plan, n_ranks: int = 1, *, together: bool = True):
        self.plan, self.together = plan, together
        plan.notes.mkdir(exist_ok=True)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if n_ranks > 1 else None
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        port = self._store.port if self._store else 0
        for rank in range(n_ranks):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_be_rank, args=(rank, n_ranks, port, theirs, plan), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)
        self.outcomes: list[Outcome | None] = [None] * n_ranks
        self.failures: dict[int, str] = {}
        self._alive = dict(zip(self._pipes, range(n_ranks), strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in self._pipes:
            pipe.close()

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all ranks that are left, or to some."""
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid or 0, number)

    def kill(self) -> None:
        """End all of it at once."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def next_word(self, timeout_s: float = WAIT_S) -> Any:
        """What a rank tells next; None when all have ended."""
        deadline = time.monotonic() + timeout_s
        while self._alive:
            ready = wait(list(self._alive), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"not done in {timeout_s} s: {self.stderr()}"
            for pipe in ready:
                rank = self._alive[pipe]  # type: ignore[index]
                try:
                    kind, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    del self._alive[pipe]  # type: ignore[arg-type]
                    self.processes[rank].join()
                    if self.together and self.processes[rank].exitcode == -signal.SIGKILL:
                        self.send(signal.SIGKILL)
                    continue
                if kind == "outcome":
                    self.outcomes[rank] = value
                elif kind == "failure":
                    self.failures[rank] = value
                else:
                    return value
        return None

    def end(self, timeout_s: float = WAIT_S) -> list[Outcome | None]:
        """What the ranks say, once all have ended; None of one that was killed."""
        while self.next_word(timeout_s) is not None:
            pass
        assert not self.failures, "\n".join(self.failures.values())
        return self.outcomes

    def exit_codes(self) -> list[int | None]:
        """What each rank would have ended with by itself; of one that told no outcome, what its process ended with."""
        ended = zip(self.outcomes, self.processes, strict=True)
        return [outcome.exit_code if outcome else process.exitcode for outcome, process in ended]

    def stderr(self) -> str:
        """What all ranks have said so far."""
        return "".join(path.read_text() for path in sorted(self.plan.notes.glob("stderr-*")))


def _be_rank(rank: int, n: int, port: int, pipe: Connection, plan: Plan) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background find it ignored
    fd = os.open(plan.notes / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 2)
    if plan.attempt:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(plan.attempt)
    worker = WorkerEnv(
        rank=rank,
        local_rank=rank,
        world_size=n,
        local_world_size=n,
        device=torch.device("cpu"),
        store=dist.TCPStore("127.0.0.1", port, is_master=False) if n > 1 else None,
    )
    try:
        message = ("outcome", Rank(plan, worker, lambda what: pipe.send_bytes(pickle.dumps(("word", what)))).run())
    except BaseException:
        message = ("failure", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(message))
    pipe.close()
    os._exit(0)  # a broken process group may hang or abort while it is taken down; not what is under test


# ------------------------------------------------------------------------------------------- what is compared


class Folder:
    """A run's folder between trials, and what its trials saw."""

    def __init__(self, root: Path, *overrides: str, n_ranks: int = 1):
        self.root, self.overrides, self.n_ranks = root, overrides, n_ranks
        self.run, self.notes = root / "run", root / "notes"
        root.mkdir(exist_ok=True)

    def plan(self, **fields: Any) -> Plan:
        """To start the run, or to go on with it where there is a checkpoint."""
        again = self.begun
        return Plan(config=config_of(self.run, *self.overrides, again=again), notes=self.notes, **fields)

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(self.checkpoints.complete())

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's."""
        return Checkpoints(self.run / "checkpoints")

    def train(self, **fields: Any) -> list[Outcome]:
        """Start the run, or go on with it, and let it end by itself."""
        if not self.begun and self.run.exists():  # killed before the first checkpoint: start again, as a user would
            shutil.rmtree(self.run)
        with Trial(self.plan(**fields), self.n_ranks) as trial:
            outcomes = trial.end()
            for outcome in outcomes:
                assert outcome is not None, "killed"
                assert outcome.exit_code == 0, trial.stderr()
            return outcomes  # type: ignore[return-value]

    def interrupt(self, act: Callable[[Event, Rank], None], **fields: Any) -> Trial:
        """Start the run, or go on with it, while ``act`` is at work."""
        if not self.begun and self.run.exists():
            shutil.rmtree(self.run)
        return Trial(self.plan(act=act, **fields), self.n_ranks)

    def events(self, rank: int = 0) -> list[Event]:
        """What happened in one rank, in all trials."""
        path = self.notes / f"events-{rank}"
        return [Event(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` but for what time and memory have to do with."""
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        timed = ("perf/", "memory/", "time/")
        return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]

    def ledger(self) -> dict[str, str]:
        """What the run wrote down of the samples of every step, file by file."""
        return {path.name: path.read_text() for path in sorted((self.run / "ledger").iterdir())}

    def metrics_at(self, step: int) -> dict[str, Any]:
        """The training line of a step."""
        return next(line for line in self.metrics() if line["step"] == step and "train/loss" in line)

    def losses(self) -> dict[int, float]:
        """Training losses by step."""
        return {line["step"]: line["train/loss"] for line in self.metrics() if "train/loss" in line}

    def samples(self, after: int) -> list[str]:
        """The lines of ``samples.jsonl`` after a step."""
        lines = (self.run / "samples.jsonl").read_text().splitlines()
        return [line for line in lines if json.loads(line)["step"] > after]

    def record(self) -> dict[str, Any]:
        """``run.json``."""
        return json.loads((self.run / "run.json").read_text())

    def contents(self, *, names: str = "*") -> dict[str, dict[str, Any]]:
        """Every complete checkpoint, file by file, read without the code under test; times left out."""
        return {found.path.name: content_of(found.path, names) for found in self.checkpoints.complete()}


def content_of(checkpoint: Path, names: str = "*") -> dict[str, Any]:
    """A checkpoint's files, as bytes, ``state.json`` without times, the manifest's facts alone."""
    content: dict[str, Any] = {}
    for path in sorted(checkpoint.glob(names)):
        if path.name == "state.json":
            told = json.loads(path.read_bytes())
            told["progress"].pop("train_s")
            for own in ("resume", "paths"):
                told["config"].pop(own)
            told.pop("run")
            content[path.name] = told
        elif path.name == "MANIFEST.json":
            told = json.loads(path.read_bytes())
            content[path.name] = {key: told[key] for key in ("step", "metrics", "config_hash")}
        else:
            content[path.name] = path.read_bytes()
    return content


@functools.cache
def reference(*overrides: str, n_ranks: int = 1) -> tuple[Folder, list[Outcome]]:
    """The same run when nothing happens to it: once for each configuration."""
    folder = Folder(Path(tempfile.mkdtemp(dir=_scratch())), *overrides, n_ranks=n_ranks)
    return folder, folder.train()


def assert_same(folder: Folder, outcomes: Sequence[Outcome], *, files: bool = True) -> None:
    """Check that a run that was interrupted ended, to the bit, as if it had not been."""
    other, expected = reference(*folder.overrides, n_ranks=folder.n_ranks)
    assert folder.record()["status"] == "completed"
    for rank, (mine, theirs) in enumerate(zip(outcomes, expected, strict=True)):
        differing = [part for part, digest in theirs.ended.items() if mine.ended.get(part) != digest]
        assert not differing, f"rank {rank}: {', '.join(differing)} differ"
    assert folder.metrics() == other.metrics()
    assert folder.ledger() == other.ledger()
    assert folder.checkpoints.incomplete() == []
    if files:
        mine, theirs = folder.contents(), other.contents()
        assert mine.keys() == theirs.keys()
        for name in theirs:
            differing = [file for file in theirs[name] if mine[name].get(file) != theirs[name][file]]
            assert mine[name].keys() == theirs[name].keys()
            assert not differing, f"{name}: {', '.join(differing)} differ"


@functools.cache
def _scratch() -> str:
    """A folder for what lives as long as the tests; removed by conftest."""
    return tempfile.mkdtemp(prefix="ftlab-faults-")


def clean_up() -> None:
    """Remove what `reference` made."""
    if _scratch.cache_info().currsize:
        shutil.rmtree(_scratch(), ignore_errors=True)


def plan_with(plan: Plan, **fields: Any) -> Plan:
    """``plan`` but for some fields."""
    return replace(plan, **fields)
