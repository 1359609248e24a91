"""The parts of one training run, which the loop is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ftlab.data.loader import BatchLoader
from ftlab.distributed.base import Parallelism
from ftlab.distributed.precision import Precision
from ftlab.losses import Loss
from ftlab.training.checkpoint import Checkpointer
from ftlab.training.evaluate import Evaluator
from ftlab.training.ledger import Ledger
from ftlab.training.metrics import Metrics, PhaseClock
from ftlab.training.observers import Observer
from ftlab.training.state import TrainState
from ftlab.training.trainer_config import TrainerConfig
from ftlab.training.update import Update, make_update
from ftlab.training.wishes import Wishes


@dataclass(kw_only=True)
class Run:
    """The parts of one training run, as the loop uses them.

    Attributes:
        evaluator: measures validation metrics; None without validation rows.
        checkpointer: saves; None where nothing is kept.
        ledger: notes which samples were seen; None where nobody asks.
        observers: look at steps; what they measure is logged with them.
        log: takes the metrics of a step, and the step.
        step_flops: FLOPs of a forward and backward over sequences of the given real lengths, so many tokens of which
            they share.
        peak_flops: what the device could do per second.
    """

    trainer: TrainerConfig
    state: TrainState
    loader: BatchLoader
    loss: Loss
    precision: Precision
    parallel: Parallelism
    evaluator: Evaluator | None
    log: Callable[[Metrics, int], None]
    step_flops: Callable[[list[int], int], float]
    peak_flops: float
    checkpointer: Checkpointer | None = None
    ledger: Ledger | None = None
    observers: list[Observer] = field(default_factory=list)
    clock: PhaseClock = field(init=False)
    update: Update = field(init=False)
    wishes: Wishes = field(init=False)

    def __post_init__(self) -> None:
        self.update = make_update(self)
        self.wishes = Wishes(self.parallel.device)
        self.clock = PhaseClock(self.parallel.device)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.trainer.total_steps(self.loader.steps_per_epoch)

    def logs(self, step: int) -> bool:
        """Whether ``step``, counted from 1, is one of those that are logged."""
        return step % self.trainer.log_every_steps == 0 or step in (1, self.total_steps)

    @property
    def ends_epoch(self) -> bool:
        """Whether the step just done was the last of its epoch."""
        return self.state.progress.epoch_step == self.trainer.epoch_steps(self.loader.steps_per_epoch)

    @property
    def epoch(self) -> float:
        """Epochs done, with the part of the current one where its length is known."""
        steps = self.trainer.epoch_steps(self.loader.steps_per_epoch)
        return self.state.progress.epoch + (self.state.progress.epoch_step / steps if steps else 0.0)

    @property
    def out_of_patience(self) -> bool:
        """Whether validation has not become better for as long as the configuration waits."""
        patience = self.evaluator.config.patience if self.evaluator else None
        return patience is not None and self.state.progress.evaluations_since_best >= patience

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return self.state.progress.step >= self.total_steps or self.out_of_patience
