"""Starts the processes of a run on this machine, through torch's elastic launcher, and says why one failed."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ftlab.distributed.base import Workers
from ftlab.distributed.board import Board, Failure
from ftlab.distributed.env import pick_device, share_cores
from ftlab.distributed.meeting import HERE, attempt, board_path, interface_of, loopback_store
from ftlab.distributed.started import addresses, leads
from ftlab.errors import ConfigError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)  # passed on to workers


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
    os.environ |= {"MASTER_ADDR": HERE, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
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
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(HERE))
        options |= {"rdzv_endpoint": f"{HERE}:{store.port}", "local_addr": HERE, "rdzv_configs": {"is_host": False}}
        return LaunchConfig(**options, run_id=uuid.uuid4().hex)
    assert settings.rdzv_endpoint is not None
    # gloo would take the address that the host's own name stands for, often one that other machines cannot reach.
    local_address = _address_towards(settings.rdzv_endpoint)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(local_address))
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


def leave(exit_code: int) -> NoReturn:
    """End this process now: after a failure, the clean-up of a broken process group may hang or abort."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
