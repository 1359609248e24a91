"""Which samples every optimizer step saw, rank by rank, and the proof after every epoch that each was seen once.

``ledger/rank00000.txt`` has a line for each step: the step, the epoch, and the samples (row numbers of the source).
``ledger/epochs.jsonl`` has one for each finished epoch: whether the steps saw, together, exactly what the epoch's order
holds, and if not, what was missing or seen too often.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ftlab.data.batch import Batch
from ftlab.data.loader import BatchLoader
from ftlab.distributed.base import Parallelism
from ftlab.outputs.files import append_jsonl
from ftlab.storage.disk import LineFile, replace_file

log = logging.getLogger(__name__)

_EPOCHS = "epochs.jsonl"
_SHOWN = 100  # samples named in a verdict


class Ledger:
    """One rank's book; rank 0 also draws the sums.

    Args:
        folder: ``ledger`` of the run; every rank sees it.
    """

    def __init__(self, folder: Path, rank: int):
        self._folder, self._rank = folder, rank
        folder.mkdir(exist_ok=True)
        self._file = LineFile(folder / f"rank{rank:05d}.txt")
        self._proving: threading.Thread | None = None

    def note(self, step: int, epoch: int, micro_batches: Sequence[Batch]) -> None:
        """Write down the samples of a step that has been done; steps count from 1."""
        ids = ",".join(str(i) for batch in micro_batches for i in batch.sample_ids)
        self._file.add([f"{step} {epoch} {ids}"])

    def flush(self) -> None:
        """Bring everything noted to the disk: a checkpoint may then count on it.

        Raises:
            OSError: the disk does not take it; nothing is lost, and the next call tries again.
        """
        self._file.sync()

    def end_epoch(self, epoch: int, last_step: int, n_steps: int, loader: BatchLoader, parallel: Parallelism) -> None:
        """Prove the epoch, and those before it that a kill left unproven; every rank must call it.

        Args:
            last_step: of the epoch, which had ``n_steps``.
        """
        there = True
        try:
            self.flush()
        except OSError as error:
            log.warning("%s: %s; epoch %d is proven with the next one", self._file.path, error.strerror, epoch)
            there = False
        if all(parallel.gather(there)) and self._rank == 0:
            self._wait()
            self._proving = threading.Thread(
                target=self._prove, args=(epoch, last_step, n_steps, loader), name="ledger", daemon=True
            )
            self._proving.start()

    def close(self) -> None:
        """Finish the proofs."""
        self.flush()
        self._wait()
        self._file.close()

    def _wait(self) -> None:
        if self._proving is not None:
            self._proving.join()
            self._proving = None

    def _prove(self, epoch: int, last_step: int, n_steps: int, loader: BatchLoader) -> None:
        proven = {line["epoch"] for line in _lines(self._folder / _EPOCHS)}
        for e in sorted(set(range(epoch + 1)) - proven):
            verdict = compare(seen_in(self._folder, e), loader.sample_ids(e, n_steps))
            last = last_step - (epoch - e) * n_steps
            try:
                append_jsonl(self._folder / _EPOCHS, [{"epoch": e, "last_step": last, **verdict}])
            except OSError as error:
                log.warning("%s: %s; epoch %d is proven with the next one", self._folder / _EPOCHS, error.strerror, e)
                return
            if not verdict["each_once"]:
                log.error("epoch %d did not see each of its samples once: see %s", e, self._folder / _EPOCHS)


def compare(seen: Iterable[int], expected: Iterable[int]) -> dict[str, object]:
    """Whether ``seen`` is ``expected``, whatever the order, and the samples of which there are too few or too many."""
    seen, expected = Counter(seen), Counter(expected)
    missing, surplus = expected - seen, seen - expected
    return {
        "samples": seen.total(),
        "each_once": not missing and not surplus,
        "missing": sorted(missing)[:_SHOWN],
        "too_often": sorted(surplus)[:_SHOWN],
    }


def seen_in(folder: Path, epoch: int) -> Iterator[int]:
    """The samples that all ranks noted in one epoch."""
    for _, _, of_epoch, ids in _entries(folder):
        if of_epoch == epoch:
            yield from ids


def seen_at(folder: Path, step: int) -> dict[int, list[int]]:
    """The samples that each rank noted for one step."""
    return {rank: ids for rank, at, _, ids in _entries(folder) if at == step}


def cut_back(folder: Path, step: int) -> None:
    """Forget what was noted after ``step``, as if it had not been done."""
    for path in sorted(folder.glob("rank*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and int(line.split(" ", 1)[0]) <= step]
        replace_file(path, "".join(kept))
    if (folder / _EPOCHS).exists():
        kept = [json.dumps(line) + "\n" for line in _lines(folder / _EPOCHS) if line["last_step"] <= step]
        replace_file(folder / _EPOCHS, "".join(kept))


def _entries(folder: Path) -> Iterator[tuple[int, int, int, list[int]]]:
    """(rank, step, epoch, samples) of every line; one torn by a kill is left out."""
    for path in sorted(folder.glob("rank*.txt")):
        rank = int(path.stem.removeprefix("rank"))
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    step, epoch, ids = line.rstrip("\n").split(" ")
                    yield rank, int(step), int(epoch), [int(i) for i in ids.split(",") if i]


def _lines(path: Path) -> list[dict[str, int]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
