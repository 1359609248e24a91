"""Processes of one run: started here through torch's elastic launcher, or joined where others started them.

Before training, ranks talk through the store at which they meet, and by files on their machine: who waits there
waits for as long as it takes, where a collective would time out. ``heartbeat.Watch`` ends the waiting when a rank
is gone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, cast

import psutil
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ftlab.distributed.base import Workers
from ftlab.distributed.board import Board, Failure, RankError
from ftlab.distributed.env import WorkerEnv, pick_device, share_cores
from ftlab.distributed.heartbeat import Watch
from ftlab.distributed.started import Group, addresses, leads
from ftlab.errors import ConfigError

_POLL_S = 0.02
_GOODBYE_S = 5.0
_MEETING = timedelta(minutes=10)
_HERE = "127.0.0.1"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)  # passed on to workers


# -------------------------------------------------------------------------------------------- starting workers


def n_local_workers(settings: Workers, device_name: str) -> int:
    """How many processes this machine starts: as many as it has GPUs, or one on a CPU, unless the number is given."""
    if settings.nproc_per_node is not None:
        return settings.nproc_per_node
    return torch.cuda.device_count() if pick_device(device_name).type == "cuda" else 1


def start_workers(
    settings: Workers, n_local: int, scratch: Path, work: Callable[..., None], *args: Any
) -> dict[int, int]:
    """Run ``work(*args)`` in ``n_local`` processes of this machine, together with those of the other machines.

    Returns:
        The exit code of each worker that failed first, by local rank, a negated signal if one killed it; empty when
        none did. A death signal to this process itself counts as that of local rank -1.

    Raises:
        ConfigError: when the machines do not meet.
        KeyboardInterrupt: after Ctrl-C, once all workers are gone.
    """
    share_cores(n_local)
    # What went wrong is said by the worker it went wrong in; torch's account of it is pages long.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    store = None if settings.rdzv_endpoint else loopback_store()
    if store is not None:
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # no store of torch's own beside ours
        work, args = _at_store, (store.port, work, *args)
    try:
        elastic_launch(_launch_config(settings, n_local, scratch, store), work)(*args)
    except ChildFailedError as error:
        return {failure.local_rank: failure.exitcode for failure in error.failures.values()}
    except SignalException as received:
        if received.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return {-1: -received.sigval}
    except RendezvousError as error:
        raise ConfigError(
            "parallelism.rdzv_endpoint",
            f"the {settings.nnodes} machines did not meet at {settings.rdzv_endpoint}: {error}",
            f"the same command on all {settings.nnodes} machines, and a port that is free and open between them",
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return {}


def _at_store(port: int, work: Callable[..., None], *args: Any) -> None:
    """``work`` in a worker that finds the others at the launcher's store."""
    os.environ |= {"MASTER_ADDR": _HERE, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    work(*args)


def _launch_config(settings: Workers, n_local: int, scratch: Path, store: dist.TCPStore | None) -> LaunchConfig:
    options: dict[str, Any] = {
        "min_nodes": settings.nnodes,
        "max_nodes": settings.nnodes,
        "nproc_per_node": n_local,
        "rdzv_backend": "c10d",
        "max_restarts": settings.max_restarts,
        "monitor_interval": 0.1,
        "start_method": "spawn",
        "signals_to_handle": ",".join(number.name for number in _SIGNALS),
        "logs_specs": DefaultLogsSpecs(log_dir=str(scratch)),  # else torch makes a folder of its own and leaves it
    }
    if any(field.name == "shutdown_timeout" for field in dataclasses.fields(LaunchConfig)):
        # Seconds from SIGTERM to SIGKILL, in which ranks finish their step and save; before torch 2.13 always 30.
        # Those of a broken job do not take them: heartbeat.py sees to it.
        options["shutdown_timeout"] = 600
    if store is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(_HERE))
        options |= {"rdzv_endpoint": f"{_HERE}:{store.port}", "local_addr": _HERE, "rdzv_configs": {"is_host": False}}
        return LaunchConfig(**options, run_id=uuid.uuid4().hex)
    assert settings.rdzv_endpoint is not None
    # gloo would take the address that the host's own name stands for, often one that other machines cannot reach.
    local_address = _address_towards(settings.rdzv_endpoint)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(local_address))
    return LaunchConfig(
        **options,
        run_id="ftlab",
        rdzv_endpoint=settings.rdzv_endpoint,
        local_addr=local_address,
        rdzv_configs={
            "is_host": leads(settings.nnodes, settings.rdzv_endpoint),
            "timeout": settings.timeout_s,
            "join_timeout": settings.timeout_s,
            "read_timeout": settings.timeout_s,
        },
    )


def _address_towards(endpoint: str) -> str:
    """The address from which this machine reaches the endpoint; nothing is sent."""
    family, address = addresses(endpoint)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _interface(address: str) -> str:
    """The network interface that has ``address``."""
    for name, found in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in found):
            return name
    raise ConfigError("parallelism.rdzv_endpoint", f"no network interface of this machine has {address}")


def first_failure(scratch: Path, settings: Workers, n_local: int, failed: dict[int, int]) -> Failure:
    """Why workers of this machine failed, from what they left in ``scratch`` or else from their exit codes."""
    boards = (board_path(scratch, number) for number in range(settings.max_restarts, -1, -1))
    board = next((Board(path, n_local) for path in boards if path.exists()), None)
    told = board.failure() if board else None
    killed = {rank: -code for rank, code in failed.items() if code < 0}
    # Told to go, a rank cannot know why; that another one was killed explains it.
    if told is not None and not (told.kind.startswith("SIG") and killed):
        return told
    local_rank, number = next(iter(killed.items()), (next(iter(failed)), 0))
    name = signal.Signals(number).name if number else ""
    if local_rank < 0:
        message, exit_code = f"stopped by {name}", 128 + number
        return Failure(rank=0, step=0, phase="", kind=name, message=message, exit_code=exit_code)
    last = board.read(local_rank) if board else None
    rank, step, phase = (last.rank, last.step, last.phase) if last else (local_rank, 0, "start")
    end = f"was killed by {name}" if number else f"ended with exit code {failed[local_rank]}"
    message = f"rank {rank}, last in step {step}, phase {phase}, {end}"
    return Failure(rank=rank, step=step, phase=phase, kind="Lost", message=message, exit_code=1)


def last_word(scratch: Path, n_local: int) -> int | None:
    """The exit code of the attempt before this one, if starting again cannot help: bad input, bad numbers, Ctrl-C."""
    path = board_path(scratch, attempt() - 1)
    failure = Board(path, n_local).failure() if path.exists() else None
    return failure.exit_code if failure is not None and failure.exit_code != 1 else None


# ---------------------------------------------------------------------------------------------- meeting


def open_store(group: Group) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT: the launcher's own where it has one, else hosted by rank 0.

    Raises:
        ConfigError: when it cannot be hosted or reached there, naming the variable.
    """
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if group.local_world_size == group.world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(_HERE))  # gloo listens there too
        if not launchers:
            os.environ["MASTER_ADDR"] = _HERE
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError("MASTER_PORT", f"must be a port, 1 to 65535, got {port!r}")
    try:
        if address == _HERE and not launchers and group.rank == 0:
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
        listening.bind((_HERE, port))
        listening.listen(128)
        port = listening.getsockname()[1]
        return dist.TCPStore(
            _HERE, port, is_master=True, timeout=_MEETING, wait_for_workers=False, master_listen_fd=listening.detach()
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


def leave(exit_code: int) -> NoReturn:
    """End this process now: after a failure, the clean-up of a broken process group may hang or abort."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
