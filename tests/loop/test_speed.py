"""What keeps a step fast: no questions to the device, no logits of masked positions, batches made ahead."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ftlab.data.batch import Batch, collate
from ftlab.data.loader import ahead
from ftlab.losses import CrossEntropy
from ftlab.training.loop import fit
from ftlab.training.metrics import PhaseClock
from ftlab.training.run import Run
from tests.loop.conftest import Rows

ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


class Asked(TorchDispatchMode):
    """Notes the steps in which the host asked the device for a value."""

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.steps = run, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in ASKS:
            self.steps.add(self.run.state.progress.step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "share_prefixes"), [("fp32", False), ("fp32", True), ("bf16_mixed", False)])
def test_only_logged_steps_ask_the_device(hand_run, precision, share_prefixes):
    options: dict[str, Any] = {"max_steps": 10, "log_every_steps": 4, "accumulation": 2}
    run = hand_run(Rows(60), precision=precision, share_prefixes=share_prefixes, **options).run
    with Asked(run) as asked:
        fit(run)
    assert asked.steps <= {0, 1, 4, 8, 10}  # 0: within the first step, which is logged; 1: after it; and so on
    assert asked.steps, "reading a loss is asking: the test sees it"


def test_an_optimizer_that_must_ask_is_seen_to(hand_run):
    run = hand_run(Rows(60), max_steps=6, log_every_steps=4, fused=False).run
    with Asked(run) as asked:
        fit(run)
    assert 2 in asked.steps


def test_masked_positions_never_reach_the_head_and_nothing_changes(hand_run):
    rows = Rows(8)
    batch = collate([rows.sample(i) for i in range(8)], pad_id=0)
    model = hand_run(rows, max_steps=1).run.state.model
    loss, seen = CrossEntropy(label_smoothing=0.1, z_loss=1e-3), []

    def watched(hidden, weight, targets):
        seen.append(len(hidden))
        return loss(hidden, weight, targets)

    gradients = []
    for known in (batch.n_targets, None):
        model.zero_grad()
        model(batch.tokens, batch.targets, watched, n_targets=known).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert seen == [batch.n_targets, batch.targets.numel()]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-5)


def test_a_rank_without_targets_still_has_gradients(hand_run):
    model = hand_run(Rows(8), max_steps=1).run.state.model
    batch = Batch.empty(0)
    loss = CrossEntropy(label_smoothing=0.0, z_loss=0.0)
    model(batch.tokens, batch.targets, loss, n_targets=0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_collector_passes_over_what_the_run_is_made_of(hand_run):
    run, frozen = hand_run(Rows(20), max_steps=3).run, []
    run.log = lambda *_: frozen.append(gc.get_freeze_count())
    fit(run)
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0


def test_steps_ahead_are_the_same_steps():
    assert list(ahead(iter([[1], [2], [3]]))) == [[1], [2], [3]]
    assert list(ahead(iter([]))) == []


def test_an_error_ahead_arrives_where_its_step_was_due():
    def steps() -> Iterator[list[Batch]]:
        yield []
        raise OSError("the rows are gone")

    coming = ahead(steps())
    assert next(coming) == []
    with pytest.raises(OSError, match="the rows are gone"):
        next(coming)


def test_the_meters_count_padding_and_targets_apart(hand_run):
    rows = Rows(4)
    made = hand_run(rows, max_steps=1, batch_size=4, shuffle=False)
    fit(made.run)
    batch = collate([rows.sample(i) for i in range(4)], pad_id=0)
    (line,) = made.lines
    assert line["perf/padding_frac"] == pytest.approx(1 - batch.n_tokens / batch.tokens.numel())
    assert line["perf/target_tokens_per_s"] / line["perf/tokens_per_s"] == pytest.approx(
        batch.n_targets / batch.n_tokens
    )
    parts = [line[f"perf/{name}_frac"] for name in ("data_wait", "forward", "backward", "optimizer")]
    assert all(part >= 0 for part in parts)
    assert 0.5 < sum(parts) <= 1


def test_a_clock_s_phases_add_up_to_the_time_between_two_takes():
    clock = PhaseClock()
    clock.take()
    start = clock._begun[-1][1]
    for phase in ("data", "forward", "data"):
        clock.enter(phase)
    seconds = clock.take()
    assert set(seconds) == {"start", "data", "forward"}
    assert sum(seconds.values()) == pytest.approx(clock._begun[-1][1] - start)
