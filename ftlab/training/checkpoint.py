"""Checkpoints of a run in training: when one is due, which are kept, and what goes into them.

`checkpoint_writer.py` writes them, in a thread if need be; `opened.py` reads them back.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftlab.distributed.base import Parallelism
from ftlab.errors import CheckpointError, ConfigError, NonFiniteError
from ftlab.models.row_files import take_rows
from ftlab.storage.checkpoints import Checkpoints
from ftlab.training import rng, snapshot
from ftlab.training.checkpoint_writer import Captured, CheckpointWriter, SaveError
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
        self._identity, self._metric, self._place = identity, metric, place
        self._writer = CheckpointWriter(
            checkpoints,
            parallel,
            run=identity.run,
            config_hash=identity.config_hash,
            parent=parent,
            then=self._remove_old,
        )
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
            arguments = (self._capture(metrics, into=self._staging if background else None), self._bring_records())
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
                self._writer.parent = self._checkpoints.amend(step, _finite(metrics)) or self._writer.parent
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

    def _capture(self, metrics: Mapping[str, float], into: dict[str, Tensor] | None) -> Captured:
        """The state as it is now.

        Args:
            into: what holds the copies of tensors, which go on changing; null: nothing changes before all is written.
        """
        rows = take_rows(snapshot.tensors(self._state), into)
        if into is not None and self._parallel.device.type == "cuda":
            torch.cuda.synchronize(self._parallel.device)
        states = rng.capture(self._parallel.device)
        return Captured(
            step=self._state.progress.step,
            rows=rows,
            facts=json.dumps(self._facts()),
            random_states=json.dumps(states),
            metrics=_finite(metrics),
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

    def _write(self, captured: Captured, hindrance: OSError | None) -> None:
        self._error = self._writer.write(captured, hindrance)

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


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no other numbers."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
