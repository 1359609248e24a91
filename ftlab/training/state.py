"""What changes while a run trains, and nothing else."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftlab.errors import NonFiniteError
from ftlab.models.auto import AnyModel


@dataclass
class Progress:
    """How far a run is: whole optimizer steps, exact counts over all ranks as of the last logged step."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0  # steps done within the current epoch
    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    train_s: float = 0.0  # wall-clock seconds in steps, evaluation and saving not counted
    evaluated_at: int | None = None  # the step that was validated last
    best: float | None = None  # of the validation metric that decides, so far
    best_step: int = 0
    evaluations_since_best: int = 0

    def note(self, value: float, *, less_is_better: bool) -> None:
        """Take in the deciding validation metric of this step."""
        better = self.best is None or (value < self.best if less_is_better else value > self.best)
        self.evaluations_since_best += 1
        if better and math.isfinite(value):
            self.best, self.best_step, self.evaluations_since_best = value, self.step, 0


@dataclass(kw_only=True)
class TrainState:
    """Model, optimizer, schedule, loss scaler and progress: what a checkpoint holds."""

    model: AnyModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)


class FiniteGuard:
    """Updates the weights only from finite losses and gradients, without the host waiting for the device.

    The decision is made where the numbers are: a fused optimizer takes it as
    ``found_inf``, the flag torch's loss scaler uses, and leaves weights and state as
    they were. The host learns of it in ``check``, which the loop calls on steps it logs
    anyway. Every rank decides the same, because loss and norm are global.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: torch.device):
        self._optimizer, self._scaler = optimizer, scaler
        self._fused = bool(optimizer.defaults.get("fused"))
        # (step, loss, gradient norm) of the first bad step; step 0 is none, steps count from 1.
        self._first_bad = torch.zeros(3, dtype=torch.float64, device=device)
        self._recent: deque[tuple[int, list[int]]] = deque()

    def update(self, step: int, loss: Tensor, grad_norm: Tensor, sample_ids: list[int]) -> None:
        """Take the optimizer step if ``loss`` and ``grad_norm`` are finite; ``step`` counts from 1."""
        self._recent.append((step, sample_ids))
        finite = torch.isfinite(loss)
        if self._scaler.is_enabled():
            # An overflow of scaled gradients is part of loss scaling: the scaler skips the step and halves its scale.
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            finite = finite & torch.isfinite(grad_norm)
            if self._fused:
                self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
                self._optimizer.grad_scale = None  # type: ignore[attr-defined]
                self._optimizer.step()
            elif bool(finite):  # waits for the device: an optimizer without a fused kernel cannot decide there
                self._optimizer.step()
        bad = torch.stack([torch.full_like(loss, step), loss, grad_norm]).double()
        self._first_bad = torch.where(finite | (self._first_bad[0] > 0), self._first_bad, bad)

    def check(self) -> None:
        """Raise if any step since the last check was not finite. Waits for the device.

        Raises:
            NonFiniteError: names the step, the values and the samples this rank saw in it.
        """
        bad_step, loss, grad_norm = self._first_bad.tolist()
        if bad_step:
            samples = next(ids for step, ids in self._recent if step == bad_step)
            raise NonFiniteError(
                f"step {bad_step:.0f}: loss is {loss}, gradient norm {grad_norm}; "
                "the weights are those of the step before.\n"
                f"  samples of this step (rows of the source): {', '.join(map(str, samples))}\n"
                "  try: a lower optimizer.lr, trainer.max_grad_norm=1.0, or precision=fp32 to rule precision out"
            )
        if self._scaler.is_enabled() and self._scaler.get_scale() < 2.0**-10:
            raise NonFiniteError(
                f"gradients overflow float16 even with the loss scaled by {self._scaler.get_scale():.1g}\n"
                "  try: precision=bf16_mixed"
            )
        self._recent.clear()
