"""``ftlab verify-parallel``: finds what differs, and nothing where nothing does."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from ftlab import cli
from ftlab.lab import verify_parallel
from ftlab.lab.verify_parallel import Deviation, _deviation, _Measured
from tests.conftest import ROOT


def measured(loss: float, norm: float, gradient: float) -> _Measured:
    return _Measured([2.0, loss], [1.0, norm], {"a": torch.ones(4), "b": torch.tensor([3.0, gradient])})


def test_a_deviation_is_the_largest_over_steps_and_parameters_and_relative():
    found = _deviation("fsdp", measured(1.1, 0.5, 4.5), measured(1.0, 0.4, 4.0))
    assert (found.loss, found.grad_norm, found.gradient) == pytest.approx((0.1, 0.25, 0.5 / 5))
    assert found.parameter == "b"


@pytest.mark.parametrize("gradient", [1e-4, float("nan")])
def test_one_deviation_over_the_tolerance_is_exit_code_1(monkeypatch, capsys, gradient):
    found = [Deviation("ddp", 1e-7, 1e-7, 1e-7, "a"), Deviation("fsdp", 1e-7, 1e-7, gradient, "b")]
    monkeypatch.setattr(verify_parallel, "verify_parallel", lambda overrides, steps, extra_dir: (found, 1e-5))
    assert cli.main(["verify-parallel"]) == 1
    assert "NO" in capsys.readouterr().out
    monkeypatch.setattr(verify_parallel, "verify_parallel", lambda overrides, steps, extra_dir: (found[:1], 1e-5))
    assert cli.main(["verify-parallel"]) == 0


def test_every_strategy_agrees_with_a_single_process_on_two_ranks():
    small = ["model.dim=32", "model.n_layers=1", "model.ffn_hidden_dim=64", "dataset.max_samples=24", "seq_len=96"]
    done = subprocess.run(
        [sys.executable, "-m", "ftlab", "verify-parallel", "--steps", "2", "trainer.batch_size=2", *small],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"│ yes", done.stdout)) == 8
    for strategy in ("ddp", "fsdp + selective recomputation", "fsdp, batch / 2, accumulation × 2", "hsdp, 2 groups"):
        assert strategy in done.stdout
