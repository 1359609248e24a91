"""Options for memory from the command line: the batch size that is found, and runs that go on exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.jobs import PYTHON, Job

SAME = ["trainer.max_steps=6", "evaluation.n_samples=0", "optimizer.lr=0.01"]


def losses(*arguments: str, cwd: Path) -> list[float]:
    cwd.mkdir()
    job = Job(PYTHON, *SAME, *arguments, cwd=cwd)
    assert job.wait(120) == 0, job.stderr
    return job.losses()


def test_an_automatic_batch_size_trains_as_the_size_that_was_found(tmp_path: Path) -> None:
    found = losses("trainer.batch_size=auto", "trainer.global_batch_size=24", cwd=tmp_path / "auto")
    [folder] = (path.parent for path in (tmp_path / "auto").rglob("run.json"))
    recorded = (folder / "config.yaml").read_text()
    assert "batch_size: 24" in recorded, "the largest divisor: a model of nothing fits anywhere"
    assert "batch_size: auto" not in recorded
    assert found == losses("trainer.batch_size=24", "trainer.global_batch_size=24", cwd=tmp_path / "given")
    parts = losses("trainer.batch_size=4", "trainer.global_batch_size=24", cwd=tmp_path / "parts")
    assert found == pytest.approx(parts, rel=1e-5)


def test_an_optimizer_in_the_backward_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    within = ["trainer.optimizer_in_backward=true", "trainer.max_grad_norm=null"]
    plain = losses("trainer.max_grad_norm=null", cwd=tmp_path / "plain")
    assert losses(*within, cwd=tmp_path / "within") == plain
    resumed = tmp_path / "resumed"
    first = losses(*within, "trainer.max_steps=3", "scheduler=constant", cwd=resumed)
    straight = losses(*within, "scheduler=constant", cwd=tmp_path / "straight")
    [folder] = (path.parent for path in resumed.rglob("run.json"))
    again = Job(PYTHON, f"resume={folder}", "trainer.max_steps=6", cwd=resumed, tiny=False)
    assert again.wait(120) == 0, again.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines if "train/loss" in line] == straight
    assert first == straight[:3]
