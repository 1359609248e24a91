"""One process on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftlab.distributed.activation import checkpoint_activations
from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Single:
    """``parallelism=single``: nothing to exchange.

    Args:
        activation_checkpointing: none, full or selective; see ``activation.py``.
    """

    activation_checkpointing: str

    def start(self, worker: WorkerEnv, precision: Precision) -> OneRank:  # noqa: ARG002 -- every strategy's signature
        return OneRank(worker.device, activation_checkpointing=self.activation_checkpointing)


class OneRank:
    """A ``Parallelism`` of one process, which holds the whole model."""

    rank = 0
    dp_rank = 0
    dp_size = 1

    def __init__(self, device: torch.device, *, activation_checkpointing: str = "none"):
        self.device = device
        self._activation_checkpointing = activation_checkpointing

    def place(self, model: nn.Module) -> None:
        checkpoint_activations(model, self._activation_checkpointing)
        model.to_empty(device=self.device)

    def sum(self, value: Tensor) -> Tensor:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def gather_aside(self, value: Any) -> list[Any]:
        return [value]

    def sync_gradients(self, model: nn.Module, *, enabled: bool) -> None:
        pass

    def clip_grad_norm_(self, model: nn.Module, max_norm: float | None) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass
