"""Losses: sums over target tokens, computed from the last hidden states and the head's weight.

A loss receives hidden states instead of logits so that an implementation may
never hold all logits at once, and so that under sharding the head's weight is
touched only inside the model's forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab import IGNORE_INDEX


class Loss(Protocol):
    """Called by the model: ``loss(hidden, head_weight, targets)``; by one that caps or scales logits ``of_logits``.

    ``weights`` (N,) float32 are what each target's loss is multiplied with; None: 1.
    """

    def __call__(
        self, hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> Tensor: ...

    def of_logits(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor: ...


def token_nll_sum(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum of next-token negative log-likelihoods, in nats.

    A sum, not a mean: micro-batches hold different numbers of target tokens, so
    only the caller, who knows the global count (or weight), can divide without bias.

    Args:
        logits: (N, V), any float dtype; the softmax runs in float32.
        targets: (N,) int64, already shifted; ``IGNORE_INDEX`` positions add nothing.
        weights: (N,) float32, of each target's whole loss; None: 1.
        label_smoothing: share of the target's probability spread evenly over the vocabulary.
        z_loss: weight of ``logsumexp(logits)²``, which keeps the softmax's normaliser near 1 (PaLM, arXiv:2204.02311).

    Returns:
        Scalar float32; exactly 0.0 when every position is ignored.
    """
    logits = logits.float()
    reduction = "sum" if weights is None else "none"
    total = F.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction, label_smoothing=label_smoothing
    )
    if weights is not None:
        total = (total * weights).sum()
    if z_loss:
        squares = logits.logsumexp(dim=-1).square().masked_fill(targets == IGNORE_INDEX, 0.0)
        total = total + z_loss * (squares if weights is None else squares * weights).sum()
    return total


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Plain cross-entropy: all logits at once, N × V × 4 bytes of them in float32."""

    label_smoothing: float
    z_loss: float

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Summed loss of ``targets`` (N,) under ``hidden`` (N, D) @ ``head_weight`` (V, D)ᵀ."""
        return self.of_logits(F.linear(hidden, head_weight), targets, weights)

    def of_logits(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Summed loss of ``targets`` (N,) under ``logits`` (N, V)."""
        return token_nll_sum(logits, targets, weights, label_smoothing=self.label_smoothing, z_loss=self.z_loss)


@dataclass(frozen=True, kw_only=True)
class ChunkedCrossEntropy(CrossEntropy):
    """The same number as ``CrossEntropy``, and the same gradients, without ever holding all logits.

    torch 2.13's own ``linear_cross_entropy`` knows no z-loss, older torch does not have it, and in chunks it took
    3 to 8 times as long as all logits at once on a CPU (``benchmarks/head.py``).

    Args:
        chunk_tokens: targets whose logits exist at once.
    """

    chunk_tokens: int

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
            total: Tensor = _ChunkedNLL.apply(hidden, head_weight, targets, weights, self)
            return total
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            some_weights = None if weights is None else weights[chunk]
            total = total + super().__call__(hidden[chunk], head_weight, targets[chunk], some_weights)
        return total


class _ChunkedNLL(torch.autograd.Function):
    """Takes the gradients of a chunk while its logits are at hand, so that they need not be computed twice.

    It works because the loss is the end of the graph: what comes back is one scalar, which scales them. Three
    matrix products per chunk, as many as without chunks, where recomputation would take four.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        loss: ChunkedCrossEntropy,
    ) -> Tensor:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
        weight = head_weight.to(compute)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight: Tensor | None = None
        for start in range(0, len(hidden), loss.chunk_tokens):
            chunk = slice(start, start + loss.chunk_tokens)
            x = hidden[chunk].to(compute)
            some_weights = None if weights is None else weights[chunk]
            nll, d_logits = _nll_and_gradient(F.linear(x, weight), targets[chunk], some_weights, loss)
            total += nll
            counts = (targets[chunk] != IGNORE_INDEX)[:, None]
            d_hidden[chunk] = (d_logits @ weight).masked_fill_(~counts, 0.0)
            part = d_logits.t() @ x.masked_fill(~counts, 0.0)
            # Sums over chunks in float32: in bfloat16 every addition would round.
            d_weight = part if d_weight is None else d_weight.float().add_(part)
        if d_weight is None:  # no targets at all
            d_weight = torch.zeros_like(head_weight)
        ctx.gradients = d_hidden, d_weight.to(head_weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *d_total: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        # In place, for they are as large as the head: a second backward has nothing to work on.
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        return d_hidden.mul_(d_total[0]), d_weight.mul_(d_total[0]), None, None, None


def _nll_and_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor | None, loss: CrossEntropy
) -> tuple[Tensor, Tensor]:
    """``token_nll_sum`` and its gradient by ``logits`` (N, V), whose memory it may reuse; rows without a target are
    not blanked in the gradient."""
    n_classes, smoothing = logits.shape[1], loss.label_smoothing
    counts = targets != IGNORE_INDEX
    places = targets.masked_fill(~counts, 0)[:, None]
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_p_target = log_p.gather(1, places)
    nll = -(1 - smoothing) * log_p_target[:, 0]
    if smoothing:
        nll = nll - smoothing / n_classes * log_p.sum(dim=-1)
    log_z = logits.gather(1, places).float() - log_p_target if loss.z_loss else None
    d_logits = log_p.exp_()  # the softmax
    if log_z is not None:
        nll = nll + loss.z_loss * log_z[:, 0].square()
        d_logits.mul_(1 + 2 * loss.z_loss * log_z)
    if smoothing:
        d_logits.sub_(smoothing / n_classes)
    d_logits.scatter_add_(1, places, torch.full_like(log_p_target, smoothing - 1))
    if weights is not None:
        nll = nll * weights
        d_logits.mul_(weights[:, None])
    if logits.dtype != d_logits.dtype:
        d_logits = logits.copy_(d_logits)
    return nll.masked_fill(~counts, 0.0).sum(), d_logits
