"""What the ranks of one machine write for each other to read: who is alive, what it does, what went wrong first."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ftlab.errors import FtlabError

_RECORD = struct.Struct("iiiqq16s")  # rank, pid, whether it has left in order, pulse, step, phase
_SLOT = 64  # bytes per rank
_FAILURE = 64 * 1024  # bytes for the first failure, a JSON object


class Pulse(NamedTuple):
    """What one rank last wrote."""

    rank: int
    pid: int
    left: int
    pulse: int  # counts up for as long as the process runs
    step: int
    phase: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a group of ranks stopped: the first thing that went wrong on this machine."""

    rank: int
    step: int
    phase: str
    kind: str
    message: str
    exit_code: int

    @property
    def interrupted(self) -> bool:
        """Whether someone wanted it so: Ctrl-C, SIGTERM."""
        return self.exit_code > 128


class RankError(FtlabError):
    """A rank is gone, or another one's failure ended this one; says which, where it was, and why."""

    def __init__(self, failure: Failure):
        self.failure = failure
        self.exit_code = failure.exit_code
        super().__init__(failure)

    def __str__(self) -> str:
        return self.failure.message


class Board:
    """The file in memory: one record per local rank, a place for the first failure, and whether it was told."""

    def __init__(self, path: Path, n_ranks: int):
        self.n_ranks = n_ranks
        self._file = path.open("r+b")
        self._memory = mmap.mmap(self._file.fileno(), n_ranks * _SLOT + _FAILURE + 1)
        self._threads = threading.Lock()

    @classmethod
    def create(cls, path: Path, n_ranks: int) -> Board:
        """A new board; the other ranks open it by its path."""
        aside = path.with_suffix(".tmp")
        aside.write_bytes(bytes(n_ranks * _SLOT + _FAILURE + 1))
        os.replace(aside, path)
        return cls(path, n_ranks)

    def write(self, local_rank: int, pulse: Pulse) -> None:
        """Set one rank's record; each rank writes only its own."""
        record = _RECORD.pack(*pulse[:5], pulse.phase.encode())
        self._memory[local_rank * _SLOT : local_rank * _SLOT + _RECORD.size] = record

    def read(self, local_rank: int) -> Pulse | None:
        """One rank's record; None before it has written any."""
        *numbers, phase = _RECORD.unpack_from(self._memory, local_rank * _SLOT)
        rank, pid, left, pulse, step = numbers
        return Pulse(rank, pid, left, pulse, step, phase.rstrip(b"\0").decode()) if pid else None

    def claim(self, failure: Failure) -> bool:
        """Put ``failure`` down as the first; False when there is one already."""
        text = json.dumps(asdict(failure)).encode()
        if len(text) > _FAILURE:
            text = json.dumps(asdict(failure) | {"message": failure.message[-_FAILURE // 8 :]}).encode()
        with self._locked():
            if self.failure() is not None:
                return False
            start = self.n_ranks * _SLOT
            self._memory[start : start + len(text)] = text
            return True

    def take_the_word(self) -> bool:
        """Whether nobody has told the user of the failure yet, which falls to the caller then."""
        with self._locked():
            told, self._memory[-1:] = self._memory[-1:], b"t"
            return told != b"t"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The file's lock holds off other processes, the other one this process's other thread.
        with self._threads:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def failure(self) -> Failure | None:
        """The first failure; None as long as there is none."""
        text = self._memory[self.n_ranks * _SLOT : -1].rstrip(b"\0")
        try:
            return Failure(**json.loads(text)) if text else None
        except ValueError:  # half written: there will be one in a moment
            return None
