"""A set that is never held as a whole: read in windows, each tokenised, shuffled and packed like a small set.

The order of an epoch is a pure function of seed, epoch, window and position: the windows in the source's order, the
rows of each in an order of its own. Beside the first, two windows are on the disk at a time: the one being trained on,
and the next, which is made beside the training. A window goes when nobody holds rows of it any more (``cache.Lease``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from ftlab.data.order import permutation
from ftlab.data.samples import Rows
from ftlab.data.store import Store
from ftlab.data.windows import WindowOfRows, WindowReader

# Whoever made a window reads on at once and makes the next; the others, who would have to read up to there, come later.
_HEAD_START_S = 5.0


class Window(NamedTuple):
    """A part of an epoch's rows.

    Attributes:
        first: how many rows of the epoch come before it.
        order: (n,) indices into ``rows``.
    """

    first: int
    rows: Rows
    order: np.ndarray


class Stream:
    """The training rows of a source that is read in windows.

    Args:
        reader: makes a reader that begins at the source's first row.
        tokenise: makes the arrays of a window, or finds those that another process made.
        rows_of: makes samples or packs of them; the window's number comes with it.
        fingerprint: of all that decides what the rows are.
        n_rows: how many rows (samples or packs) an epoch has; None until the source's end was seen.
    """

    def __init__(
        self,
        reader: Callable[[], WindowReader],
        tokenise: Callable[[WindowOfRows], Store],
        rows_of: Callable[[Store, int], Rows],
        fingerprint: str,
    ):
        self._reader, self._tokenise, self._rows_of, self._fingerprint = reader, tokenise, rows_of, fingerprint
        self._firsts = {0: 0}  # by window: how many rows come before it, as far as that is known
        self.n_rows: int | None = None

    def windows(self, epoch: int, seed: int, *, shuffle: bool, start: int) -> Iterator[Window]:
        """The windows of an epoch, from the one with row ``start`` on.

        Windows before it are not even tokenised where a checkpoint has told how many rows they have (``go_to``).
        """
        reader = self._reader()
        number = max(k for k, first in self._firsts.items() if first <= start)
        first = self._firsts[number]
        opened = self._open(reader, number)
        while opened is not None:
            rows, built = opened
            ahead = _Ahead(lambda k: self._open(reader, k), number + 1, 0.0 if built else _HEAD_START_S)
            n = len(rows)
            self._firsts[number + 1] = first + n
            try:
                if first + n > start:
                    yield Window(first, rows, permutation(n, seed, epoch, number) if shuffle else np.arange(n))
            except BaseException:  # whoever asked for windows has had enough of them
                ahead.abandon()
                raise
            number, first = number + 1, first + n
            del rows, opened  # a window goes with the last who has rows of it
            opened = ahead.take()
        self.n_rows = first

    def place(self, position: int) -> Mapping[str, int | None]:
        """Where row ``position`` of an epoch is: a window, and how many rows come before that."""
        number = max(k for k, first in self._firsts.items() if first <= position)
        return {"window": number, "rows_before": self._firsts[number], "rows_per_epoch": self.n_rows}

    def go_to(self, place: Mapping[str, int | None]) -> None:
        """Know again what ``place`` told."""
        window, before = place["window"], place["rows_before"]
        assert window is not None
        assert before is not None
        self._firsts[window] = before
        self.n_rows = place["rows_per_epoch"]

    def fingerprint(self) -> str:
        """sha256 in hex of all that decides what training sees; not of the rows themselves, which nobody has read."""
        return self._fingerprint

    def _open(self, reader: WindowReader, number: int) -> tuple[Rows, bool] | None:
        """Rows of a window, and whether it was made here; None after the last."""
        store = self._tokenise(reader.window(number))
        if not store.facts["rows_read"]:
            return None
        return self._rows_of(store, number), store.built_here


class _GivenUpError(Exception):
    """Nobody wants the window any more."""


class _Ahead(threading.Thread):
    """Opens a window beside the training; no daemon, which may not be in foreign code when the interpreter ends."""

    def __init__(self, open_window: Callable[[int], tuple[Rows, bool] | None], number: int, delay_s: float):
        super().__init__(name="next window")
        self._open, self._number, self._delay_s = open_window, number, delay_s
        self._wanted = threading.Event()
        self._abandoned = False
        self._error: BaseException | None = None
        self._opened: tuple[Rows, bool] | None = None
        self.start()

    @property
    def given_up(self) -> bool:
        """Whether what is under way is for nobody; the main thread counts as dead once the interpreter ends."""
        return self._abandoned or not threading.main_thread().is_alive()

    def run(self) -> None:
        until = time.monotonic() + self._delay_s
        while time.monotonic() < until and not self.given_up and not self._wanted.wait(0.1):
            pass
        try:
            if not self.given_up:
                self._opened = self._open(self._number)
        except BaseException as error:  # raised where the window is needed
            self._error = error

    def abandon(self) -> None:
        """Go no further than the rows at hand."""
        self._abandoned = True

    def take(self) -> tuple[Rows, bool] | None:
        """What was opened, when it is.

        Raises:
            DataError: what is wrong with the window.
        """
        self._wanted.set()
        self.join()
        if self._error is not None:
            raise self._error
        opened, self._opened = self._opened, None
        return opened


def while_wanted(label: str, size: int) -> AbstractContextManager[Callable[[int], Any]]:  # noqa: ARG001 - as a bar is called
    """In place of a bar, for a window that is made beside the training: ends the work when nobody wants it."""

    def check(_: int) -> None:
        thread = threading.current_thread()
        if isinstance(thread, _Ahead) and thread.given_up:
            raise _GivenUpError

    return nullcontext(check)
