"""Which place this process and this machine have in a run. No torch in here: train.py asks before anything else."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping
from typing import Any, NamedTuple

from ftlab.errors import ConfigError

# What torchrun sets for every process that it starts.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Group(NamedTuple):
    """This process's place in its group, under the names of ``WorkerEnv``."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def group_of_this_process() -> Group | None:
    """The place in its group that the environment gives this process; None where nobody else started it.

    Raises:
        ConfigError: for a description that is incomplete or contradicts itself, naming the variable.
    """
    _from_slurm(os.environ)
    given = [name for name in _TORCHRUN if os.environ.get(name)]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(given):  # MASTER_ADDR alone is some user's habit
        return None
    missing = [name for name in _TORCHRUN if name not in given]
    if missing:
        raise ConfigError(
            missing[0],
            f"is not set, though {given[0]}={os.environ[given[0]]} is: torchrun sets all of {', '.join(_TORCHRUN)}",
            f"torchrun, or no launcher at all: unset {' '.join(given)}",
        )
    group = Group(*(_whole_number(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    if group.rank >= group.world_size:
        raise ConfigError("RANK", f"{group.rank} is not below WORLD_SIZE={group.world_size}")
    if group.local_rank >= group.local_world_size:
        raise ConfigError("LOCAL_RANK", f"{group.local_rank} is not below LOCAL_WORLD_SIZE={group.local_world_size}")
    return group


def _from_slurm(environ: MutableMapping[str, str]) -> None:
    """Say in torchrun's variables what ``srun`` said in Slurm's, unless they are there already.

    Only of a step with several tasks: a batch script's own process has Slurm's variables too, and is no task.
    """
    if "RANK" in environ or environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])
    first_node = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_STEP_NODELIST", "localhost"))
    assert first_node is not None
    # "4(x2),3": tasks of each node; the node's own place in the list tells which applies here.
    per_node = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    named = {
        "RANK": environ.get("SLURM_PROCID", ""),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", ""),
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(per_node[int(environ.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": "".join(part or "" for part in first_node.groups()),
        # One port per job, out of the way of well-known ones; two steps of a job at once need MASTER_PORT set.
        "MASTER_PORT": str(20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 20_000),
    }
    for name, value in named.items():
        environ.setdefault(name, value)


def _whole_number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise ConfigError(name, f"must be a whole number, got {value!r}")
    return int(value)


def leads(nnodes: int, rdzv_endpoint: str | None) -> bool:
    """Whether this machine is the one whose configuration and folder count: where the endpoint is."""
    if nnodes == 1:
        return True
    if rdzv_endpoint is None:
        raise ConfigError(
            "parallelism.rdzv_endpoint",
            f"is null, but parallelism.nnodes={nnodes} machines have to meet somewhere",
            "parallelism.rdzv_endpoint=HOST:29400, HOST being one of them, the same on all",
        )
    return any(_is_mine(*address) for address in addresses(rdzv_endpoint))


def addresses(endpoint: str) -> list[tuple[socket.AddressFamily, Any]]:
    """What ``HOST:PORT`` stands for.

    Raises:
        ConfigError: when it stands for nothing.
    """
    host, _, port = endpoint.rpartition(":")
    problem = "is not HOST:PORT"
    if host and port.isdecimal():
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            return [(family, address) for family, _, _, _, address in found]
        except OSError as error:
            problem = f"no machine of that name: {error.strerror}"
    raise ConfigError("parallelism.rdzv_endpoint", f"{endpoint!r}: {problem}", "parallelism.rdzv_endpoint=HOST:29400")


def _is_mine(family: socket.AddressFamily, address: Any) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0))
        except OSError:
            return False
        return True
