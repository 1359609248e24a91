"""What looks at training steps from the side: which updates rounding loses, and where a step's time goes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from ftlab.distributed.base import Parallelism

if TYPE_CHECKING:
    from ftlab.training.run import Run


class Observer(Protocol):
    """Is told of every step, on all ranks alike; changes nothing."""

    def before(self, step: int, *, logged: bool) -> None:
        """``step``, counted from 1, begins; ``logged``: its metrics will be asked for."""
        ...

    def after(self, step: int) -> None:
        """``step`` is done."""
        ...

    def measured(self, parallel: Parallelism) -> dict[str, float]:
        """Metrics since the last time; may be a collective."""
        ...


def make_observers(run: Run, folder: Path) -> list[Observer]:
    """Those that the configuration asks for; what they write goes into the run's ``folder``."""
    observers: list[Observer] = []
    if run.trainer.measure_lost_updates:
        observers.append(LostUpdates(run.state.model, run.state.optimizer, run.parallel.device))
    if run.trainer.profile_steps is not None:
        first, last = run.trainer.profile_steps
        observers.append(StepProfiler(first, last, folder / "profile", run.parallel.rank, run.parallel.device))
    return observers


# ------------------------------------------------------------------------------------------------- lost updates

SAMPLES = 2**14  # weights of each parameter that are watched: the share is known to 0.4 % of 1 (standard deviation)


class LostUpdates:
    """The share of updates that rounding loses: weights that a step meant to change and that are what they were.

    Watches the optimizer on steps that are logged; costs nothing on the others.

    Of every parameter a few thousand weights at even distances are compared before and after the update. Those
    whose gradient is zero are left out: nothing was meant to change them (rows of tokens that did not occur).
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device):
        self._active = False
        self._parts: dict[Tensor, str] = {parameter: _part(name) for name, parameter in model.named_parameters()}
        self._names = list(dict.fromkeys(self._parts.values()))
        self._before: dict[Tensor, tuple[Tensor, Tensor]] = {}
        # (parts, 2): weights that stayed, weights that were meant to change
        self._counts = torch.zeros(len(self._names), 2, dtype=torch.int64, device=device)
        optimizer.register_step_pre_hook(self._look)
        optimizer.register_step_post_hook(self._compare)

    def before(self, step: int, *, logged: bool) -> None:  # noqa: ARG002 -- every observer's signature
        self._active = logged

    def after(self, step: int) -> None:  # noqa: ARG002
        self._active = False

    def measured(self, parallel: Parallelism) -> dict[str, float]:
        """Shares in [0, 1], over all ranks: of each block, of all. A collective."""
        counts, self._counts = parallel.sum(self._counts), torch.zeros_like(self._counts)
        stayed, meant = counts.double().T.tolist()
        shares = {f"lost_updates/{name}": a / b for name, a, b in zip(self._names, stayed, meant, strict=True) if b}
        return shares | ({"lost_updates/all": sum(stayed) / sum(meant)} if sum(meant) else {})

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._active:
            for parameter in _with_gradients(optimizer):
                self._before[parameter] = _sample(parameter).clone(), _sample(parameter.grad) != 0

    def _compare(self, *_: Any) -> None:
        for parameter, (before, meant) in self._before.items():
            stayed = (_sample(parameter) == before) & meant
            counts = torch.stack([stayed.sum(), meant.sum()]).to(self._counts.device)
            self._counts[self._names.index(self._parts[parameter])] += counts
        self._before = {}


def _with_gradients(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def _sample(tensor: Any) -> Tensor:
    """At most about ``SAMPLES`` elements of this rank's rows, at even distances."""
    local: Tensor = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().flatten()
    # Odd, so that it does not fall on the same few columns of every row.
    return local[:: max(1, local.numel() // SAMPLES) | 1]


def _part(name: str) -> str:
    """``block_03`` for what is in a block; else the module: embedding, norm, head."""
    block = re.search(r"\bblocks\.(\d+)\.", name)
    return f"block_{int(block[1]):02d}" if block else name.rpartition(".")[0].rpartition(".")[2]


# ----------------------------------------------------------------------------------------------------- profiling


class StepProfiler:
    """Records steps ``first`` to ``last`` with torch's profiler, on every rank: none waits for another that writes.

    Writes ``trace-rank0.json`` (chrome://tracing, ui.perfetto.dev) and ``summary-rank0.txt``: where the time went,
    by operation, the most expensive first.
    """

    def __init__(self, first: int, last: int, folder: Path, rank: int, device: torch.device):
        self._first, self._last, self._folder, self._rank, self._device = first, last, folder, rank, device
        self._profile: profile | None = None

    def before(self, step: int, *, logged: bool) -> None:  # noqa: ARG002 -- every observer's signature
        if step == self._first:
            on_gpu = self._device.type == "cuda"
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
                record_shapes=True,
                profile_memory=True,
            )
            self._profile.start()

    def after(self, step: int) -> None:
        if step != self._last or self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"trace-rank{self._rank}.json"))
        by = f"self_{self._device.type}_time_total"
        table = self._profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
        head = f"steps {self._first} to {self._last}, rank {self._rank}; the most expensive operations by {by}\n"
        (self._folder / f"summary-rank{self._rank}.txt").write_text(head + table, encoding="utf-8")
        self._profile = None

    def measured(self, parallel: Parallelism) -> dict[str, float]:  # noqa: ARG002 -- every observer's signature
        return {}
