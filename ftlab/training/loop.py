"""The training loop: one for every model, data layout, precision and number of devices."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ftlab.data.batch import Batch
from ftlab.data.loader import BatchLoader, ahead
from ftlab.data.weights import ONE
from ftlab.distributed.base import Parallelism
from ftlab.distributed.precision import Precision
from ftlab.errors import ConfigError
from ftlab.losses import Loss
from ftlab.storage.checkpoints import less_is_better
from ftlab.training.checkpoint import Checkpointer
from ftlab.training.evaluate import Evaluator
from ftlab.training.ledger import Ledger
from ftlab.training.metrics import PhaseClock, frozen_garbage, peak_memory_gib
from ftlab.training.observers import Observer
from ftlab.training.state import TrainState
from ftlab.training.update import Update, averaged, make_update
from ftlab.training.wishes import N_WISHES, Agreed, Wishes

Metrics = dict[str, float]


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


@dataclass(kw_only=True)
class Run:
    """The parts of one training run, as the loop uses them.

    Attributes:
        evaluator: measures validation metrics; None without validation rows.
        checkpointer: saves; None where nothing is kept.
        ledger: notes which samples were seen; None where nobody asks.
        observers: look at steps; what they measure is logged with them.
        log: takes the metrics of a step, and the step.
        step_flops: FLOPs of a forward and backward over sequences of the given real lengths.
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
    step_flops: Callable[[list[int]], float]
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


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured; tensors stay on the device until the step is logged.

    Attributes:
        loss: scalar, nats per target token over all ranks.
        grad_norm: scalar, global, before clipping.
        lr: the peak group's learning rate in this step.
        counts: (3,) int64 over all ranks: target tokens, real tokens, samples.
        wishes: (N_WISHES,) int64, what the ranks wish for.
    """

    loss: Tensor
    grad_norm: Tensor
    lr: float
    counts: Tensor
    wishes: Tensor


def train_step(run: Run, micro_batches: list[Batch]) -> StepMetrics:
    """One optimizer step: the gradient of the mean loss per target token over all micro-batches and ranks.

    A mean in which each token counts as much as its weight, which is 1 unless the data says otherwise.
    """
    state, parallel = run.state, run.parallel
    run.clock.enter("other")
    summed = parallel.sum(count(micro_batches, run.wishes, parallel.device))
    total_weight, counts, wishes = summed.split((1, 3, N_WISHES))
    n_targets = total_weight[0] / ONE  # float32: exact up to its rounding
    nll = torch.zeros((), device=parallel.device)
    for i, batch in enumerate(micro_batches):
        run.clock.enter("forward")
        parallel.sync_gradients(state.model, enabled=i == len(micro_batches) - 1)
        batch = batch.to(parallel.device)
        with run.precision.autocast(parallel.device):
            nll_sum = state.model(  # the head's weight is touched only in here
                batch.tokens,
                batch.targets,
                run.loss,
                doc_ids=batch.doc_ids,
                n_targets=batch.n_targets,
                weights=batch.weights,
            )
        run.clock.enter("backward")
        # Data parallelism averages gradients over ranks; times dp_size makes it the sum that is divided once, globally.
        run.update.backward(nll_sum * (parallel.dp_size / n_targets))
        nll = nll + nll_sum.detach()
    run.clock.enter("optimizer")
    loss = parallel.sum(nll) / n_targets
    grad_norm = run.update.apply(loss, [i for batch in micro_batches for i in batch.sample_ids])
    lr = state.optimizer.param_groups[0]["lr"]
    state.scheduler.step()
    return StepMetrics(loss, grad_norm, lr, counts, wishes)


def count(micro_batches: list[Batch], wishes: Wishes, device: torch.device) -> Tensor:
    """(4 + N_WISHES,) int64 on ``device``: what this rank's targets weigh together, in units of 1 / ``ONE``; target
    tokens, real tokens, samples; and what it wishes."""
    counts = [
        sum(batch.total_weight for batch in micro_batches),
        sum(batch.n_targets for batch in micro_batches),
        sum(batch.n_tokens for batch in micro_batches),
        sum(len(batch.sample_ids) for batch in micro_batches),
    ]
    return torch.tensor(counts + wishes.mine()).to(device, non_blocking=True)


def fit(run: Run) -> signal.Signals | None:
    """Train until the last step, or until told to stop; evaluate, log and save on the way.

    Returns:
        The signal that stopped the run after a whole step, which is saved then; None when it trained to its end.

    Raises:
        NonFiniteError: more steps were bad than may be left out; the weights are those before them.
        SaveError: the last checkpoint could not be written.
    """
    progress = run.state.progress
    window = LogWindow(run)
    with run.wishes.listening(), frozen_garbage() as freeze_garbage:
        prove_if_due(run)  # an epoch that ended right before a kill
        validation = evaluate_if_due(run)
        if run.checkpointer is not None:
            run.checkpointer.amend(validation)  # of a run that was stopped where this was due
        asked = run.wishes.agreed_now(run.parallel)
        run.clock.enter("data")
        run.clock.take()
        for micro_batches in () if asked.stop is not None or run.out_of_patience else remaining_steps(run):
            for observer in run.observers:
                observer.before(progress.step + 1, logged=run.logs(progress.step + 1))
            metrics = train_step(run, micro_batches)
            run.clock.enter("other")
            freeze_garbage()
            progress.step += 1
            progress.epoch_step += 1
            for observer in run.observers:
                observer.after(progress.step)
            window.add(micro_batches, metrics)
            if run.ledger is not None:
                run.ledger.note(progress.step, progress.epoch, micro_batches)
            if run.logs(progress.step):
                run.log(window.close(metrics), progress.step)
            asked = run.wishes.agreed(metrics.wishes)
            validation = evaluate_if_due(run) if asked.stop is None else {}
            save_if_due(run, window, asked, validation)
            prove_if_due(run)
            if asked.stop is not None or run.out_of_patience:
                break
            run.clock.enter("data")
        if run.checkpointer is not None:
            run.clock.enter("save")
            run.checkpointer.close()
        if run.ledger is not None:
            run.ledger.close()
    return asked.stop


def evaluate_if_due(run: Run) -> Metrics:
    """Measure and log validation metrics where the configuration asks for them; empty where it does not."""
    progress, evaluator = run.state.progress, run.evaluator
    ends_run = progress.step == run.total_steps
    if evaluator is None or progress.evaluated_at == progress.step:
        return {}
    if not evaluator.due(progress.step, ends_epoch=run.ends_epoch, ends_run=ends_run):
        return {}
    run.clock.enter("eval")
    with averaged(run.state.optimizer):
        metrics = evaluator(run.state.model, progress.step, run.precision, run.parallel)
    run.log(metrics, progress.step)
    progress.evaluated_at = progress.step
    value = evaluator.config.deciding(metrics) if progress.step else None
    if value is not None:
        progress.note(value, less_is_better=less_is_better(evaluator.config.metric))
    return metrics


def save_if_due(run: Run, window: LogWindow, asked: Agreed, validation: Metrics) -> None:
    """Write a checkpoint where the configuration, the clock or a signal asks for one."""
    progress = run.state.progress
    if run.checkpointer is None:
        return
    ends_run = progress.step == run.total_steps or run.out_of_patience
    is_best = bool(validation) and progress.best_step == progress.step
    due = run.checkpointer.due(
        progress.step, ends_epoch=run.ends_epoch, ends_run=ends_run, validated=bool(validation), is_best=is_best
    )
    if due or asked.save or asked.stop is not None:
        run.clock.enter("save")
        window.settle()  # exact counts, and the proof that no step was bad
        run.checkpointer.save(validation, last=ends_run or asked.stop is not None)


def prove_if_due(run: Run) -> None:
    """After the last step of an epoch, have the ledger prove it, unless it has."""
    progress = run.state.progress
    if run.ledger is not None and run.ends_epoch:
        run.ledger.end_epoch(progress.epoch, progress.step, progress.epoch_step, run.loader, run.parallel)


def remaining_steps(run: Run) -> Iterator[list[Batch]]:
    """The micro-batches of every step still to do, epoch after epoch."""
    progress, total = run.state.progress, run.total_steps
    on_gpu = run.parallel.device.type == "cuda"
    while progress.step < total:
        steps = run.loader.steps(progress.epoch, start_step=progress.epoch_step)
        if on_gpu:  # a CPU has nobody to prepare batches meanwhile: the cores are at work on the step
            pinned = ([batch.pinned() for batch in step] for step in steps)
            # A stream reads ahead by itself, and tells where it is by what was taken from it.
            steps = pinned if run.loader.streams else ahead(pinned)
        while not run.ends_epoch and progress.step < total and (micro_batches := next(steps, None)) is not None:
            yield micro_batches
        if run.ends_epoch:
            progress.epoch, progress.epoch_step = progress.epoch + 1, 0


class LogWindow:
    """Collects steps between two logged ones; only ``settle`` and ``close`` make the host wait for the device."""

    def __init__(self, run: Run):
        self._run = run
        self._counts = torch.zeros(3, dtype=torch.int64, device=run.parallel.device)
        self._settled = [0, 0, 0]  # the part of them that progress knows
        self._flops, self._positions, self._own_tokens = 0.0, 0, 0

    def add(self, micro_batches: list[Batch], metrics: StepMetrics) -> None:
        """Count one step."""
        self._counts = self._counts + metrics.counts
        self._flops += self._run.step_flops([n for batch in micro_batches for n in batch.lengths])
        self._positions += sum(batch.tokens.numel() for batch in micro_batches)
        self._own_tokens += sum(batch.n_tokens for batch in micro_batches)

    def settle(self) -> None:
        """Bring the run's counts up to the step just done.

        Raises:
            NonFiniteError: if more steps were bad than may be left out.
        """
        state, counts = self._run.state, self._counts.tolist()
        progress = state.progress
        progress.skipped_steps += state.guard.check()
        target_tokens, tokens, samples = (now - then for now, then in zip(counts, self._settled, strict=True))
        progress.target_tokens += target_tokens
        progress.tokens += tokens
        progress.samples += samples
        self._settled = counts

    def close(self, metrics: StepMetrics) -> Metrics:
        """The line to log for the step just done: its loss, and speed over the whole window."""
        run, progress = self._run, self._run.state.progress
        self.settle()
        target_tokens, tokens, _ = self._settled
        seconds = run.clock.take()
        busy = sum(s for phase, s in seconds.items() if phase not in ("eval", "save"))
        progress.train_s += busy
        line = {
            "epoch": run.epoch,
            "tokens": progress.tokens,
            "train/loss": metrics.loss.item(),
            "train/lr": metrics.lr,
            "train/grad_norm": metrics.grad_norm.item(),
            "perf/tokens_per_s": tokens / busy,
            "perf/target_tokens_per_s": target_tokens / busy,
            "perf/padding_frac": 1 - self._own_tokens / self._positions,
            "perf/mfu": self._flops / busy / run.peak_flops,
            "perf/data_wait_frac": seconds.get("data", 0.0) / busy,
            "perf/forward_frac": seconds.get("forward", 0.0) / busy,
            "perf/backward_frac": seconds.get("backward", 0.0) / busy,
            "perf/optimizer_frac": seconds.get("optimizer", 0.0) / busy,
            "memory/peak_gib": peak_memory_gib(run.parallel.device),
        }
        if progress.skipped_steps:
            line["train/skipped_steps"] = progress.skipped_steps
        for observer in run.observers:
            line |= observer.measured(run.parallel)
        self._counts, self._settled = torch.zeros_like(self._counts), [0, 0, 0]
        self._flops, self._positions, self._own_tokens = 0.0, 0, 0
        return line
