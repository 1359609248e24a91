"""What steps measured, and what is logged of them: one line for all steps since the line before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftlab.data.batch import Batch
from ftlab.training.metrics import Metrics, peak_memory_gib
from ftlab.training.run import Run


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


class LogWindow:
    """Collects steps between two logged ones; only ``settle`` and ``close`` make the host wait for the device."""

    def __init__(self, run: Run):
        self._run = run
        self._counts = torch.zeros(3, dtype=torch.int64, device=run.parallel.device)
        self._settled = [0, 0, 0]  # the part of them that progress knows
        self._clear()

    def _clear(self) -> None:
        self._flops, self._n_tokens, self._n_padding, self._n_shared = 0.0, 0, 0, 0

    def add(self, micro_batches: list[Batch], metrics: StepMetrics) -> None:
        """Count one step."""
        self._counts = self._counts + metrics.counts
        n_shared = sum(batch.n_shared for batch in micro_batches)
        self._flops += self._run.step_flops([n for batch in micro_batches for n in batch.lengths], n_shared)
        self._n_tokens += sum(batch.n_tokens for batch in micro_batches)
        self._n_padding += sum(batch.n_padding for batch in micro_batches)
        self._n_shared += n_shared

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
            "perf/padding_frac": self._n_padding / (self._n_padding + self._n_tokens),
            "perf/mfu": self._flops / busy / run.peak_flops,
            "perf/data_wait_frac": seconds.get("data", 0.0) / busy,
            "perf/forward_frac": seconds.get("forward", 0.0) / busy,
            "perf/backward_frac": seconds.get("backward", 0.0) / busy,
            "perf/optimizer_frac": seconds.get("optimizer", 0.0) / busy,
            "memory/peak_gib": peak_memory_gib(run.parallel.device),
        }
        if run.trainer.share_prefixes:
            line["perf/shared_frac"] = self._n_shared / max(1, self._n_tokens)
        if progress.skipped_steps:
            line["train/skipped_steps"] = progress.skipped_steps
        for observer in run.observers:
            line |= observer.measured(run.parallel)
        self._counts, self._settled = torch.zeros_like(self._counts), [0, 0, 0]
        self._clear()
        return line
