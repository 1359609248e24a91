"""Where the processes of a run meet, whoever started them.

Before training, ranks talk through the store at which they meet, and by files on their machine: who waits there
waits for as long as it takes, where a collective would time out. ``heartbeat.Watch`` ends the waiting when a rank
is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import psutil
import torch.distributed as dist

from ftlab.distributed.board import Board, Failure, RankError
from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.heartbeat import Watch
from ftlab.distributed.started import Group
from ftlab.errors import ConfigError

_POLL_S = 0.02
_GOODBYE_S = 5.0
_MEETING = timedelta(minutes=10)
HERE = "127.0.0.1"


def open_store(group: Group) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT: the launcher's own where it has one, else hosted by rank 0.

    Raises:
        ConfigError: when it cannot be hosted or reached there, naming the variable.
    """
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if group.local_world_size == group.world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(HERE))  # gloo listens there too
        if not launchers:
            os.environ["MASTER_ADDR"] = HERE
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError("MASTER_PORT", f"must be a port, 1 to 65535, got {port!r}")
    try:
        if address == HERE and not launchers and group.rank == 0:
            store: dist.Store = loopback_store(int(port))
        else:
            store, _, _ = next(dist.rendezvous("env://", group.rank, group.world_size, timeout=_MEETING))
    except (OSError, dist.DistError) as error:
        told = str(error).partition("\n")[0]
        if group.rank == 0 and not launchers:
            fix = "a port that nobody listens on, the same for all ranks"
            raise ConfigError("MASTER_PORT", f"rank 0 cannot listen on port {port}: {told}", fix) from error
        raise ConfigError("MASTER_ADDR", f"rank 0 cannot be reached at {address}:{port}: {told}") from error
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # it is there now: processes of this one's only connect
    return store


def loopback_store(port: int = 0) -> dist.TCPStore:
    """A store that only this machine can reach.

    torch's own listens on every address of the machine, and whoever can reach it can change what ranks read there.

    Raises:
        OSError: when the port is taken.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HERE, port))
        listening.listen(128)
        port = listening.getsockname()[1]
        return dist.TCPStore(
            HERE, port, is_master=True, timeout=_MEETING, wait_for_workers=False, master_listen_fd=listening.detach()
        )


def meet(worker: WorkerEnv, group: Group, *, leads: bool) -> WorkerEnv:
    """``worker`` with the store of its run, and with ranks counted from the machine that ``leads``.

    torch numbers machines by their addresses; the run's folder is on the one that the others were pointed to.
    """
    store = dist.PrefixStore(f"run/{attempt()}", open_store(group))
    if leads and group.local_rank == 0:
        store.set("first", str(group.rank))
    first = int(wait_for(store, "first"))
    return replace(worker, rank=(group.rank - first) % group.world_size, store=store)


def wait_for(store: dist.Store, key: str) -> str:
    """The value of ``key``, once somebody has set it."""
    while not store.check([key]):
        time.sleep(_POLL_S)
    return store.get(key).decode()


class Jobs:
    """How ranks that others started learn what to run: rank 0 composes it and hands it out.

    A process of theirs may run one job after another, or in turn be one of a sweep's: so this is a conversation,
    and each job has a part of the store of its own.
    """

    def __init__(self, group: Group):
        self._group, self._attempt = group, attempt()
        self._server = open_store(group)
        self._store = dist.PrefixStore(f"jobs/{self._attempt}", self._server)
        self._number = 0

    def hand_out(self, job: dict[str, Any]) -> int:
        """Tell the other ranks of ``job``; returns its number."""
        self._store.set(str(self._number), json.dumps(job))
        self._number += 1
        return self._number - 1

    def take(self) -> tuple[dict[str, Any], int]:
        """The next job, once rank 0 has handed it out, and its number."""
        number, self._number = self._number, self._number + 1
        return json.loads(wait_for(self._store, str(number))), number

    def end(self, exit_code: int) -> None:
        """Send the other ranks home; the store may be this process's, so wait until they have heard."""
        self.hand_out({"exit_code": exit_code})
        deadline = time.monotonic() + _GOODBYE_S
        while self._store.add("gone", 0) < self._group.world_size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def go(self) -> None:
        """Say that this rank has heard the end."""
        self._store.add("gone", 1)


