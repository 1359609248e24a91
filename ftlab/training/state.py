"""What changes while a run trains, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ftlab.models.auto import AnyModel
from ftlab.training.guard import StepGuard


@dataclass
class Progress:
    """How far a run is: whole optimizer steps, exact counts over all ranks as of the last logged step."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0  # steps done within the current epoch
    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    skipped_steps: int = 0  # steps done whose bad numbers were kept from the weights
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
    """Model, optimizer, schedule, loss scaler, guard and progress: what a checkpoint holds."""

    model: AnyModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    guard: StepGuard
    progress: Progress = field(default_factory=Progress)
