"""train.py from the outside: what it prints, how it exits, which folders it makes."""

from __future__ import annotations

import errno
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.plugins import Plugins

from ftlab.config import check, resolvers
from ftlab.errors import FtlabError
from ftlab.outputs.folder import hold, is_held
from ftlab.typed import argument
from hydra_plugins.ftlab_sweeps import launcher

ROOT = Path(__file__).resolve().parents[2]


def run_script(*arguments: str, cwd: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)


def test_a_wrong_value_exits_2_before_torch_is_imported_with_assertions_stripped_too(tmp_path: Path) -> None:
    done = run_script("optimizer.lr=-1", cwd=tmp_path, flags=("-O", "-X", "importtime"))
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert said == ["optimizer.lr: must be > 0, got -1", "  try: optimizer.lr=2e-05"]
    assert not any(line.split("|")[-1].strip() in ("torch", "datasets", "wandb", "numpy") for line in imported)
    assert os.listdir(tmp_path) == []


def test_help_shows_groups_options_and_shared_scalars_with_their_values(tmp_path: Path) -> None:
    done = run_script("--help", "seed=7", "optimizer=sgd", cwd=tmp_path)
    assert done.returncode == 0
    for expected in (
        "adamw  ",
        "[sgd]",
        "[console]  [jsonl]  tensorboard  [wandb]",
        "run_name=llama_tiny",
        "seed=7",
        "python -m ftlab",
    ):
        assert expected in done.stdout
    assert "${" not in done.stdout
    assert os.listdir(tmp_path) == []


