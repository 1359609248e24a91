"""The protocol behind which one process and many look the same to the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.precision import Precision


class Parallelism(Protocol):
    """How a run is spread over processes. The loop calls these and knows nothing else about ranks.

    Where a method is a collective, every rank must call it, in the same order.

    Attributes:
        device: where this rank computes.
        rank: this process among all.
        dp_rank, dp_size: this process among those that see different rows.
    """

    device: torch.device
    rank: int
    dp_rank: int
    dp_size: int

    def place(self, model: nn.Module) -> None:
        """Allocate the parameters of a model on the meta device, uninitialised, as this strategy divides them.

        Names of parameters stay as they were. ``model.blocks`` are the units that are recomputed and sharded.
        """
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all data-parallel ranks, left on its device; a collective."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every data-parallel rank's ``value``, a small picklable object, in rank order; a collective."""
        ...

    def gather_aside(self, value: Any) -> list[Any]:
        """`gather` on a channel of its own, which a thread may use while the loop uses the others.

        A collective of one thread at a time; the first call must come from every rank's main thread.
        """
        ...

    def sync_gradients(self, model: nn.Module, *, enabled: bool) -> None:
        """Whether the next backward is the last of its step; before it, ranks may keep gradients to themselves."""
        ...

    def clip_grad_norm_(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale gradients down to the global norm ``max_norm``, if given; returns the norm before, on its device."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def close(self) -> None:
        """Leave the process group once all ranks have come this far; not for a rank that failed."""
        ...


class Strategy(Protocol):
    """One option of ``conf/parallelism``: settings that become a ``Parallelism`` in each worker."""

    def start(self, worker: WorkerEnv, precision: Precision) -> Parallelism:
        """Join the other workers, if there are any."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Settings of every strategy of many processes: how they are started and when they are given up.

    Args:
        nproc_per_node: processes on each machine; null: one for each GPU, or one on a CPU.
        nnodes: machines; each runs the same command.
        rdzv_endpoint: HOST:PORT of the machine where they meet; null on a single machine.
        timeout_s: seconds that a collective waits for a silent rank before the job fails.
        max_restarts: times that failed workers are started again.
    """

    nproc_per_node: int | None
    nnodes: int
    rdzv_endpoint: str | None
    timeout_s: int
    max_restarts: int
