"""A checkpoint read back: what it says, and its tensors for whoever wants them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlab.distributed.base import Parallelism
from ftlab.errors import CheckpointError
from ftlab.models.row_files import StoredRows, open_rows
from ftlab.storage.manifest import Manifest
from ftlab.training import rng, snapshot
from ftlab.training.state import TrainState

STATE = "state.json"
_TOLD = {"progress", "scheduler", "scaler", "optimizer", "cursor", "run", "config", "data", "tokenizer", "ranks"}


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose files were found to be as they were written.

    Attributes:
        manifest, told: what ``MANIFEST.json`` and ``state.json`` say.
        stored: its tensors, still on the disk.
    """

    path: Path
    manifest: Manifest
    told: dict[str, Any]
    stored: dict[str, StoredRows]

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding; None where the model calls it by another name."""
        rows = self.stored.get("model.embedding.weight")
        return rows.shape[0] if rows is not None else None

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer; none where the checkpoint is older than that it says them."""
        return list(self.told.get("end_ids", []))

    def rng(self, rank: int) -> dict[str, Any] | None:
        """The random states of one rank; None where there were fewer ranks."""
        path = self.path / f"rng-{rank:05d}.json"
        return _read_json(path) if path.name in self.manifest.files else None

    def restore(self, state: TrainState, parallel: Parallelism) -> None:
        """Make ``state`` what was saved, on any number of ranks.

        Raises:
            CheckpointError: when it is of another architecture, optimizer or dtype.
        """
        snapshot.restore(state, self.stored, self.told, self.path)
        if (states := self.rng(parallel.rank)) is not None:
            try:
                rng.restore(states, parallel.device)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(self.path, f"holds no random states of rank {parallel.rank}: {error}") from None


def open_checkpoint(path: Path) -> Opened:
    """Read the headers of a checkpoint that `newest_sound` or `verify` has approved.

    Raises:
        CheckpointError: for what is as it was written, but was not written by ftlab.
    """
    manifest = Manifest.read(path)
    told = _read_json(path / STATE)
    if missing := _TOLD - told.keys():
        raise CheckpointError(path / STATE, f"does not say: {', '.join(sorted(missing))}")
    names = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    return Opened(path, manifest, told, open_rows(path / name for name in names))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(path, "is not a JSON object")
    return content
