"""Run folders read back, whatever a kill or a full disk has left of them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ftlab.errors import ConfigError
from ftlab.lab.runs import RunRecord, differing, find_runs
from tests.lab.folders import make_run


def test_a_sweeps_folder_gives_its_jobs_in_their_order_and_each_once(tmp_path):
    for job in (10, 2, 1):
        make_run(tmp_path / "multirun_outputs" / "2026-11-25" / "01-00-00_grid" / f"{job}_lr={job}")
    (tmp_path / "latest").symlink_to(tmp_path / "multirun_outputs" / "2026-11-25" / "01-00-00_grid" / "2_lr=2")
    found = find_runs([tmp_path, tmp_path / "latest"])
    assert [run.folder.name for run in found] == ["1_lr=1", "2_lr=2", "10_lr=10"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1', "\x00", "[" * 100_000])
def test_torn_files_are_empty_and_no_error(tmp_path, content):
    folder = make_run(tmp_path / "run", metrics=[{"step": 1, "train/loss": 2.0}])
    (folder / ".hydra").mkdir()
    for name in ("run.json", "config.yaml", "evaluation.json", ".hydra/overrides.yaml", ".hydra/hydra.yaml"):
        (folder / name).write_text(content)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(content + '\n{"no": "step"}\n{"step": 2, "train/loss": nul')
    [run] = find_runs([folder])
    assert (run.record, run.evaluations, run.status, run.error) == ({}, [], "unknown", None)
    assert run.config == {}
    assert run.settings == {}
    assert run.overrides == []
    assert run.choices == {}
    assert run.samples == []
    assert run.series("train/loss") == [(1, 2.0)]
    assert run.final_metrics == {"train/loss": 2.0}
    assert run.step == 1
    assert run.name == "run"


def test_a_configuration_of_aliases_is_not_unfolded(tmp_path):
    folder = make_run(tmp_path / "run")
    bomb = [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 60)]
    for text in ("\n".join(["a0: &a0 {x: 1}", *bomb]), "a: &a [*a]"):
        (folder / "config.yaml").write_text(text)
        assert RunRecord(folder).settings == {}


def test_a_running_run_whose_process_is_gone_is_lost(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid, status in ((gone.pid, "lost"), (os.getpid(), "running")):
        folder = make_run(tmp_path / status, status="running")
        (folder / ".lock").write_text(f"process {pid} on {platform.node()}\n")
        assert RunRecord(folder).status == status
    (folder / ".lock").write_text(f"process {gone.pid} on another-machine\n")
    assert RunRecord(folder).status == "running"


def test_only_the_settings_that_differ_are_named_and_components_speak_for_their_arguments(tmp_path):
    make_run(tmp_path / "0", changes={"optimizer.lr": 1e-3})
    make_run(
        tmp_path / "1", changes={"optimizer": {"_target_": "torch.optim.SGD", "lr": 2e-3, "momentum": 0.9}, "seed": 1}
    )
    make_run(tmp_path / "2", changes={"dataset.source": "alpaca"})
    assert differing(find_runs([tmp_path])) == {
        "optimizer._target_": ["torch.optim.AdamW", "torch.optim.SGD", "torch.optim.AdamW"],
        "optimizer.lr": [1e-3, 2e-3, 2e-3],
        "seed": [0, 1, 0],
        "dataset.source": [None, None, "alpaca"],
    }


def test_a_folder_without_runs_is_refused_with_what_to_name_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no folder outputs\n  try: python train\.py"):
        find_runs([Path("outputs")])
    (tmp_path / "outputs").mkdir()
    with pytest.raises(ConfigError, match=r"there is no run in .*\n  try: outputs$"):
        find_runs([tmp_path])
    with pytest.raises(ConfigError, match=r"there is no run in outputs\n  try: python train\.py"):
        find_runs([Path("outputs")])
    with pytest.raises(ConfigError, match="there is no folder"):
        find_runs([tmp_path / "absent"])


def test_reading_runs_needs_no_torch():
    code = "import sys, ftlab.lab.runs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
