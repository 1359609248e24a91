"""Every rank holds the whole model; gradients are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed._composable import replicate

from ftlab.distributed.base import Parallelism, Workers
from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.precision import Precision
from ftlab.distributed.ranks import Ranks, join
from ftlab.distributed.single import OneRank


@dataclass(frozen=True, kw_only=True)
class DDP(Workers):
    """``parallelism=ddp``: fast where the model, its gradients and the optimizer's state fit on every device.

    Args:
        activation_checkpointing: none, full or selective; see ``activation.py``.
    """

    activation_checkpointing: str

    def start(self, worker: WorkerEnv, precision: Precision) -> Parallelism:  # noqa: ARG002 -- every strategy's signature
        if worker.world_size == 1:  # the buckets that gradients are exchanged in would only cost memory
            return OneRank(worker.device, activation_checkpointing=self.activation_checkpointing)
        join(worker, self.timeout_s)
        return Replicas(worker, activation_checkpointing=self.activation_checkpointing)


class Replicas(Ranks):
    """A ``Parallelism`` of ranks that all hold the whole model."""

    def __init__(self, worker: WorkerEnv, *, activation_checkpointing: str):
        super().__init__(worker)
        self.activation_checkpointing = activation_checkpointing
        self._whole = OneRank(worker.device, activation_checkpointing=activation_checkpointing)

    def place(self, model: nn.Module) -> None:
        self._whole.place(model)
        # torch's DistributedDataParallel as hooks on the model itself, so that names and forward stay the model's.
        # It starts at the first forward, and sends rank 0's weights then: ranks cannot begin apart.
        # Buffers, the rotary tables, are the same everywhere already.
        replicate(model, device_id=self.device, gradient_as_bucket_view=True, broadcast_buffers=False)

    def sync_gradients(self, model: nn.Module, *, enabled: bool) -> None:
        cast(Any, model).set_requires_gradient_sync(enabled)

    def clip_grad_norm_(self, model: nn.Module, max_norm: float | None) -> Tensor:
        return self._whole.clip_grad_norm_(model, max_norm)
