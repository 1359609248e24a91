"""Whole sweeps from the outside: jobs that fail in their own ways, a kill in the middle, launchers of others."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

SMALL = ("model.dim=32", "model.n_layers=1", "model.ffn_hidden_dim=64", "dataset.max_samples=40", "trainer.epochs=1")
LEAN = ("logger=[console,jsonl]", "evaluation.n_samples=0", "evaluation.batch_size=2", "checkpoint.export=false")
GIB = 2**30
EXPERIMENTS = {
    "plain": "",
    # One step leaves it wild but finite, more do not.
    "hot": "optimizer:\n  lr: 3.0e+3\ntrainer:\n  max_grad_norm: null\n",
    # Two rows of it are nothing, all of them at once are gigabytes.
    "large": "model:\n  ffn_hidden_dim: 60000\n",
}


def start(*arguments: str, cwd: Path, address_space: float | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        if address_space is not None:
            n_bytes = int(address_space * GIB)
            resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))

    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, preexec_fn=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(*arguments: str, cwd: Path, address_space: float | None = None) -> tuple[int, str]:
    process = start(*arguments, cwd=cwd, address_space=address_space)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def jobs_of(sweep: Path) -> list[dict[str, Any]]:
    return json.loads((sweep / "sweep.json").read_text())["jobs"]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_of(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    folder = tmp_path / "more" / "experiment"
    folder.mkdir(parents=True)
    for name, text in EXPERIMENTS.items():
        (folder / f"{name}.yaml").write_text(
            "# @package _global_\ndefaults:\n  - override /optimizer: sgd\n  - override /model: llama_tiny\n" + text
        )
    return folder.parent


def test_a_sweep_outlives_its_failures_and_a_kill_and_runs_only_what_is_missing(experiments: Path, tmp_path: Path):
    sweep = tmp_path / "sweep"
    grid = ("--config-dir", str(experiments), "-m", "experiment=plain,hot,large", "trainer.batch_size=2,64")
    once = ("sweep.jobs_at_once=2", *SMALL[:2], *SMALL[3:], *LEAN)
    started = start(*grid, *once, f"paths.output_dir={sweep}", cwd=tmp_path, address_space=4)
    folder_of = lambda number: sweep / jobs_of(sweep)[number]["folder"]  # noqa: E731
    wait_until(lambda: (sweep / "sweep.json").is_file() and len(jobs_of(sweep)) == 6, started)
    wait_until(lambda: any((folder_of(n) / "metrics.jsonl").is_file() for n in (2, 3)), started)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    finished = [job["number"] for job in jobs_of(sweep) if job["status"] == "completed"]
    assert 0 in finished
    untouched = {number: (folder_of(number) / "run.json").read_bytes() for number in finished}

    exit_code, said = run(*grid, *once, f"sweep.resume={sweep}", cwd=tmp_path, address_space=4)
    assert exit_code == 3, said  # the worst: bad numbers
    kinds = [(job["status"], job["kind"]) for job in jobs_of(sweep)]
    assert kinds == [
        ("completed", None),
        ("completed", None),
        ("failed", "diverged"),
        ("completed", None),
        ("completed", None),
        ("failed", "out_of_memory"),
    ]
    assert "out of memory" in (folder_of(5) / "console.log").read_text()
    assert all((folder_of(number) / "run.json").read_bytes() == record for number, record in untouched.items())
    for number in (0, 1, 3, 4):
        steps = steps_of(folder_of(number))
        assert steps == list(range(1, steps[-1] + 1)), "each step once"
        assert len(steps) > 10 if number in (0, 4) else len(steps) == 1

    untouched = {number: (folder_of(number) / "run.json").read_bytes() for number in (0, 1, 3, 4)}
    exit_code, said = run(
        *grid[:2], f"sweep.resume={sweep}", cwd=tmp_path
    )  # no limit this time, and no word of the rest
    assert [job["kind"] for job in jobs_of(sweep)] == [None, None, "diverged", None, None, None]
    assert all((folder_of(number) / "run.json").read_bytes() == record for number, record in untouched.items())
    assert exit_code == 3
