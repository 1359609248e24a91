"""What all strategies of many processes share: the process group, and the exchanges the loop asks for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ftlab.distributed.env import WorkerEnv

# Ranks wait there for the slowest disk. That one of them is gone shows sooner: its connection breaks.
_PATIENCE = timedelta(days=1)


def join(worker: WorkerEnv, timeout_s: int) -> None:
    """Become a member of the default process group; every collective in it fails after ``timeout_s`` seconds."""
    on_gpu = worker.device.type == "cuda"
    if worker.in_name_only:
        from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

        dist.init_process_group("fake", store=FakeStore(), rank=worker.rank, world_size=worker.world_size)
        return
    if on_gpu:
        torch.cuda.set_device(worker.device)
    # A rank without peers needs no address to meet at.
    store = dist.HashStore() if worker.world_size == 1 else worker.store
    dist.init_process_group(
        # gloo beside nccl: with CPU offload, gradients are exchanged on the GPU, their norm on the CPU.
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=worker.device if on_gpu else None,
    )


class Ranks:
    """The part of a ``Parallelism`` that speaks to the other ranks; all of them see different rows."""

    def __init__(self, worker: WorkerEnv):
        self.device = worker.device
        self.rank = self.dp_rank = worker.rank
        self.dp_size = worker.world_size
        self._aside: dist.ProcessGroup | None = None

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.dp_size
        dist.all_gather_object(values, value)
        return values

    def gather_aside(self, value: Any) -> list[Any]:
        if self._aside is None:
            self._aside = dist.new_group(backend="gloo", timeout=_PATIENCE)
        values: list[Any] = [None] * self.dp_size
        dist.all_gather_object(values, value, group=self._aside)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        # Without the barrier a fast rank's exit looks like a failure to one whose last collective is still running.
        dist.barrier()
        dist.destroy_process_group()
