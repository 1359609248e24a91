"""The data cache under many processes at once, and under kills: always whole, always the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from ftlab.data.dataset import Dataset
from ftlab.data.store import StoreWriter
from ftlab.storage import disk
from tests.faults.figures import Figure, trials
from tests.unit.test_cache import options, rows

__all__ = ["rows"]  # a fixture

fork = multiprocessing.get_context("fork")  # quick: these processes only read, hash and write
N_CHANGES = 20  # while a cache is made: rows 2 + 14 flushes, packs 4


def entries(cache: Path) -> list[str]:
    """What kinds of things are kept."""
    return [kind for kind in ("rows", "packs") for path in (cache / kind).iterdir() if path.is_dir()]


def build(values: dict[str, Any], fingerprints: MutableMapping[int, str], number: int) -> None:
    fingerprints[number] = Dataset(**values).fingerprint


def build_until(nth: int, values: dict[str, Any]) -> None:
    """Build, and die at the ``nth`` thing that is done: rows written to an array, a file or folder flushed."""
    seen = iter(range(nth + 1))

    def count(*_: Any) -> None:
        if next(seen) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    add = StoreWriter.add

    def add_and_count(writer: StoreWriter, **arrays: Any) -> None:
        count()
        add(writer, **arrays)
        count()

    StoreWriter.add, disk.observer = add_and_count, count  # type: ignore[method-assign]
    Dataset(**values)


@trials(few=1, all_=30)
def test_r19_eight_cold_starts_at_once(n: int, rows: Path) -> None:
    wanted = Dataset(**options(rows, cache_dir=rows / "elsewhere")).fingerprint
    with Figure("R19", "8 processes start at once without a cache: one is made, all have the same") as figure:
        for number in range(n):
            values = options(rows, cache_dir=rows / f"cache{number}")
            with figure.trial(number), fork.Manager() as manager:
                found = manager.dict()
                processes = [fork.Process(target=build, args=(values, found, i)) for i in range(8)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join(60)
                assert [process.exitcode for process in processes] == [0] * 8
                assert found.values() == [wanted] * 8
                assert entries(values["cache_dir"]) == ["rows", "packs"]


@trials(few=4, all_=N_CHANGES)
def test_r19_killed_while_it_is_made(n: int, rows: Path) -> None:
    wanted = Dataset(**options(rows, cache_dir=rows / "elsewhere")).fingerprint
    claim = "SIGKILL at each change while the cache is made: the next run makes it anew, and nothing is left over"
    with Figure("R19k", claim) as figure:
        for number in range(n):
            nth = number * (N_CHANGES - 1) // (n - 1)
            values = options(rows, cache_dir=rows / f"cache{nth}")
            with figure.trial(nth):
                process = fork.Process(target=build_until, args=(nth, values))
                process.start()
                process.join()
                assert process.exitcode == -signal.SIGKILL, "it was done before"
                assert Dataset(**values).fingerprint == wanted
                assert entries(values["cache_dir"]) == ["rows", "packs"], "what was left aside is cleared away"
