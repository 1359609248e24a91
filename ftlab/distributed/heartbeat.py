"""Who of this machine's ranks is alive, and what it was doing when it no longer was.

Every rank writes its step and phase on the board: a small file that all ranks of the machine have mapped into memory,
which costs nothing, and survives the rank. A thread of every rank watches the others: when one has died or fallen
silent, the survivors stop within seconds, and the first to know says why, once.
"""

from __future__ import annotations

import _thread
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import psutil
import torch

from ftlab import ctrl_c
from ftlab.distributed.board import Board, Failure, Pulse, RankError
from ftlab.errors import FtlabError

_LOST = "Lost"
_STOPPED = "Stopped"  # all ranks ended in good order, when asked to: nobody's failure, but no reason to start again
_POLL_S = 0.1
_SAME_S = 1.0  # a terminal's Ctrl-C reaches a worker twice: directly and through its starter
_CULPRIT_S = 1.0  # how long a rank whose exchange broke waits to learn who broke it
_CLOSE_LOST_S = 1.5  # how long a rank may take to close its files once another is lost
_CLOSE_S = 8.0  # the same after Ctrl-C or an error that a rank could tell of itself
_NOTICE = 1 / 4  # of that time, for the main thread to come to its next `beat` before it is interrupted


class Watch:
    """This rank's entry on the board and its eye on the others; a context around all that a rank does.

    Args:
        board: of this machine.
        rank, local_rank: this process's.
        timeout_s: a rank that shows no sign of life for so long is lost.
        on_stuck: called with the reason when this process has to stop and its main thread does not come back
            from wherever it is; the process ends right after.
        publish, elsewhere: tell the other machines of a failure; ask whether they have told of one.
    """

    def __init__(
        self,
        board: Board,
        *,
        rank: int,
        local_rank: int,
        timeout_s: float,
        on_stuck: Callable[[RankError], None],
        publish: Callable[[Failure], None],
        elsewhere: Callable[[], Failure | None],
    ):
        self.board, self.rank, self.local_rank, self.timeout_s = board, rank, local_rank, timeout_s
        self._on_stuck, self._publish, self._elsewhere = on_stuck, publish, elsewhere
        self._step, self._phase, self._left, self._count = 0, "start", 0, 0
        self._still: dict[int, tuple[int, float]] = {}  # local rank: its last pulse, seconds for which that stood still
        self._closing, self._interrupted_at = False, math.inf
        self._heard: signal.Signals | None = None  # by a handler of this class, which means: not by the loop's
        self.leaves_signals = False
        """Whether signals are somebody else's: the loop's, which saves before it stops."""
        self._lock = threading.Lock()
        self._parent = os.getppid()
        self._wake, self._signals = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._wake.setblocking(False)
        self._signals.setblocking(False)
        # A byte arrives at once; a handler only when the main thread is back in Python, which may be never.
        self._handlers = {
            signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt),
            # SIGTERM mostly means that another rank failed: the thread finds out, and stops this one in good order.
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._hear),
            signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._hear),
        }
        # Where Python drops an interrupt, as in a callback of the garbage collector, the next `beat` raises.
        self._hook, sys.unraisablehook = sys.unraisablehook, ctrl_c.tell_of_others
        self._wakeup_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._beat()  # now that no signal ends this rank without a word, the others may count on it
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left = 1
        self._beat()
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook
        self._wake.close()
        self._signals.close()

    def beat(self, step: int, phase: str) -> None:
        """Say what this rank is about to do.

        Raises:
            RankError: there is a reason to stop instead. A good place for it: an interrupt may find the main thread
                in native code that calls Python and does not expect an exception, which ends the process.
        """
        self._step, self._phase = step, phase
        self._beat()
        if not self._closing and (failure := self.board.failure()) is not None and failure.kind != _STOPPED:
            self._closing = True
            raise RankError(failure)

    def stopped(self, exit_code: int) -> None:
        """Note that this rank stops in good order with all others, because someone asked for it."""
        self.leaves_signals = self._closing = True
        self._claim(self._failure(_STOPPED, "stopped as asked, and saved", exit_code))

    def _beat(self) -> None:
        with self._lock:
            self._count += 1
            self.board.write(
                self.local_rank, Pulse(self.rank, os.getpid(), self._left, self._count, self._step, self._phase)
            )

    # --------------------------------------------------------------------------------- what went wrong

    def explain(self, error: BaseException) -> BaseException:
        """Why this rank stops: another rank's failure if that came first, else ``error``, which is then the first.

        An exchange that broke is nobody's own failure: whose it is shows within moments, here or elsewhere.
        """
        self._closing = True
        patience = _CULPRIT_S if _may_be_anothers(error) else 0.0
        deadline = time.monotonic() + patience
        failure = self.board.failure()
        while failure is None and time.monotonic() < deadline:
            time.sleep(_POLL_S / 2)
            failure = self.board.failure() or self._elsewhere()
        if failure is None:
            message, exit_code = str(error), getattr(error, "exit_code", 1)
            if isinstance(error, KeyboardInterrupt):
                message, exit_code = "interrupted", 130
            elif not isinstance(error, FtlabError):
                trace = "".join(traceback.format_exception(error)).rstrip()
                message = f"rank {self.rank} failed in step {self._step}, phase {self._phase}:\n{trace}"
            self._claim(self._failure(type(error).__name__, message, exit_code))
            failure = self.board.failure()
        if failure is None or failure.kind == type(error).__name__:
            return error
        return RankError(failure)

    def is_orphan(self) -> bool:
        """Whether the process that started this one is gone."""
        return os.getppid() != self._parent

    def is_first(self, without: int | None = None) -> bool:
        """Whether this rank is the first of this machine's that are alive, ``without`` one that is lost."""
        pulses = [self.board.read(i) for i in range(self.local_rank) if i != without]
        return not any(pulse is not None and _is_alive(pulse.pid) for pulse in pulses)

    def takes_the_word(self) -> bool:
        """Whether it falls to this rank to tell the user, on this machine's terminal; true once."""
        return self.is_first() and self.board.take_the_word()

    def _failure(self, kind: str, message: str, exit_code: int, of: Pulse | None = None) -> Failure:
        rank, step, phase = (of.rank, of.step, of.phase) if of else (self.rank, self._step, self._phase)
        return Failure(rank=rank, step=step, phase=phase, kind=kind, message=message, exit_code=exit_code)

    def _claim(self, failure: Failure) -> None:
        if self.board.claim(failure):
            self._publish(failure)

    def _hear(self, number: int, _: object) -> None:
        self._heard = signal.Signals(number)

    def _interrupt(self, number: int, frame: object) -> None:
        """SIGINT, by Ctrl-C or by the thread: the first Ctrl-C leaves the main thread time for its next `beat`."""
        self._hear(number, frame)
        again = time.monotonic() > self._interrupted_at + _SAME_S
        self._interrupted_at = min(self._interrupted_at, time.monotonic())
        if not self._closing and (again or self.board.failure() is not None):
            raise KeyboardInterrupt  # not while closing, which it would tear

    # -------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        stop_by, interrupt_at, signalled_at, received = math.inf, math.inf, math.inf, signal.SIGTERM
        before = time.monotonic()
        while not self._left:
            select.select([self._signals], [], [], _POLL_S)
            now = time.monotonic()
            self._beat()
            if self.is_orphan() and self.board.failure() is None:
                self._claim(self._failure(_LOST, "the process that started the ranks is gone", 1))
            with suppress(BlockingIOError):
                arrived = signal.Signals(self._signals.recv(64)[0])
                if not self.leaves_signals:
                    received, signalled_at = arrived, min(now, signalled_at)
            if self._heard is not None:  # also where `leaves_signals` came first, and the loop's handler later
                received, signalled_at, self._heard = self._heard, min(now, signalled_at), None
            # Time in which this rank was stopped itself (Ctrl-Z, fg) is nobody's silence.
            self._look_around(min(now - before, 5 * _POLL_S))
            before = now
            if self._count % 5 == 0 and (told := self._elsewhere()) is not None:
                self.board.claim(told)
            failure = self.board.failure()
            if failure is not None and failure.kind == _STOPPED:
                continue
            if failure is not None and stop_by == math.inf:
                time_left = _CLOSE_LOST_S if failure.kind == _LOST else _CLOSE_S
                stop_by, interrupt_at = now + time_left, now + _NOTICE * time_left
            elif failure is None and now > signalled_at + _CULPRIT_S / 2:  # no failure made anyone send the signal
                signalled_at = math.inf
                if self.leaves_signals:  # it came before the loop listened
                    os.kill(os.getpid(), received)
                else:
                    self._stop_on(received)
            if now > interrupt_at:
                interrupt_at = math.inf
                _thread.interrupt_main()  # it may be in a loop that waits for the lost one
            if failure is not None and now > stop_by:
                self._on_stuck(RankError(failure))
                os._exit(failure.exit_code)

    def _look_around(self, passed_s: float) -> None:
        """Report a rank of this machine that died or fell silent; of several witnesses, the first rank does."""
        for i in range(self.board.n_ranks):
            pulse = self.board.read(i)
            if i == self.local_rank or pulse is None or pulse.left:
                continue
            last, still_s = self._still.get(i, (0, 0.0))
            self._still[i] = (pulse.pulse, still_s + passed_s if pulse.pulse == last else 0.0)
            if not _is_alive(pulse.pid):
                end = "died without a word: it was killed, or it crashed in native code"
            elif self._still[i][1] > self.timeout_s:
                end = f"showed no sign of life for {self.timeout_s:g} s and was ended"
            else:
                continue
            if self.board.failure() is None and self.is_first(without=i):
                where = f"step {pulse.step}, phase {pulse.phase}"
                self._claim(self._failure(_LOST, f"rank {pulse.rank}, last in {where}, {end}", 1, of=pulse))
                with suppress(ProcessLookupError):
                    os.kill(pulse.pid, signal.SIGKILL)  # a stopped process would not act on anything less

    def _stop_on(self, received: signal.Signals) -> None:
        missing = [i for i in range(self.board.n_ranks) if self.board.read(i) is None]
        if received == signal.SIGINT:
            failure = self._failure("KeyboardInterrupt", "interrupted", 130)
        elif missing:  # it is why this rank is told to go
            ranks = ", ".join(str(self.rank - self.local_rank + i) for i in missing)
            failure = self._failure(_LOST, f"rank {ranks} ended before it had begun", 1)
        else:
            failure = self._failure(received.name, f"stopped by {received.name}", 128 + received)
        self._claim(failure)


def _may_be_anothers(error: BaseException) -> bool:
    """Whether this looks like a broken exchange; torch raises RuntimeError for those, and for much else."""
    return isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError | NotImplementedError)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
