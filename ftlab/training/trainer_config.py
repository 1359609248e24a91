"""How long to train and in what portions: the arithmetic of batches, ranks, steps and epochs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ftlab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and in what portions to train; ``conf/trainer/default.yaml`` explains each key."""

    epochs: int | None
    max_steps: int | None
    max_steps_per_epoch: int | None
    batch_size: int
    gradient_accumulation_steps: int | None
    global_batch_size: int | None
    max_grad_norm: float | None
    optimizer_in_backward: bool
    share_prefixes: bool
    measure_lost_updates: bool
    profile_steps: list[int] | None
    log_every_steps: int
    max_skipped_steps: int
    spike_sigma: float | None

    def accumulation_steps(self, dp_size: int) -> int:
        """Micro-batches per optimizer step, given or derived from ``global_batch_size``."""
        if self.global_batch_size is None:
            assert self.gradient_accumulation_steps is not None  # ftlab/config/check.py
            return self.gradient_accumulation_steps
        per_micro_step = self.batch_size * dp_size
        if self.global_batch_size % per_micro_step:
            nearest = max(1, round(self.global_batch_size / per_micro_step)) * per_micro_step
            raise ConfigError(
                "trainer.global_batch_size",
                f"{self.global_batch_size} is not a multiple of trainer.batch_size × data-parallel ranks"
                f" = {self.batch_size} × {dp_size}",
                fix=f"trainer.global_batch_size={nearest}",
            )
        return self.global_batch_size // per_micro_step

    def require_one_micro_batch(self, dp_size: int) -> None:
        """Refuse gradient accumulation where there is nothing to accumulate in.

        Raises:
            ConfigError: with ``optimizer_in_backward`` and several micro-batches a step.
        """
        if self.optimizer_in_backward and (n := self.accumulation_steps(dp_size)) > 1:
            raise ConfigError(
                "trainer.optimizer_in_backward",
                f"true, but a step of {n * self.batch_size * dp_size} samples is {n} micro-batches, whose gradients "
                "add up",
                f"trainer.batch_size={n * self.batch_size}, or more ranks, or trainer.optimizer_in_backward=false",
            )

    def with_global_batch_size(self, n: int, dp_size: int) -> TrainerConfig:
        """The same with ``n`` samples per optimizer step, in micro-batches that are no larger, on any number of ranks.

        Raises:
            ConfigError: when the ranks cannot share them equally.
        """
        fitting = [size for size in range(1, self.batch_size + 1) if n % (size * dp_size) == 0]
        if not fitting:
            fewer = max(ranks for ranks in range(1, dp_size + 1) if n % ranks == 0)
            raise ConfigError(
                "parallelism.nproc_per_node",
                f"{dp_size} ranks cannot share the {n} rows that this run takes a step",
                f"parallelism.nproc_per_node={fewer}",
            )
        return replace(self, batch_size=fitting[-1], global_batch_size=n, gradient_accumulation_steps=None)

    def epoch_steps(self, steps_per_epoch: int | None) -> int | None:
        """Optimizer steps of one epoch of a loader that has ``steps_per_epoch``; None where nobody knows yet."""
        known = [n for n in (steps_per_epoch, self.max_steps_per_epoch) if n is not None]
        return min(known, default=None)

    def total_steps(self, steps_per_epoch: int | None) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        epoch_steps = self.epoch_steps(steps_per_epoch)
        assert self.epochs is not None  # ftlab/config/contradictions.py
        assert epoch_steps is not None  # of a stream, only max_steps is allowed
        return self.epochs * epoch_steps
