"""A checkpoint written by all ranks at once, each its own rows into a file of its own.

The first rank commits: the manifest last, then one rename. Ranks agree on how it went over a channel that the loop
does not use, so that all of it can happen in a thread while training goes on.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftlab.distributed.base import Parallelism
from ftlab.errors import FtlabError
from ftlab.models.row_files import Rows, write_rows
from ftlab.storage.checkpoints import Checkpoints
from ftlab.storage.disk import DurableFile, write_file
from ftlab.storage.manifest import FileEntry, Manifest
from ftlab.training.opened import STATE

log = logging.getLogger(__name__)


class SaveError(FtlabError):
    """A checkpoint could not be written; the ones before it are as they were."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """This rank's part of the state after ``step``, which the run no longer changes.

    Attributes:
        rows: of every tensor those that this rank writes.
        facts, random_states: JSON, text by now: what it is made of goes on changing.
        metrics: validation metrics, if there are any.
    """

    step: int
    rows: dict[str, Rows]
    facts: str
    random_states: str
    metrics: dict[str, float]


class CheckpointWriter:
    """Every rank of a run has one, and writes the same steps.

    Args:
        run: its id.
        config_hash: sha256 of its configuration.
        parent: digest of the newest checkpoint; null for none.
        then: called on the first rank when there is one more.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        parallel: Parallelism,
        *,
        run: str,
        config_hash: str,
        parent: str | None,
        then: Callable[[], None],
    ):
        self._checkpoints, self._parallel = checkpoints, parallel
        self._run, self._config_hash, self.parent, self._then = run, config_hash, parent, then

    def write(self, captured: Captured, hindrance: OSError | None) -> SaveError | None:
        """All of the writing; exchanges go over the channel aside.

        Args:
            hindrance: why this rank cannot even begin.

        Returns:
            Why there is no checkpoint; None where there is.
        """
        try:
            self._together(lambda: self._begin(captured.step, hindrance))
            files = self._together(lambda: self._write_own(captured))
            merged = {name: FileEntry(*entry) for own in files for name, entry in own.items()}
            self._together(lambda: self._commit(captured, merged))
        except SaveError as error:
            if self._parallel.rank == 0:
                self._checkpoints.abandon(captured.step)
                log.error("%s", error)
            return error
        except RuntimeError as error:  # the exchange broke: another rank is gone, and the run with it
            return SaveError(f"no checkpoint was written: {error}")
        return None

    def _together(self, work: Callable[[], Any]) -> list[Any]:
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

    def _write_own(self, captured: Captured) -> dict[str, tuple[int, str]]:
        """This rank's files; name -> bytes and sha256."""
        rank, n_ranks = self._parallel.rank, self._parallel.dp_size
        folder = self._checkpoints.aside(captured.step)
        name = f"rows-{rank:05d}-of-{n_ranks:05d}.safetensors"
        with DurableFile(folder / name) as file:
            write_rows(file, captured.rows)
        written = {name: (file.n_bytes, file.sha256())}
        texts = {f"rng-{rank:05d}.json": captured.random_states} | ({STATE: captured.facts} if rank == 0 else {})
        for name, text in texts.items():
            data = text.encode()
            written[name] = (len(data), write_file(folder / name, data))
        return written

    def _commit(self, captured: Captured, files: dict[str, FileEntry]) -> None:
        manifest = Manifest(
            step=captured.step,
            run=self._run,
            parent=self.parent,
            config_hash=self._config_hash,
            metrics=captured.metrics,
            files=files,
        )
        if self._parallel.rank == 0:
            path = self._checkpoints.commit(captured.step, manifest)
            self.parent = manifest.digest
            log.info("checkpoint: %s", path.name)
            self._then()
