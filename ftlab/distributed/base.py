"""The protocol behind which one process and many look the same to the training loop."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Parallelism(Protocol):
    """How a run is spread over processes. The loop calls these and knows nothing else about ranks.

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
        """Allocate the parameters of a model on the meta device, uninitialised, as this strategy divides them."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all data-parallel ranks, left on its device; a collective: every rank must call it."""
        ...

    def sync_gradients(self, model: nn.Module, *, enabled: bool) -> None:
        """Whether the next backward exchanges gradients; off for all but the last micro-batch of a step."""
        ...

    def clip_grad_norm_(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale gradients down to the global norm ``max_norm``, if given; returns the norm before, on its device."""
        ...
