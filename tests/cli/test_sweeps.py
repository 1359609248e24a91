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
import yaml

from tests.conftest import ROOT
from tests.wandb_files import items, read_file, read_offline_run, rows_of, summary_of

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
    said, _ = process.communicate(timeout=1200)
    return process.returncode, said


def jobs_of(sweep: Path) -> list[dict[str, Any]]:
    return json.loads((sweep / "sweep.json").read_text())["jobs"]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rate_of(job: dict[str, Any]) -> float:
    return next(float(text.partition("=")[2]) for text in job["overrides"] if text.startswith("optimizer.lr="))


def steps_of(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def shown_by_wandb(folder: Path, sweep: str, batch_size: int) -> None:
    """What W&B's offline files say of a job that is done is what metrics.jsonl says, in all sessions together."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    records = [record for path in files for record in read_file(path)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1, "sessions of one run"
    assert {(run.run_group, run.job_type) for run in runs} == {(sweep, "job")}
    assert {"llama_tiny", "tiny"} <= set(runs[0].tags)
    config = items(runs[-1].config.update)
    assert config["trainer.batch_size"] == batch_size
    assert config["optimizer._target_"] == "torch.optim.SGD"
    told = [(row["step"], row["train/loss"]) for row in rows_of(records) if "train/loss" in row]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    assert dict(told) == dict(logged), "no gap"
    assert len(told) == len(logged), "and nothing twice"
    summary, values = summary_of(records), [line["val/loss"] for line in lines if "val/loss" in line and line["step"]]
    assert summary["status"] == "completed"
    assert (summary["val/loss"], summary["best/val/loss"]) == (values[-1], min(values))
    saved = {file.path for record in records for file in record.files.files}
    assert saved >= {"config.yaml", "data_report.json", "data_check.html"}


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
    once = ("sweep.jobs_at_once=2", *SMALL[:2], *SMALL[3:], *LEAN[1:], "checkpoint.every_steps=5")
    started = start(*grid, *once, f"paths.output_dir={sweep}", cwd=tmp_path, address_space=4)
    folder_of = lambda number: sweep / jobs_of(sweep)[number]["folder"]  # noqa: E731
    wait_until(lambda: (sweep / "sweep.json").is_file() and len(jobs_of(sweep)) == 6, started)
    wait_until(lambda: any((folder_of(n) / "metrics.jsonl").is_file() for n in (2, 3)), started)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    finished = [job["number"] for job in jobs_of(sweep) if job["status"] == "completed"]
    assert {0, 1} & set(finished), "whichever of the first two was faster"
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
        shown_by_wandb(folder_of(number), sweep.name, batch_size=2 if number in (0, 4) else 64)

    report = read_offline_run(sweep)
    [shown] = [record.run for record in report if record.WhichOneof("record_type") == "run"]
    assert (shown.run_group, shown.job_type) == (sweep.name, "report")
    assert summary_of(report)["jobs/failed"] == 2


FEW_STEPS = (*SMALL[:4], "trainer.max_steps=3", *LEAN)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_other_launchers_run_a_sweep(launcher: str, tmp_path: Path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    sweep = tmp_path / "sweep"
    few = ("-m", f"hydra/launcher={launcher}", "optimizer.lr=1e-3,1e30", *FEW_STEPS, f"paths.output_dir={sweep}")
    exit_code, said = run(*few, "optimizer=sgd", "trainer.max_grad_norm=null", cwd=tmp_path)
    assert [(job["status"], job["kind"]) for job in jobs_of(sweep)] == [("completed", None), ("failed", "diverged")], (
        said
    )
    assert exit_code == 3
    done, failed = (sweep / job["folder"] for job in jobs_of(sweep))
    assert steps_of(done) == [1, 2, 3]
    before = [(folder / "run.json").read_bytes() for folder in (done, failed)]
    exit_code, said = run(f"sweep.resume={sweep}", cwd=tmp_path)  # where it ran before, without a word of the rest
    assert exit_code == 3, said
    assert (done / "run.json").read_bytes() == before[0]
    assert (failed / "run.json").read_bytes() != before[1], "tried again"


def test_the_script_for_slurm_asks_for_what_the_configuration_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("submitit")
    for name, text in (("srun", ""), ("sbatch", f"cp $1 {tmp_path}/script.sh; echo 'no such partition' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    sweep = tmp_path / "sweep"
    asked = ("timeout_min=90", "gpus_per_node=2", "partition=big", "cpus_per_task=8", "array_parallelism=3")
    exit_code, said = run(
        "-m", "seed=range(0,5)", "hydra/launcher=submitit_slurm", *(f"hydra.launcher.{one}" for one in asked),
        f"paths.output_dir={sweep}", cwd=tmp_path,
    )  # fmt: skip
    assert exit_code == 1
    assert "FailedJobError" in said, "an engine that refuses costs a line, not a traceback"
    script = (tmp_path / "script.sh").read_text().splitlines()
    options = {line.removeprefix("#SBATCH --") for line in script if line.startswith("#SBATCH")}
    assert options >= {"array=0-4%3", "time=90", "gpus-per-node=2", "partition=big", "cpus-per-task=8", "nodes=1"}
    assert "signal=USR1@120" in options, "the signal that a run takes as: save and stop"
    assert any(line.startswith("srun ") and "submitit.core._submit" in line for line in script)
    assert [job["status"] for job in jobs_of(sweep)] == ["pending"] * 5


def test_a_sweep_shows_its_configuration_with_the_values_of_its_first_job(tmp_path: Path):
    pytest.importorskip("submitit")
    exit_code, said = run("-m", "hydra/launcher=submitit_slurm", "--cfg", "hydra", cwd=tmp_path)
    assert exit_code == 0, said
    launcher = yaml.safe_load(said)["hydra"]["launcher"]
    assert (launcher["timeout_min"], launcher["nodes"]) == (60, 1)
    exit_code, said = run("-m", "optimizer.lr=3e-3,1e-3", "seed=range(4,9)", "--cfg", "job", cwd=tmp_path)
    assert exit_code == 0, said
    config = yaml.safe_load(said)
    assert (config["optimizer"]["lr"], config["seed"]) == (3e-3, 4)
    exit_code, said = run("-m", "optimizer.lrr=1,2", "--cfg", "job", cwd=tmp_path)
    assert exit_code == 2
    assert "optimizer.lrr: unknown key" in said
    assert not list(tmp_path.iterdir()), "nothing is run"


@pytest.mark.slow
def test_a_search_gives_hopeless_jobs_up_and_goes_on_where_it_was(tmp_path: Path):
    pytest.importorskip("optuna")
    sweep = tmp_path / "search"
    # Rates so small that nothing is learnt are found out at their second evaluation.
    search = (
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.startup_trials=1", "optimizer.lr=choice(1e-2,1e-9)",
        *SMALL[:4], "trainer.max_steps=12", "scheduler=constant", "evaluation.every_steps=2", *LEAN,
        f"paths.output_dir={sweep}", "hydra.sweeper.sampler=random", "hydra.sweeper.seed=3",
    )  # fmt: skip
    exit_code, said = run(*search, "hydra.sweeper.n_trials=1", cwd=tmp_path)
    assert exit_code == 0, said
    exit_code, said = run("hydra.sweeper.n_trials=3", f"sweep.resume={sweep}", cwd=tmp_path)
    assert exit_code == 0, said
    jobs = jobs_of(sweep)
    rates = [rate_of(job) for job in jobs]
    assert set(rates) == {1e-2, 1e-9}
    assert len(jobs) == 3
    for job, rate in list(zip(jobs, rates, strict=True))[rates.index(1e-2) + 1 :]:
        assert (job["status"] == "pruned") == (rate == 1e-9)
        assert job["step"] < 12 or job["status"] == "completed"


def test_an_agent_of_wandb_sweeps_starts_train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from wandb.sdk.launch.sweeps import utils

    sweep = yaml.safe_load((ROOT / "sweeps" / "wandb_lr.yaml").read_text())
    chosen = {"optimizer.lr": 1e-05, "scheduler.warmup_ratio": 0.03, "evaluation.every_steps": 20}
    assert sweep["parameters"].keys() == chosen.keys()
    # What an agent does with the server's word: see wandb.wandb_agent.Agent._command_run.
    filled = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    filled |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [str(ROOT / sweep["program"])]}
    command = [part for word in utils.create_sweep_command(sweep["command"]) for part in filled.get(word[2:-1], [word])]
    for name, value in (("SWEEP_ID", "s1"), ("RUN_ID", "named0by0it"), ("PROJECT", "theirs")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    out = tmp_path / "run"
    done = subprocess.run(
        [*command, *SMALL[:4], "trainer.max_steps=2", *LEAN[1:], f"paths.output_dir={out}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = read_offline_run(out)
    [run] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.sweep_id, run.project) == ("named0by0it", "s1", "theirs")
    config = items(run.config.update)
    assert {key: config[key] for key in chosen} == chosen, "under the names that the sweep gives its parameters"
    assert sweep["metric"]["name"] in summary_of(records)


@pytest.mark.soak
def test_a_search_finds_the_grids_learning_rate_with_fewer_steps(tmp_path: Path):
    task = (
        "model.dim=64", "model.n_layers=2", "model.ffn_hidden_dim=128", "trainer.max_steps=80", "trainer.batch_size=16",
        "scheduler=constant", "evaluation.every_steps=8", "evaluation.at_start=false", *LEAN[:2],
        "checkpoint.export=false", "checkpoint.every_epoch=false",
    )  # fmt: skip
    grid, search = tmp_path / "grid", tmp_path / "search"
    rates = "optimizer.lr=1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1"
    exit_code, said = run("-m", rates, *task, "sweep.jobs_at_once=2", f"paths.output_dir={grid}", cwd=tmp_path)
    assert exit_code == 0, said
    exit_code, said = run("sweep=optuna_lr", *task, f"paths.output_dir={search}", cwd=tmp_path)
    assert exit_code == 0, said

    best = [min(jobs_of(one), key=lambda job: job["value"] if job["status"] == "completed" else 1e9)
            for one in (grid, search)]  # fmt: skip
    steps = sum(job["step"] for job in jobs_of(search))
    print("search", [(f"{rate_of(job):.2e}", job["step"], job["status"], job["value"]) for job in jobs_of(search)])
    print("grid", [(rate_of(job), job["value"]) for job in jobs_of(grid)])
    print(f"best {[rate_of(job) for job in best]}, {[job['value'] for job in best]}; steps {steps} of {15 * 80}")
    assert len(jobs_of(search)) == 15
    assert 1 / 3 <= rate_of(best[1]) / rate_of(best[0]) <= 3
    assert steps <= 0.7 * 15 * 80
