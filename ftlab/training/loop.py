"""The training loop: one for every model, data layout, precision and number of devices."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import torch
from torch import Tensor

from ftlab.data.batch import Batch
from ftlab.data.loader import ahead
from ftlab.data.weights import ONE
from ftlab.storage.checkpoints import less_is_better
from ftlab.training.log_window import LogWindow, StepMetrics
from ftlab.training.metrics import Metrics, frozen_garbage
from ftlab.training.run import Run
from ftlab.training.update import averaged
from ftlab.training.wishes import N_WISHES, Agreed, Wishes


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
                tree=batch.tree,
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
