"""One process on one device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Single:
    """``parallelism=single``: nothing to exchange."""

    rank = 0
    dp_rank = 0
    dp_size = 1

    def __init__(self, *, device: torch.device):
        self.device = device

    def place(self, model: nn.Module) -> None:
        model.to_empty(device=self.device)

    def sum(self, value: Tensor) -> Tensor:
        return value

    def sync_gradients(self, model: nn.Module, *, enabled: bool) -> None:
        pass

    def clip_grad_norm_(self, model: nn.Module, max_norm: float | None) -> Tensor:
        if max_norm is None:
            return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
