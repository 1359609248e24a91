"""The data cache under many processes at once, and under kills: always whole, always the same."""

from __future__ import annotations

import signal
from pathlib import Path

from ftlab.data.dataset import Dataset
from tests.faults.figures import Figure, trials
from tests.unit.test_cache import build, build_until, entries, fork, options, rows

__all__ = ["rows"]  # a fixture


@trials(few=2, all_=30)
def test_r19_four_cold_starts_at_once(n: int, rows: Path) -> None:
    wanted = Dataset(**options(rows, cache_dir=rows / "elsewhere")).fingerprint
    with Figure("R19", "4 processes start at once without a cache: one is made, all have the same") as figure:
        for number in range(n):
            with figure.trial(number), fork.Manager() as manager:
                for path in sorted((rows / "cache").rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                results = manager.dict()
                processes = [fork.Process(target=build, args=(str(rows), results, i)) for i in range(4)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join(60)
                assert [process.exitcode for process in processes] == [0] * 4
                assert set(results.values()) == {wanted}
                assert len(entries(rows, "rows")) == 1


@trials(few=2, all_=20)
def test_r19_killed_while_it_is_made(n: int, rows: Path) -> None:
    wanted = Dataset(**options(rows, cache_dir=rows / "elsewhere")).fingerprint
    claim = "SIGKILL at any change while the cache is made: the next run makes it anew, and nothing is left over"
    with Figure("R19k", claim) as figure:
        for number in range(n):
            folder = rows / f"cache{number}"
            with figure.trial(number):
                nth = figure.random(number).randrange(20)
                process = fork.Process(target=build_until, args=(nth, options(rows, cache_dir=folder)))
                process.start()
                process.join()
                assert process.exitcode == -signal.SIGKILL, f"it was done before change {nth}"
                assert Dataset(**options(rows, cache_dir=folder)).fingerprint == wanted
                assert len([path for path in (folder / "rows").iterdir() if path.is_dir()]) == 1
