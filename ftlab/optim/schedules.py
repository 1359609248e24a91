"""Learning-rate schedules: pure functions of the optimizer step, as factors of the peak learning rate.

A schedule has no state: what it returns at step k is the same before and after
a resume. Step 0 is the first update; neither the first nor the last update is
wasted on a learning rate of zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftlab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then the peak.

    Args:
        total_steps: optimizer steps of the whole run.
        warmup_steps: length of the linear warm-up in optimizer steps, or None.
        warmup_ratio: the same as a share of ``total_steps``, rounded up, or None.
    """

    total_steps: int
    warmup_steps: int | None
    warmup_ratio: float | None

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_steps > self.total_steps:
            raise ConfigError(
                "scheduler.warmup_steps",
                f"{self.warmup_steps} is more than the run's {self.total_steps} optimizer steps",
                fix=f"scheduler.warmup_steps={self.total_steps // 10}",
            )

    @property
    def n_warmup(self) -> int:
        """Warm-up in optimizer steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil((self.warmup_ratio or 0.0) * self.total_steps)

    def __call__(self, step: int) -> float:
        """Factor in (0, 1] for optimizer step ``step``, counted from 0."""
        if step < self.n_warmup:
            return (step + 1) / self.n_warmup
        return self.after_warmup((step - self.n_warmup) / max(1, self.total_steps - self.n_warmup))

    def after_warmup(self, progress: float) -> float:
        """Factor at ``progress`` in [0, 1) of what follows the warm-up."""
        del progress  # constant
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Constant):
    """Warm-up, then half a cosine down to ``min_lr_ratio`` of the peak (Loshchilov & Hutter 2017, arXiv:1608.03983)."""

    min_lr_ratio: float

    def after_warmup(self, progress: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine


@dataclass(frozen=True, kw_only=True)
class Linear(Constant):
    """Warm-up, then a straight line down to ``min_lr_ratio`` of the peak."""

    min_lr_ratio: float

    def after_warmup(self, progress: float) -> float:
        return 1 - (1 - self.min_lr_ratio) * min(progress, 1.0)


@dataclass(frozen=True, kw_only=True)
class WSD(Constant):
    """Warm-up, stable, decay: the peak until the last ``decay_ratio`` of the run, then a line to ``min_lr_ratio``.

    The stable part can be prolonged later without having been planned (MiniCPM, arXiv:2404.06395).
    """

    min_lr_ratio: float
    decay_ratio: float

    def after_warmup(self, progress: float) -> float:
        # Of what follows the warm-up, which may be less than is to decay.
        decay_share = min(1.0, self.decay_ratio * self.total_steps / max(1, self.total_steps - self.n_warmup))
        if decay_share <= 0:
            return 1.0
        decayed = max(0.0, (min(progress, 1.0) - (1 - decay_share)) / decay_share)
        return 1 - (1 - self.min_lr_ratio) * decayed