def job_store(group: Group, number: int) -> dist.Store:
    """The part of the store that belongs to one job."""
    return dist.PrefixStore(f"job/{attempt()}/{number}", open_store(group))


def attempt() -> int:
    """How many times the workers of this run were started before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@dataclass(kw_only=True)
class Team:
    """The ranks of one run, as one of them sees them.

    Attributes:
        worker: this rank.
        scratch: a folder of this machine's ranks, which goes with them.
        watch: its eye on the others.
    """

    worker: WorkerEnv
    scratch: Path
    watch: Watch

    def wait_for_neighbours(self) -> None:
        """Return once all ranks of this machine watch each other: from then on none can be lost unnoticed."""
        board = self.watch.board
        while any(board.read(i) is None for i in range(board.n_ranks)):
            time.sleep(_POLL_S)

    def wait_for_all(self, phase: str) -> None:
        """Return once every rank has come as far as ``phase``.

        For what waits in native code, which no signal and no failure ends: whoever has a reason to stop says so here,
        and does not leave the others waiting there.

        Raises:
            RankError: some rank, or this one, has to stop.
        """
        self.watch.beat(0, phase)
        here, n_ranks = self._store.add(phase, 1), self.worker.world_size
        all_here = -(-here // n_ranks) * n_ranks  # where they meet again, those of the last time are counted, too
        while self._store.add(phase, 0) < all_here:
            self.watch.beat(0, phase)  # only while one is missing: once all are there, none may turn back
            time.sleep(_POLL_S)

    def from_first(self, key: str, text: str | None) -> str:
        """Rank 0's ``text``, on every rank."""
        store = self._store
        if self.worker.rank == 0:
            assert text is not None
            store.set(key, text)
        return wait_for(store, key)

    @property
    def _store(self) -> dist.Store:
        assert self.worker.store is not None
        return self.worker.store


@contextmanager
def meet_team(
    worker: WorkerEnv, scratch: Path | None, timeout_s: int, on_stuck: Callable[[RankError], None]
) -> Iterator[Team]:
    """Meet the other ranks, and watch them until the end.

    Args:
        worker: with the store where they meet.
        scratch: a folder that this machine's ranks share and somebody else removes; None: theirs to make and remove.
        on_stuck: see ``Watch``.
    """
    store = worker.store
    assert store is not None
    ours = scratch is None
    machine = f"machine/{worker.rank - worker.local_rank}"
    if worker.local_rank == 0:
        scratch = scratch or Path(tempfile.mkdtemp(prefix="ftlab-"))
        Board.create(board_path(scratch, attempt()), worker.local_world_size)
        store.set(machine, str(scratch))
    scratch = Path(wait_for(store, machine))
    messages = cast(Any, store).clone()  # a connection of the watch's own: the main thread's may be busy waiting

    def publish(failure: Failure) -> None:
        _quietly(lambda: messages.set("failure", json.dumps(asdict(failure))))

    def elsewhere() -> Failure | None:
        text = _quietly(lambda: messages.get("failure") if messages.check(["failure"]) else None)
        return Failure(**json.loads(text)) if text else None

    def clean() -> None:
        # After a failure whoever is left does it: what is mapped into memory stays there.
        if watch.is_orphan() or (ours and (worker.local_rank == 0 or board.failure() is not None)):
            shutil.rmtree(scratch, ignore_errors=True)

    def give_up(error: RankError) -> None:
        on_stuck(error)
        clean()

    board = Board(board_path(scratch, attempt()), worker.local_world_size)
    watch = Watch(
        board,
        rank=worker.rank,
        local_rank=worker.local_rank,
        timeout_s=timeout_s,
        on_stuck=give_up,
        publish=publish,
        elsewhere=elsewhere,
    )
    try:
        with watch:
            yield Team(worker=worker, scratch=scratch, watch=watch)
    finally:
        clean()


def board_path(scratch: Path, number: int) -> Path:
    """Where the board of the ``number``-th attempt is."""
    return scratch / f"board.{number}"


def _quietly(ask: Callable[[], Any]) -> Any:
    """What the store answers; None when it is gone, as it may be when machines are."""
    try:
        return ask()
    except (RuntimeError, ValueError):
        return None


def interface_of(address: str) -> str:
    """The network interface that has ``address``."""
    for name, found in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in found):
            return name
    raise ConfigError("parallelism.rdzv_endpoint", f"no network interface of this machine has {address}")
