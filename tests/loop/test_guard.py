"""Bad numbers are kept from the weights: which steps are left out, what is left as it was, when a run ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ftlab.distributed.single import OneRank
from ftlab.errors import NonFiniteError
from ftlab.losses import Loss
from ftlab.training.guard import WINDOW, StepGuard
from ftlab.training.loop import fit
from tests.loop.conftest import CPU, HandRun, Rows, build_hand_run


class Spoiled:
    """A loss that is multiplied in some steps."""

    def __init__(self, trial: HandRun, factors: dict[int, float]):
        self.loss: Loss = trial.run.loss
        self.trial, self.factors = trial, factors

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        step = self.trial.run.state.progress.step + 1
        return self.loss(hidden, head_weight, targets) * self.factors.get(step, 1.0)


def spoiled(factors: dict[int, float], **options: Any) -> HandRun:
    trial = build_hand_run(Rows(32), **{"lr": 0.01, "batch_size": 2, "max_steps": 10} | options)
    trial.run.loss = Spoiled(trial, factors)
    return trial


def state_of(trial: HandRun) -> list[Tensor]:
    """Weights and the optimizer's state."""
    state = trial.run.state
    entries = [state.optimizer.state.get(p, {}) for p in state.model.parameters()]
    moments = [value for entry in entries for _, value in sorted(entry.items()) if isinstance(value, Tensor)]
    return [t.detach().clone() for t in [*state.model.parameters(), *moments]]


def states_by_step(trial: HandRun) -> list[list[Tensor]]:
    """Train; the state before the first step and after each."""
    states, update = [state_of(trial)], trial.run.state.guard.update

    def watched(*arguments: Any) -> None:
        update(*arguments)
        states.append(state_of(trial))

    trial.run.state.guard.update = watched  # type: ignore[method-assign]
    fit(trial.run)
    return states


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda groups, **options: torch.optim.SGD(groups, momentum=0.9, **options),
    "adamw": torch.optim.AdamW,
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_left_out_change_neither_weights_nor_moments(optimizer: str, fused: bool) -> None:
    bad = {1: math.nan, 2: math.inf, 5: -math.inf, 6: math.nan, 10: math.nan}
    options = {"optimizer": OPTIMIZERS[optimizer], "fused": fused, "max_skipped_steps": 2, "log_every_steps": 4}
    trial = spoiled(bad, **options)
    states = states_by_step(trial)
    unchanged = [
        step for step in range(1, 11) if same(states[step - 1][: len(states[0])], states[step][: len(states[0])])
    ]
    assert unchanged == sorted(bad)
    assert same(states[4], states[6])
    assert all(tensor.isfinite().all() for tensor in states[-1])
    assert trial.run.state.progress.skipped_steps == 5
    assert trial.lines[-1]["train/skipped_steps"] == 5
    assert trial.run.state.scheduler.last_epoch == trial.run.state.progress.step == 10


def test_one_more_than_may_be_left_out_ends_the_run_and_nothing_changes_until_the_host_knows() -> None:
    trial = spoiled({4: math.nan, 5: math.nan, 6: math.nan}, max_skipped_steps=2, log_every_steps=9)
    kept = states_by_step(spoiled({}, max_steps=3))[-1]
    with pytest.raises(NonFiniteError, match=r"step 6: loss is nan.* those before the last 2 steps") as error:
        fit(trial.run)
    assert "rows of the source" in str(error.value)
    assert same(state_of(trial), kept)


def test_what_is_left_out_is_told_with_its_samples(caplog: pytest.LogCaptureFixture) -> None:
    trial = spoiled({3: math.nan}, max_skipped_steps=1, log_every_steps=5)
    [third] = list(trial.run.loader.steps(0))[2]
    fit(trial.run)
    [record] = [record for record in caplog.records if record.name == "ftlab.training.guard"]
    assert record.getMessage().startswith("step 3 is left out: loss is nan")
    assert record.getMessage().endswith(": " + ", ".join(map(str, third.sample_ids)))


def test_float16_leaves_out_bad_losses_and_counts_no_overflow_as_one() -> None:
    trial = spoiled({3: math.nan}, precision="fp16_mixed", max_skipped_steps=1)
    trial.run.state.scaler._init_scale = 2.0**120  # the first steps overflow
    states = states_by_step(trial)
    assert same(states[0], states[2])
    assert trial.run.state.progress.skipped_steps == 1
    assert trial.run.state.scaler.get_scale() <= 2.0**117


def test_a_momentum_that_nobody_has_written_to_is_never_used() -> None:
    """torch's fused SGD would keep uninitialised memory as momentum if its very first step were left out."""
    fine = states_by_step(spoiled({}, optimizer=OPTIMIZERS["momentum"], shuffle=False, max_steps=4))
    late = spoiled({1: math.nan}, optimizer=OPTIMIZERS["momentum"], shuffle=False, max_steps=5, max_skipped_steps=1)
    states_by_step(late)
    # Other rows from step 2 on, so other values; of a first step's size all the same.
    sizes = [max(float(t.abs().max()) for t in state_of(late)), max(float(t.abs().max()) for t in fine[-1])]
    assert sizes[0] < 10 * sizes[1]


def test_a_spike_is_judged_by_the_steps_before_as_written_down_here() -> None:
    """Against NumPy, over losses of every kind, through saving and restoring at any step."""
    random = np.random.default_rng()
    losses = np.where(random.random(700) < 0.02, 30.0, 1.0) * random.normal(3.0, 0.2, 700)
    losses[400:] += 4.0  # a level that lasts
    losses[random.random(700) < 0.01] = np.nan
    guard, weight = make_guard()
    remembered: list[float] = []
    for step, loss in enumerate(losses, start=1):
        known = np.array(remembered[-WINDOW:])
        spike = False
        if len(known) >= WINDOW // 2:
            limit = known.mean() + 6 * max(known.std(ddof=1), known.mean() / 1000)
            spike = loss > limit
        if np.isfinite(loss):
            remembered.append(limit if spike else loss)
        before = weight.item()
        guard.update(step, torch.tensor(loss), torch.tensor(1.0), [])
        assert (weight.item() == before) == bool(spike or np.isnan(loss)), f"step {step}: {loss} of {known.mean()}"
        if random.random() < 0.05:
            guard.check()
            told = guard.state_dict()
            guard, weight = make_guard()
            guard.load_state_dict(told)
    assert np.mean(remembered[-20:]) > 6, "the new level became what is usual"


def make_guard() -> tuple[StepGuard, Tensor]:
    weight = torch.nn.Parameter(torch.zeros(()))
    weight.grad = torch.ones(())
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return StepGuard(optimizer, scaler, OneRank(CPU), max_skipped=1000, spike_sigma=6.0), weight


def test_fewer_may_be_left_out_when_a_run_goes_on() -> None:
    guard, _ = make_guard()
    for step in (1, 2, 3):
        guard.update(step, torch.tensor(math.nan), torch.tensor(1.0), [])
    assert guard.check() == 3
    weight = torch.nn.Parameter(torch.zeros(()))
    weight.grad = torch.ones(())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    strict = StepGuard(torch.optim.SGD([weight], lr=1.0), scaler, OneRank(CPU), max_skipped=1, spike_sigma=None)
    strict.load_state_dict(guard.state_dict())
    strict.update(4, torch.tensor(1.0), torch.tensor(1.0), [])
    assert weight.item() == -1.0
    assert strict.check() == 0
