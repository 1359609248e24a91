"""The lost-update meter against brute force, and the profiler's files."""

from __future__ import annotations

import json

import pytest
import torch

from ftlab.training.loop import fit
from ftlab.training.observers import StepProfiler, make_observers
from tests.loop.conftest import Rows

WATCHED = {"optimizer": torch.optim.AdamW, "max_steps": 2, "measure_lost_updates": True}


def compared(trial, tmp_path):
    """Shares of lost updates as the meter tells them, and as all weights of the step show them."""
    trial.run.observers = make_observers(trial.run, tmp_path)
    parameters = dict(trial.run.state.model.named_parameters())
    before, gradients = {}, {}

    def look(*_):
        before.update({name: p.detach().clone() for name, p in parameters.items()})
        gradients.update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})

    trial.run.state.optimizer.register_step_pre_hook(look)
    fit(trial.run)
    stayed = {name: int(((p == before[name]) & (gradients[name] != 0)).sum()) for name, p in parameters.items()}
    meant = {name: int((gradients[name] != 0).sum()) for name in parameters}
    return trial.lines[-1], stayed, meant


@pytest.mark.parametrize(("precision", "lr"), [("bf16", 2e-5), ("fp32", 2e-5)])
def test_the_meter_counts_the_weights_that_stayed(hand_run, tmp_path, precision, lr):
    trial = hand_run(
        Rows(8),
        precision=precision,
        lr=lr,
        **WATCHED,
    )
    line, stayed, meant = compared(trial, tmp_path)
    assert line["lost_updates/all"] == sum(stayed.values()) / sum(meant.values())
    block = [name for name in stayed if name.startswith("blocks.1.")]
    expected = sum(stayed[name] for name in block) / sum(meant[name] for name in block)
    assert line["lost_updates/block_01"] == expected
    assert {"lost_updates/embedding", "lost_updates/norm", "lost_updates/head"} <= line.keys()
    if precision == "bf16":
        assert line["lost_updates/norm"] == 1.0, "gains are 1, and 2e-5 is less than 1/256 of it"
    else:
        assert line["lost_updates/all"] < 0.05


def test_only_steps_that_are_logged_are_watched(hand_run, tmp_path):
    trial = hand_run(Rows(8), precision="bf16", max_steps=5, log_every_steps=5, measure_lost_updates=True)
    [meter] = trial.run.observers = make_observers(trial.run, tmp_path)
    watched = []
    look = meter._look
    trial.run.state.optimizer.register_step_pre_hook(lambda *_: watched.append(meter._active))
    assert look
    fit(trial.run)
    assert watched == [True, False, False, False, True]


def test_the_profiler_records_the_steps_asked_for(hand_run, tmp_path):
    trial = hand_run(Rows(8), max_steps=4, profile_steps=[2, 3])
    trial.run.observers = make_observers(trial.run, tmp_path)
    fit(trial.run)
    trace = json.loads((tmp_path / "profile" / "trace-rank0.json").read_text())
    steps = [e for e in trace["traceEvents"] if str(e.get("name", "")).startswith("Optimizer.step")]
    assert len(steps) == 2
    summary = (tmp_path / "profile" / "summary-rank0.txt").read_text()
    assert summary.startswith("steps 2 to 3, rank 0")
    assert "aten::mm" in summary


def test_a_profile_that_never_begins_writes_nothing(tmp_path):
    profiler = StepProfiler(5, 6, tmp_path / "profile", 0, torch.device("cpu"))
    profiler.before(1, logged=True)
    profiler.after(6)
    assert not (tmp_path / "profile").exists()
