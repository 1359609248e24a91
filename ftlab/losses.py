"""Losses: sums over target tokens, computed from the last hidden states and the head's weight.

A loss receives hidden states instead of logits so that an implementation may
never hold all logits at once, and so that under sharding the head's weight is
touched only inside the model's forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ftlab import IGNORE_INDEX


class Loss(Protocol):
    """Called by the model: ``loss(hidden, head_weight, targets)``; by one that caps or scales logits ``of_logits``."""

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor: ...

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor: ...


def token_nll_sum(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Sum of next-token negative log-likelihoods, in nats.

    A sum, not a mean: micro-batches hold different numbers of target tokens, so
    only the caller, who knows the global count, can divide without bias.

    Args:
        logits: (N, V), any float dtype; the softmax runs in float32.
        targets: (N,) int64, already shifted; ``IGNORE_INDEX`` positions add nothing.
        label_smoothing: share of the target's probability spread evenly over the vocabulary.
        z_loss: weight of ``logsumexp(logits)²``, which keeps the softmax's normaliser near 1 (PaLM, arXiv:2204.02311).

    Returns:
        Scalar float32; exactly 0.0 when every position is ignored.
    """
    logits = logits.float()
    total = F.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    if z_loss:
        log_z = logits.logsumexp(dim=-1)
        total = total + z_loss * log_z.square().masked_fill(targets == IGNORE_INDEX, 0.0).sum()
    return total


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Plain cross-entropy: all logits at once, N × V × 4 bytes of them in float32."""

    label_smoothing: float
    z_loss: float

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of ``targets`` (N,) under ``hidden`` (N, D) @ ``head_weight`` (V, D)ᵀ."""
        return self.of_logits(F.linear(hidden, head_weight), targets)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of ``targets`` (N,) under ``logits`` (N, V)."""
        return token_nll_sum(logits, targets, label_smoothing=self.label_smoothing, z_loss=self.z_loss)
