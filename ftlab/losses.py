"""Losses: sums over target tokens, computed from the last hidden states and the head's weight.

A loss receives hidden states instead of logits so that an implementation may
never hold all logits at once, and so that under sharding the head's weight is
touched only inside the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab import IGNORE_INDEX
from ftlab.shapes import rounded_up

# Logits whose softmax is taken at once, in float32: on a CPU they stay in its cache, on a GPU they bound the memory.
_SCRATCH_ON_HOST, _SCRATCH_ON_GPU = 2**20, 2**26
_ROWS_TOLD_APART = 256  # numbers of targets between two multiples get the same memory


class Loss(Protocol):
    """Called by the model: ``loss(hidden, head_weight, targets)``; by one that caps or scales logits ``of_logits``.

    ``weights`` (N,) float32 are what each target's loss is multiplied with; None: 1.
    """

    def __call__(
        self, hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> Tensor: ...

    def of_logits(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor: ...

    def compiled(self) -> Loss: ...


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

    def compiled(self) -> CrossEntropy:
        """The same where there is a kernel to compile."""
        return self

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

    def compiled(self) -> CompiledChunkedCrossEntropy:
        return CompiledChunkedCrossEntropy(**vars(self))

    def to_gradient(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The summed loss of ``targets`` (N,) under ``logits`` (N, V), which become its gradient by them, in place.

        Rows without a target add nothing, and are not blanked in the gradient.
        """
        counts = targets != IGNORE_INDEX
        places = torch.arange(len(logits), device=logits.device), targets.masked_fill(~counts, 0)
        at_targets = logits[places].float()[:, None]
        n_rows = max(1, (_SCRATCH_ON_GPU if logits.is_cuda else _SCRATCH_ON_HOST) // logits.shape[1])
        parts = []
        for start in range(0, len(logits), n_rows):
            rows = slice(start, start + n_rows)
            some_weights = None if weights is None else weights[rows, None]
            parts.append(
                self._softmax_into(logits[rows], at_targets[rows], some_weights, self.label_smoothing, self.z_loss)
            )
        nll, d_target = (torch.cat(part)[:, 0] for part in zip(*parts, strict=True))
        logits[places] = d_target.to(logits.dtype)
        return nll.masked_fill(~counts, 0.0).sum()

    def _softmax_into(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _softmax_into(*arguments)


class CompiledChunkedCrossEntropy(ChunkedCrossEntropy):
    """The same with the softmax, its gradient and all casts compiled into one kernel."""

    def _softmax_into(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        if len(arguments[0]) == 1:  # torch would compile anew for a row that is left alone
            return super()._softmax_into(*arguments)
        for tensor in arguments:  # the last rows of a step are as many as are left
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return _compiled_softmax_into()(*arguments)


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
        # Of one size whatever the number of targets, so that the next step gets the memory of this one.
        most_rows = min(loss.chunk_tokens, rounded_up(len(hidden), _ROWS_TOLD_APART))
        buffer = weight.new_empty(most_rows, len(weight))
        for start in range(0, len(hidden), loss.chunk_tokens):
            chunk = slice(start, start + loss.chunk_tokens)
            counts = (targets[chunk] != IGNORE_INDEX)[:, None]
            n_rows = len(counts)
            n_more = min(rounded_up(n_rows), len(buffer)) - n_rows
            some_weights = None if weights is None else weights[chunk]
            x = hidden[chunk].to(compute)
            x = F.pad(x.masked_fill(~counts, 0.0), (0, 0, 0, n_more))
            logits = torch.mm(x, weight.t(), out=buffer[: len(x)])
            total += loss.to_gradient(logits[:n_rows], targets[chunk], some_weights)
            d_hidden[chunk] = (logits @ weight)[:n_rows].masked_fill_(~counts, 0.0)
            part = logits.t() @ x
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


def _softmax_into(
    logits: Tensor, at_target: Tensor, weights: Tensor | None, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Replace ``logits`` (N, V) by the gradient of their loss, except at the targets.

    Args:
        at_target: (N, 1) float32, the targets' logits.
        weights: (N, 1), of each loss; None: 1.

    Returns:
        Loss and gradient at the targets, (N, 1) float32 each. The second is apart because it is a probability less
        1: once rounded to bfloat16, a probability near 1 leaves nothing of it.
    """
    n_classes = logits.shape[1]
    x = logits.float()  # a copy, or logits themselves, which are lost anyway
    top = x.amax(dim=1, keepdim=True)
    x.sub_(top)
    at_target = at_target - top
    sum_x = x.sum(dim=1, keepdim=True) if smoothing else None
    x.exp_()
    sum_exp = x.sum(dim=1, keepdim=True)
    nll = sum_exp.log() - (1 - smoothing) * at_target
    scale = sum_exp.reciprocal()
    if z_loss:
        log_z = sum_exp.log() + top
        nll = nll + z_loss * log_z.square()
        scale = scale * (1 + 2 * z_loss * log_z)
    evenly = smoothing / n_classes
    if sum_x is not None:
        nll = nll - evenly * sum_x
    d_target = at_target.exp() * scale - (1 - smoothing) - evenly
    if weights is not None:
        nll, d_target, scale = nll * weights, d_target * weights, scale * weights
    if smoothing:
        logits.copy_(x.mul_(scale).sub_(evenly if weights is None else evenly * weights))
    else:
        torch.mul(x, scale, out=logits)
    return nll, d_target


@cache
def _compiled_softmax_into() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_softmax_into)
