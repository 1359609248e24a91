"""Checkpoints of a run in training: when one is due, and writing it with all ranks (`opened.py` reads it back).

All ranks write at once, each its own rows into a file of its own. The first commits: the manifest last, then one
rename. Ranks agree on how it went over a channel that the loop does not use, so that all of it can happen in a
thread while training goes on.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftlab.distributed.base import Parallelism
from ftlab.errors import CheckpointError, ConfigError, FtlabError, NonFiniteError
from ftlab.models.row_files import Rows, take_rows, write_rows
from ftlab.storage.checkpoints import Checkpoints
from ftlab.storage.disk import DurableFile, write_file
from ftlab.storage.manifest import FileEntry, Manifest
from ftlab.training import rng, snapshot
from ftlab.training.opened import STATE
from ftlab.training.state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep; ``conf/checkpoint/default.yaml`` explains each key."""

    every_steps: int | None
    every_minutes: float | None
    every_epoch: bool
    at_end: bool
    async_: bool
    keep_last: int
    keep_best: int
    export: bool

    @property
    def ever(self) -> bool:
        """Whether any checkpoint is written at all, except when the run is told to stop."""
        return self.at_end or self.every_epoch or bool(self.keep_best or self.every_steps or self.every_minutes)

    @property
    def kept(self) -> int:
        """The most that are on the disk at once: one is complete before another goes."""
        return self.keep_last + self.keep_best + 1


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint says of the run it belongs to.

    Attributes:
        run: the run's id.
        config: resolved, secrets masked, and its sha256.
        data, tokenizer: fingerprints of what it trains on and with.
        end_ids: tokens that end an answer, as the weights that it began with say.
        global_batch_size: samples per optimizer step, which the data cursor counts in.
    """

    run: str
    config: dict[str, Any]
    config_hash: str
    data: str
    tokenizer: str
    end_ids: list[int]
    global_batch_size: int


class SaveError(FtlabError):
    """A checkpoint could not be written; the ones before it are as they were."""


class Checkpointer:
    """Writes the checkpoints of one run; every rank has one and calls the same methods after the same steps.

    Args:
        metric: the validation metric that tells which checkpoint is best, and whether less of it is better.
        parent: digest of the checkpoint that the run goes on from; null for none.
        place: what is to be remembered of the data at a step of an epoch (``BatchLoader.place``).
    """

    def __init__(
        self,
        config: CheckpointConfig,
        checkpoints: Checkpoints,
        state: TrainState,
        parallel: Parallelism,
        identity: Identity,
        *,
        metric: tuple[str, bool],
        parent: str | None,
        place: Callable[[int], Mapping[str, int | None]],
    ):
        self.config = config
        self._checkpoints, self._state, self._parallel = checkpoints, state, parallel
        self._identity, self._metric, self._parent, self._place = identity, metric, parent, place
        self._saved_step = state.progress.step if parent else -1
        self._saved_at = time.monotonic()
        self._staging: dict[str, Tensor] = {}
        self._writing: threading.Thread | None = None
        self._error: SaveError | None = None
        self.records: list[Callable[[], None]] = []
        """What brings this rank's records of the run to the disk: a checkpoint counts on them."""

    def prepare(self) -> None:
        """Make the folder, rid of what was never finished; all ranks must see it.

        Raises:
            ConfigError: for a folder on another machine.
        """
        if self._parallel.rank == 0:
            self._checkpoints.make()
            self._checkpoints.discard_unfinished()
            self._remove_old()  # a kill may have come between a checkpoint and the removal of the one it replaced
        seen = self._parallel.gather_aside(True)  # the folder is there now, for whoever can see it
        seen = self._parallel.gather_aside(self._checkpoints.folder.is_dir())
        if not all(seen):
            raise ConfigError(
                "paths.output_dir",
                f"{self._checkpoints.folder} is not seen by rank {seen.index(False)}: every rank writes its part of a "
                "checkpoint",
                "paths.output_dir=/a/folder/that/all/machines/share",
            )

    def save_is_due_by_clock(self) -> bool:
        """Whether ``every_minutes`` have passed; the first rank's clock decides."""
        minutes = self.config.every_minutes
        return self._parallel.rank == 0 and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def due(self, step: int, *, ends_epoch: bool, ends_run: bool, validated: bool, is_best: bool) -> bool:
        """Whether the configuration asks for a checkpoint after ``step``; of several best ones, any may be one."""
        config = self.config
        return (
            (ends_run and config.at_end)
            or (ends_epoch and config.every_epoch)
            or (is_best and config.keep_best > 0)
            or (validated and config.keep_best > 1)
            or (config.every_steps is not None and step % config.every_steps == 0)
        )

    def save(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Write a checkpoint of the state as it is now; the state may change as soon as this returns.

        A write that fails is told and costs nothing but itself: the checkpoints before it are as they were.

        Args:
            metrics: validation metrics of this step, if there are any.
            last: wait until it is written.

        Raises:
            SaveError: if it is the last, and failed.
            NonFiniteError: weights or optimizer state hold a NaN or an infinity on some rank; nothing is written.
        """
        self.wait()
        step = self._state.progress.step
        if step != self._saved_step or self._error is not None:
            self._refuse_non_finite(step)
            background = self.config.async_ and not last
            into = self._staging if background else None
            rows = take_rows(snapshot.tensors(self._state), into)
            if background and self._parallel.device.type == "cuda":
                torch.cuda.synchronize(self._parallel.device)
            states = rng.capture(self._parallel.device)
            # Text by now: what it is made of goes on changing.
            facts = json.dumps(self._facts()), json.dumps(states)
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            arguments = (step, rows, facts, finite, self._bring_records())
            self._saved_step, self._saved_at = step, time.monotonic()
            if background:
                self._writing = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
                self._writing.start()
            else:
                self._write(*arguments)
        if last:
            self.wait()
            if self._error is not None:
                raise self._error

    def amend(self, metrics: Mapping[str, float]) -> None:
        """Add the validation metrics of a checkpoint that the run goes on from, if there are any and it has none."""
        step = self._state.progress.step
        if self._parallel.rank == 0 and metrics and step and step == self._saved_step:
            try:
                finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
                self._parent = self._checkpoints.amend(step, finite) or self._parent
            except (OSError, CheckpointError) as error:
                log.warning("the checkpoint of step %d goes without its validation metrics: %s", step, error)

    def close(self) -> None:
        """Wait for what is still being written.

        Raises:
            SaveError: when the newest checkpoint failed.
        """
        self.wait()
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _refuse_non_finite(self, step: int) -> None:
        """Every step's numbers were good, and still: an update may overflow, and memory may fail."""
        everyone = self._parallel.gather(snapshot.non_finite(self._state))
        if bad := sorted({name for names in everyone for name in names}):
            more = f" and {len(bad) - 1} more tensors" if bad[1:] else ""
            ranks = ", ".join(str(rank) for rank, names in enumerate(everyone) if names)
            raise NonFiniteError(
                f"step {step}: {bad[0]}{more} hold a NaN or an infinity (rank {ranks}): no checkpoint is made of that"
            )

    def _facts(self) -> dict[str, Any]:
        state, identity = self._state, self._identity
        progress = state.progress
        return snapshot.facts(state) | {
            "cursor": {
                "epoch": progress.epoch,
                "position": progress.epoch_step * identity.global_batch_size,
                "global_batch_size": identity.global_batch_size,
                **self._place(progress.epoch_step),
            },
            "run": identity.run,
            "config": identity.config,
            "data": identity.data,
            "tokenizer": identity.tokenizer,
            "end_ids": identity.end_ids,
            "ranks": self._parallel.dp_size,
        }

    def _bring_records(self) -> OSError | None:
        """Why the records could not be brought to the disk; null when they are there."""
        try:
            for bring in self.records:
                bring()
        except OSError as error:
            return error
        return None

    def _write(
        self,
        step: int,
        rows: dict[str, Rows],
        facts: tuple[str, str],
        metrics: dict[str, float],
        hindrance: OSError | None,
    ) -> None:
        """All of the writing, on every rank; exchanges go over the channel aside.

        Args:
            hindrance: why this rank cannot even begin.
        """
        self._error = None
        try:
            self._together(lambda: self._begin(step, hindrance))
            files = self._together(lambda: self._write_own(step, rows, *facts))
            merged = {name: FileEntry(*entry) for own in files for name, entry in own.items()}
            self._together(lambda: self._commit(step, merged, metrics))
        except SaveError as error:
            if self._parallel.rank == 0:
                self._checkpoints.abandon(step)
                log.error("%s", error)
            self._error = error
        except RuntimeError as error:  # the exchange broke: another rank is gone, and the run with it
            self._error = SaveError(f"no checkpoint was written: {error}")

    def _together(self, work: Any) -> list[Any]:
        """What ``work()`` gave on every rank.

        Raises:
            SaveError: on all ranks, when it failed on one.
        """
        try:
            mine = (True, work())
        except OSError as error:
            path = f": {error.filename}" if error.filename else ""
            mine = (False, f"{error.strerror or error}{path} (rank {self._parallel.rank} on {socket.gethostname()})")
        except Exception as error:  # a bug of ours on one rank must not leave the others waiting
            mine = (False, f"rank {self._parallel.rank}: {error!r}")
        everyone = self._parallel.gather_aside(mine)
        for fine, value in everyone:
            if not fine:
                kept = [found.path.name for found in self._checkpoints.complete()]
                before = f"the newest is {kept[-1]}" if kept else "there is none before it"
                raise SaveError(f"no checkpoint was written: {value}; {before}")
        return [value for _, value in everyone]

    def _begin(self, step: int, hindrance: OSError | None) -> None:
        if hindrance is not None:
            raise hindrance
        if self._parallel.rank == 0:
            self._checkpoints.begin(step)

    def _write_own(self, step: int, rows: dict[str, Rows], facts: str, states: str) -> dict[str, tuple[int, str]]:
        """This rank's files; name -> bytes and sha256."""
        rank, n_ranks = self._parallel.rank, self._parallel.dp_size
        folder = self._checkpoints.aside(step)
        name = f"rows-{rank:05d}-of-{n_ranks:05d}.safetensors"
        with DurableFile(folder / name) as file:
            write_rows(file, rows)
        written = {name: (file.n_bytes, file.sha256())}
        texts = {f"rng-{rank:05d}.json": states} | ({STATE: facts} if rank == 0 else {})
        for name, text in texts.items():
            data = text.encode()
            written[name] = (len(data), write_file(folder / name, data))
        return written

    def _commit(self, step: int, files: dict[str, FileEntry], metrics: dict[str, float]) -> None:
        manifest = Manifest(
            step=step,
            run=self._identity.run,
            parent=self._parent,
            config_hash=self._identity.config_hash,
            metrics=metrics,
            files=files,
        )
        if self._parallel.rank == 0:
            path = self._checkpoints.commit(step, manifest)
            self._parent = manifest.digest
            log.info("checkpoint: %s", path.name)
            self._remove_old()

    def _remove_old(self) -> None:
        name, less_is_better = self._metric
        sign = -1 if less_is_better else 1
        try:
            self._checkpoints.retain(
                keep_last=self.config.keep_last,
                keep_best=self.config.keep_best,
                better=lambda one: None if name not in one.metrics else sign * one.metrics[name],
            )
        except OSError as error:  # what was written is written
            log.warning("old checkpoints could not be removed: %s", error)
