"""What a process asks of the run (to stop, to save), and how all ranks come to agree on it.

A signal may reach one rank only, and clocks differ. So wishes travel with the counts that every step sums over the
ranks anyway: all ranks read the same sum, and act after the same step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftlab.distributed.base import Parallelism
from ftlab.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
N_WISHES = 1 + len(STOPPING)
_SAME_S = 1.0  # signals this close are one wish: a terminal's Ctrl-C reaches a worker directly and through its starter


@dataclass(frozen=True)
class Agreed:
    """What at least one rank wished for, known to all.

    Attributes:
        stop: save and stop after this step, for this signal.
        save: save after this step.
    """

    stop: signal.Signals | None
    save: bool


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Raise `Interrupted` on SIGTERM and SIGUSR1, as Python does on Ctrl-C; only a main thread can.

    Afterwards all handlers are what they were, also where `ignore_signals` was called.
    """

    def end(number: int, _: object) -> None:
        raise Interrupted(number)

    with _handling(end, STOPPING[1:]):
        yield


def ignore_signals() -> None:
    """Take no further word: the run is being closed."""
    with suppress(ValueError):  # only a main thread can
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def deferring_signals() -> Iterator[None]:
    """Take signals that come within only afterwards.

    For tensors whose sizes and operations are Python's: C++ asks them where it cannot pass an exception on, and
    one that a handler raised there would end the process without a word.
    """
    came: list[int] = []
    try:
        with _handling(lambda number, _: came.append(number), STOPPING):
            yield
    finally:
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


@contextmanager
def _handling(handler: Callable[[int, Any], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}  # all: `ignore_signals` may come in between
    for number in numbers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Wishes:
    """This rank's wishes, and all ranks' once they are summed.

    SIGINT, SIGTERM and SIGUSR1 ask the run to finish its step, save and stop. Ctrl-C for the third time does not
    ask: it interrupts.

    Args:
        device: where sums arrive.
        save_is_due: asked once a step; true on one rank is enough.
    """

    def __init__(self, device: torch.device, save_is_due: Callable[[], bool] = lambda: False):
        self.save_is_due = save_is_due
        self._on_gpu = device.type == "cuda"
        self._received: signal.Signals | None = None
        self._interrupts, self._last_interrupt = 0, -_SAME_S
        self._underway: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as wishes; only a main thread can."""
        with _handling(self._note, STOPPING):
            yield

    def _note(self, number: int, _: object) -> None:
        self._received = self._received or signal.Signals(number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._last_interrupt > _SAME_S:
                self._interrupts += 1
            self._last_interrupt = now
            if self._interrupts > 2:
                raise KeyboardInterrupt

    def mine(self) -> list[int]:
        """``N_WISHES`` numbers to sum over ranks: whether to save, and for each signal whether to stop."""
        return [int(self.save_is_due()), *(int(self._received == number) for number in STOPPING)]

    def agreed_now(self, parallel: Parallelism) -> Agreed:
        """What the ranks wish at this moment; a collective, which waits."""
        return _read(parallel.sum(torch.tensor(self.mine(), device=parallel.device)))

    def agreed(self, summed: Tensor) -> Agreed:
        """What the ranks wish, by the sum of their wishes (``N_WISHES``,) int64 on the device.

        On CUDA this is the sum of the step before: this step's is still being computed, and waiting for it would
        leave the device without work.
        """
        if self._on_gpu:
            host = torch.empty(N_WISHES, dtype=summed.dtype, pin_memory=True).copy_(summed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._underway.append((host, arrived))
            if len(self._underway) < 2:
                return Agreed(None, False)
            summed, arrived = self._underway.popleft()
            arrived.synchronize()
        return _read(summed)


def _read(summed: Tensor) -> Agreed:
    save, *stops = summed.tolist()
    stop = next((number for number, asked in zip(STOPPING, stops, strict=True) if asked), None)
    return Agreed(stop, bool(save))
