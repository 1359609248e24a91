"""Whole runs in this process: composed, checked and trained like ``python train.py``, without its import time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ftlab.config.check import check_command_line, compose_config
from ftlab.jobs import launch

SMALL = ("model.dim=32", "model.n_layers=1", "model.ffn_hidden_dim=64", "dataset.max_samples=40")
QUIET = ("logger=[console,jsonl]",)


@dataclass
class FinishedRun:
    """A run's folder and how it ended."""

    folder: Path
    exit_code: int

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    @property
    def lines(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["train/loss"] for line in self.lines if "train/loss" in line]

    def go_on(self, *overrides: str) -> int:
        """Resume it in this process; the exit code."""
        config = check_command_line([f"resume={self.folder}", *overrides])
        assert config is not None
        return launch(config, own_process=False)


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., FinishedRun]:
    """``tiny_run("optimizer=sgd", ...)`` trains a very small model on 40 embedded rows."""

    def run(*overrides: str, name: str = "run") -> FinishedRun:
        folder = tmp_path / name
        config = compose_config([*SMALL, *QUIET, *overrides], output_dir=folder)
        return FinishedRun(folder, launch(config, own_process=False))

    return run
