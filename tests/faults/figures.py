"""Reliability figures: how many of how many trials held, counted in the open.

pytest tests/faults                                                      a few trials of each, with the other tests
pytest -m soak tests/faults                                              all trials
FTLAB_FIGURES=docs/reliability.md pytest -m soak -n 2 tests/faults       and the table of what came out, on two cores
FTLAB_FAULT_SEED=7 ...                                                   other trials of the same kind
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pytest

SEED = int(os.environ.get("FTLAB_FAULT_SEED", "0"))
_COLUMNS = "| figure | what was done, and what held | held / trials | seed | seconds | date |"


def trials(few: int, all_: int) -> pytest.MarkDecorator:
    """The test's ``n``: a few trials with every test run, all of them with ``-m soak``."""
    return pytest.mark.parametrize("n", [few, pytest.param(all_, marks=pytest.mark.soak)])


@dataclass
class Figure:
    """One row of the table; a context in which its trials run, and which fails at the end if one of them did."""

    name: str
    claim: str
    n: int = 0
    failed: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        if kind is None:
            done.append(self)
            if path := os.environ.get("FTLAB_FIGURES"):  # now: others may never come to an end
                write(Path(path), self)
            assert not self.failed, f"{self.name}: {len(self.failed)} of {self.n} failed\n" + "\n".join(self.failed)

    def random(self, trial: object) -> random.Random:
        """This trial's own numbers."""
        return random.Random(f"{SEED} {self.name} {trial}")

    @contextmanager
    def trial(self, what: object) -> Iterator[None]:
        """One trial; how it failed is kept, and the next one runs."""
        self.n += 1
        try:
            yield
        except Exception as error:
            self.failed.append(f"--- {what}: {type(error).__name__}: {error}")

    @property
    def row(self) -> str:
        """As the table has it."""
        claim = "; ".join([self.claim, *self.remarks])
        held = f"{self.n - len(self.failed)} / {self.n}"
        return f"| {self.name} | {claim} | {held} | {SEED} | {self.seconds:.0f} | {datetime.now(UTC):%Y-%m-%d} |"


done: list[Figure] = []


def table(rows: list[str]) -> str:
    """The table with ``rows``."""
    return "\n".join([_COLUMNS, "|---" * 6 + "|", *sorted(rows, key=_order)]) + "\n"


def write(path: Path, figure: Figure) -> None:
    """Put a figure into the table of ``path``, in place of an earlier one of its name; several processes may.

    A file without one gets one at its end.
    """
    path.touch()
    with path.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        if _COLUMNS not in text:
            text += table([])
        begin = text.index(_COLUMNS)
        old = text[begin:].split("\n\n")[0].strip().splitlines()
        rows = {_name(row): row for row in old[2:]} | {figure.name: figure.row}
        file.seek(0)
        file.write(text.replace("\n".join(old) + "\n", table(list(rows.values()))))
        file.truncate()


def _name(row: str) -> str:
    return row.split("|")[1].strip()


def _order(row: str) -> tuple[str, int, str]:
    match = re.match(r"([A-Z]+)(\d+)(.*)", _name(row))
    assert match
    return match[1], int(match[2]), match[3]
