"""A source read in windows: so many rows at a time, one window after another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ftlab.data.problems import Problem
from ftlab.data.sources import Chunk, Source
from ftlab.data.strict_json import OnProblem


class WindowReader:
    """Reads the rows of a source once through; rows are told apart by their numbers.

    Windows are meant to be asked for in their order. Another one than the next costs reading on to it, or anew.

    Args:
        fingerprint: the source's.
        window_rows: rows of a window, those that cannot be used among them.
        limit: rows of the source that are read at all; None: all.
    """

    def __init__(self, source: Source, fingerprint: str, window_rows: int, limit: int | None):
        self.fingerprint = fingerprint
        self._source, self._window_rows, self._limit = source, window_rows, limit
        self._chunks: Iterator[Chunk] = iter(())
        self._next: int | None = None  # the window that the source would go on with
        self._first = self._end = 0  # rows of the window being read
        self._rest: Chunk | None = None  # of a chunk that goes over the end of a window
        self._later: list[Problem] = []  # of rows after the end
        self._on_problem: Callable[[Problem], None] = self._later.append

    def window(self, number: int) -> WindowOfRows:
        """One window, counted from 0, as a source of its own; it is empty after the last."""
        first = number * self._window_rows
        end = first + self._window_rows
        return WindowOfRows(self, number, first, end if self._limit is None else min(end, self._limit))

    def read(
        self, number: int, first: int, end: int, columns: Sequence[str] | None, on_problem: OnProblem
    ) -> Iterator[Chunk]:
        """The rows ``first`` to ``end`` of the source, which are window ``number``."""
        self._first, self._end, self._on_problem = first, end, on_problem
        if first >= end:
            return
        if self._next == number:
            met, self._later = self._later, []
            for problem in met:
                self._meet(problem)
        else:
            self._rest, self._later = None, []
            self._chunks = self._source.chunks(columns, self._meet, first)
        self._next = None  # until it has been read to its end
        while (chunk := self._rest or next(self._chunks, None)) is not None:
            inside = [row for row in chunk.rows if row[0] < end]
            rest = chunk.rows[len(inside) :]
            self._rest = chunk._replace(rows=rest) if rest else None
            if inside:
                yield chunk._replace(rows=inside, done=inside[-1][0] + 1 - first)
            if rest:
                break
        self._next = number + 1

    def _meet(self, problem: Problem) -> None:
        row = self._first if problem.row is None else problem.row
        if row >= self._end:
            self._later.append(problem)
        elif row >= self._first:  # else it was told with an earlier window
            self._on_problem(problem)


@dataclass(frozen=True)
class WindowOfRows:
    """The rows ``first`` to ``end`` of what ``reader`` reads."""

    reader: WindowReader
    number: int
    first: int
    end: int

    def fingerprint(self) -> str:
        """That of the source, and which of its rows."""
        whose = f"{self.reader.fingerprint} {self.first} {self.end}"
        return hashlib.sha256(whose.encode()).hexdigest()

    def size(self) -> tuple[int, str]:
        """Its rows, if the source has so many."""
        return max(self.end - self.first, 0), "rows"

    def chunks(self, columns: Sequence[str] | None, on_problem: OnProblem, start: int = 0) -> Iterator[Chunk]:  # noqa: ARG002
        """The rows, once."""
        return self.reader.read(self.number, self.first, self.end, columns, on_problem)