class Script:
    """train.py in this process, up to the door of the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch
        self.jobs: list[dict[str, Any]] = []
        self.own_process: list[bool] = []
        self.outcomes: list[int | Exception] = []

    def launch(self, config: dict[str, Any], *, own_process: bool) -> int:
        self.jobs.append(config)
        self.own_process.append(own_process)
        outcome = self.outcomes.pop(0) if self.outcomes else 0
        status = "completed" if outcome == 0 else "failed"
        (Path(config["paths"]["output_dir"]) / "run.json").write_text(f'{{"status": "{status}"}}')
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def __call__(self, *arguments: str) -> int:
        self.monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return int(exit_info.value.code or 0)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    found = Script(monkeypatch)
    handlers = list(logging.root.handlers)
    monkeypatch.setattr("ftlab.jobs.launch", found.launch)
    Plugins.instance()  # Hydra runs the modules of its plugins anew when it first looks for them
    monkeypatch.setattr(launcher._Pool, "run", lambda pool, jobs: [launcher._run(pool._task, job) for job in jobs])
    monkeypatch.setattr(resolvers, "_fresh", {})
    monkeypatch.chdir(tmp_path)
    yield found
    logging.root.handlers[:] = handlers  # Hydra's write to this test's stderr, which is closed after it


def test_a_run_gets_plain_values_and_a_folder_of_its_own(script: Script, tmp_path: Path) -> None:
    assert script("optimizer.lr=1e-5", "trainer.max_steps=3") == 0
    [config], [own_process] = script.jobs, script.own_process
    assert config["optimizer"]["lr"] == 1e-5
    assert type(config["optimizer"]["betas"]) is list
    assert not own_process
    folder = Path(config["paths"]["output_dir"])
    assert folder.parts[:-2] == (*tmp_path.parts, "outputs")
    assert folder.name.endswith("_llama_tiny")
    assert (folder / ".hydra" / "config.yaml").is_file()
    assert not (folder / "train.log").exists()


@pytest.mark.parametrize("key", ["paths.output_dir", "hydra.run.dir"])
def test_the_folder_can_be_chosen(key: str, script: Script, tmp_path: Path) -> None:
    assert script(f"{key}={tmp_path / 'mine'}") == 0
    assert script.jobs[0]["paths"]["output_dir"] == str(tmp_path / "mine")


def test_no_secret_stays_in_the_files_that_hydra_writes(script: Script, tmp_path: Path) -> None:
    secret = "model.checkpoint='https://me:hunter22@host/x'"
    assert script(secret, f"paths.output_dir={tmp_path / 'a'}") == 0
    assert script("-m", secret, "seed=1,2", f"paths.output_dir={tmp_path / 'b'}") == 0
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.yaml", "hydra.yaml", "overrides.yaml", "multirun.yaml"} <= {file.name for file in files}
    assert [file for file in files if b"hunter22" in file.read_bytes()] == []
    assert script("-m", secret, "seed=1,2", f"sweep.resume={tmp_path / 'b'}") == 0
    assert len(script.jobs) == 3, "nothing was left to run, which would have masked the sweep's own file"
    assert b"hunter22" not in (tmp_path / "b" / "multirun.yaml").read_bytes()


def test_a_sweep_runs_every_job_in_its_own_process_and_folder(script: Script) -> None:
    assert script("-m", "optimizer.lr=1e-3,3e-3", "scheduler=constant") == 0
    folders = [Path(config["paths"]["output_dir"]) for config in script.jobs]
    [sweep] = {folder.parent for folder in folders}
    assert sweep.parts[-3] == "multirun_outputs"
    assert sweep.name.endswith("_llama_tiny")
    assert [folder.name for folder in folders] == [
        "0_optimizer.lr=0.001,scheduler=constant",
        "1_optimizer.lr=0.003,scheduler=constant",
    ]
    assert [config["optimizer"]["lr"] for config in script.jobs] == [1e-3, 3e-3]
    assert script.own_process == [True, True]


def test_the_jobs_of_a_sweep_over_models_share_one_folder(script: Script) -> None:
    assert script("-m", "model=llama_tiny,llama2_7b", "model.checkpoint=null", "tokenizer=byte") == 0
    assert len({Path(config["paths"]["output_dir"]).parent for config in script.jobs}) == 1
    assert [config["run_name"] for config in script.jobs] == ["llama_tiny", "llama2_7b"]


def test_a_sweep_may_name_options_by_a_pattern(script: Script) -> None:
    assert script("-m", "scheduler=glob(c*)") == 0
    assert sorted(Path(config["paths"]["output_dir"]).name for config in script.jobs) == [
        "0_scheduler=constant",
        "1_scheduler=cosine",
    ]


@pytest.mark.parametrize("name", ["my sweeps", "it's"])
def test_a_sweep_runs_and_goes_on_in_whatever_folder_it_is(name: str, script: Script, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    script.monkeypatch.chdir(tmp_path / name)
    script.outcomes = [0, FtlabError("no")]
    assert script("-m", "seed=1,2", argument("paths.output_dir", name)) == 1
    assert script(argument("sweep.resume", name)) == 0
    assert [config["seed"] for config in script.jobs] == [1, 2, 2]
    assert {Path(config["paths"]["output_dir"]).parent for config in script.jobs} == {tmp_path / name / name}


def test_a_failed_job_does_not_stop_the_sweep_and_the_worst_exit_code_is_kept(script: Script) -> None:
    script.outcomes = [FtlabError("no"), 3]
    assert script("-m", "seed=1,2,3") == 3
    assert [config["seed"] for config in script.jobs] == [1, 2, 3]


def test_an_experiment_may_be_a_sweep(script: Script, tmp_path: Path) -> None:
    text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2\n"
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "seeds.yaml").write_text(text)
    assert script("--config-dir", str(tmp_path / "more"), "experiment=seeds") == 0
    assert [config["seed"] for config in script.jobs] == [1, 2]


def test_ctrl_c_before_the_run_exits_130_quietly(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_command_line", interrupt)
    assert script("seed=1") == 130
    assert capsys.readouterr().err == ""


def test_a_second_run_into_a_folder_is_refused(script: Script, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text('{"name": "first", "id": "1a2b", "status": "completed"}')
    assert script(f"paths.output_dir={tmp_path / 'mine'}") == 2
    assert "already holds the run 'first' (1a2b, completed)" in capsys.readouterr().err


def test_a_folder_in_which_another_process_begins_a_run_is_left_alone(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    with hold(tmp_path / "mine"):
        assert script(f"paths.output_dir={tmp_path / 'mine'}") == 2
    assert "is in use by process" in capsys.readouterr().err
    assert os.listdir(tmp_path / "mine") == [".lock"]
    assert script.jobs == []


def test_a_run_keeps_its_folder_while_hydra_and_the_job_are_at_work(script: Script, tmp_path: Path) -> None:
    held = []
    script.monkeypatch.setattr("ftlab.outputs.secrets.mask_files", lambda _: held.append(is_held(tmp_path / "mine")))
    assert script(f"paths.output_dir={tmp_path / 'mine'}") == 0
    assert held == [True]


def test_a_disk_that_is_full_is_told_before_hydra_writes(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    script.monkeypatch.setattr(check, "claim", full)
    assert script("paths.output_dir=mine") == 2
    assert "mine: No space left on device (ENOSPC)" in capsys.readouterr().err
    assert os.listdir("mine") == []


def test_the_folder_may_be_below_ones_home(script: Script, tmp_path: Path) -> None:
    script.monkeypatch.setenv("HOME", str(tmp_path))
    assert script("paths.output_dir='~/mine'") == 0
    assert script.jobs[0]["paths"]["output_dir"] == str(tmp_path / "mine")
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--info", "defaults"], ["--hydra-help"]])
def test_hydras_own_flags_work(flags: list[str], script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script(*flags) == 0
    out = capsys.readouterr().out
    assert out
    assert script.jobs == []
    if "job" in flags:
        assert yaml.safe_load(out)["seq_len"] == 512
