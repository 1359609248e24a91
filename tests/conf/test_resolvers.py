"""The interpolations of our own."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ftlab.config import resolvers


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolvers.register()
    monkeypatch.setattr(resolvers, "_fresh", {})
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("${ftlab.unless:${none},2.0e-5}", 2e-5),
        ("${ftlab.unless:${five},3}", None),
        ("${ftlab.unless:${zero},3}", None),
        ("${ftlab.by_weights:${text},2.0e-5,1}", 2e-5),
        ("${ftlab.by_weights:${none},2.0e-5,1}", 1),
        ("${ftlab.choose:true,a,b}", "a"),
        ("${ftlab.choose:${zero},a,b}", "b"),
        ("${ftlab.first:${none},${zero},1}", 0),
        ("${ftlab.first:${none}}", None),
    ],
)
def test_values_come_typed(expression: str, value: Any) -> None:
    cfg = OmegaConf.create({"none": None, "zero": 0, "five": 5, "text": "a/b", "x": expression})
    assert cfg.x == value
    assert type(cfg.x) is type(value)


def test_a_process_keeps_its_folder() -> None:
    first = resolvers.fresh_folder("outputs", "a")
    Path(first).mkdir(parents=True)
    assert resolvers.fresh_folder("outputs", "a") == first


def test_a_folder_that_exists_is_never_named() -> None:
    first = resolvers.fresh_folder("outputs", "a")
    Path(first).mkdir(parents=True)
    resolvers._fresh.clear()  # another process, within the same second
    assert resolvers.fresh_folder("outputs", "a") == f"{first}_2"


def test_of_two_processes_with_one_name_the_second_to_claim_it_moves_on() -> None:
    name = resolvers.fresh_folder("outputs", "a")
    os.makedirs(name)  # the other one was faster
    assert resolvers.claim_folder(name) == f"{name}_2"
    assert resolvers.fresh_folder("outputs", "a") == f"{name}_2"


def test_a_folder_that_the_user_named_may_exist() -> None:
    os.makedirs("mine")
    assert resolvers.claim_folder("mine") == "mine"


def test_the_jobs_of_a_sweep_over_models_share_the_sweeps_folder() -> None:
    first = resolvers.fresh_folder("multirun_outputs", "llama_tiny", "process")
    assert resolvers.fresh_folder("multirun_outputs", "llama2_7b", "process") == first


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ("optimizer.lr=0.001,seed=1", "3_optimizer.lr=0.001,seed=1"),
        ("model.checkpoint=/data/../x y", "3_model.checkpoint=-data-..-x-y"),
        ("", "3"),
    ],
)
def test_a_jobs_folder_is_its_number_and_overrides(overrides: str, folder: str) -> None:
    assert resolvers.sweep_subdir(3, overrides) == folder


def test_a_jobs_folder_has_a_readable_length() -> None:
    assert len(resolvers.sweep_subdir(12, "dataset.data_files=" + "x" * 500)) <= 120


def test_what_torchrun_starts_again_goes_on_in_the_same_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its attempts are processes of their own, and the folder's name holds the time of a process's start."""
    for attempt in (0, 1):
        own = tmp_path / "torchelastic" / f"attempt_{attempt}" / "0"
        own.mkdir(parents=True)
        monkeypatch.setattr(resolvers, "_fresh", {})
        monkeypatch.setattr(resolvers, "_started", resolvers._started + timedelta(seconds=attempt))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own / "error.json"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        claimed = resolvers.claim_folder(resolvers.fresh_folder("outputs", "a"))
        other = resolvers.fresh_folder("outputs", "b")
        folders = list(tmp_path.glob("outputs/*/*"))
        assert [Path(claimed).absolute()] == folders, "one folder, also of the second attempt"
        assert other != claimed
