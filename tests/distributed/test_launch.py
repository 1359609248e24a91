"""However a run of several ranks is started, it is one run: one folder, one configuration, the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftlab.distributed.started import Group, addresses, group_of_this_process, leads
from ftlab.errors import ConfigError
from tests.distributed.jobs import PYTHON, ROOT, TORCHRUN, Job

STEPS = ["trainer.max_steps=3", "trainer.batch_size=4"]
TWO = ["parallelism=fsdp", "parallelism.nproc_per_node=2"]


@pytest.fixture(scope="module")
def self_launched(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(PYTHON, *TWO, *STEPS, cwd=tmp_path_factory.mktemp("self_launched"))
    assert job.wait() == 0, job.stderr
    return job


@pytest.fixture(scope="module")
def sweep_under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job([*TORCHRUN, "-m"], "parallelism=fsdp", *STEPS, "seed=0,1", cwd=tmp_path_factory.mktemp("torchrun"))
    assert job.wait() == 0, job.stderr
    return job


def test_a_self_launched_run_makes_one_folder_with_a_log_of_each_rank(self_launched: Job) -> None:
    [folder] = self_launched.folders
    assert {"config.yaml", "run.json", "metrics.jsonl", "train.log", "rank1.log", ".hydra"} <= set(os.listdir(folder))
    assert (folder.parents[1] / "latest").resolve() == folder
    assert self_launched.run_json()["status"] == "completed"
    assert self_launched.left_behind() == []


def test_torchrun_gives_the_same_losses_as_the_self_launched_run(self_launched: Job, tmp_path: Path) -> None:
    job = Job(TORCHRUN, "parallelism=fsdp", *STEPS, cwd=tmp_path)
    assert job.wait() == 0, job.stderr
    assert len(job.folders) == 1
    assert job.losses() == self_launched.losses()
    assert len(job.losses()) == 3
    assert job.left_behind() == []


def test_the_jobs_of_a_sweep_under_torchrun_have_a_folder_each(sweep_under_torchrun: Job, self_launched: Job) -> None:
    first, second = sweep_under_torchrun.folders
    assert (first.name[:2], second.name[:2]) == ("0_", "1_")
    assert first.parent == second.parent
    assert sweep_under_torchrun.losses()[:3] == self_launched.losses()
    assert sweep_under_torchrun.losses()[3:] != self_launched.losses()


def test_a_self_launched_sweep_starts_workers_for_each_job(self_launched: Job, tmp_path: Path) -> None:
    job = Job([*PYTHON, "-m"], *TWO, *STEPS, "seed=0,1", cwd=tmp_path)
    assert job.wait() == 0, job.stderr
    assert len(job.folders) == 2
    assert job.losses()[:3] == self_launched.losses()
    assert len(job.losses()) == 6


def test_a_wrong_configuration_under_torchrun_is_told_once(tmp_path: Path) -> None:
    job = Job(TORCHRUN, "parallelism=fsdp", "optimizer.lrr=1", cwd=tmp_path)
    assert job.wait(timeout_s=30) != 0
    assert job.stderr.count("optimizer.lrr: unknown key") == 1
    assert job.folders == []
    assert job.left_behind() == []


def test_two_machines_train_one_run(tmp_path: Path) -> None:
    script = ROOT / "tests" / "distributed" / "two_machines.sh"
    # Without what runs in this process have set for themselves: the interface of one machine, say.
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("GLOO_", "MASTER_", "TORCHELASTIC_"))
    }
    command = ["bash", script, sys.executable, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=clean)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------- where a process is told its place


def environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the function sets is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


TORCHRUN_SAYS = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_nobody_started_a_plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, MASTER_ADDR="left over")
    assert group_of_this_process() is None


def test_torchruns_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, **TORCHRUN_SAYS)
    assert group_of_this_process() == Group(rank=3, local_rank=1, world_size=4, local_world_size=2)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_half_set_variables_name_the_missing_one(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, **{name: value for name, value in TORCHRUN_SAYS.items() if name != missing})
    with pytest.raises(ConfigError, match=f"^{missing}: is not set, though"):
        group_of_this_process()


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "four")])
def test_impossible_variables_are_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, **TORCHRUN_SAYS | {name: value})
    with pytest.raises(ConfigError, match=f"^{name}: "):
        group_of_this_process()


def test_a_task_of_slurm_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(
        monkeypatch,
        SLURM_JOB_ID="1234",
        SLURM_STEP_NUM_TASKS="7",
        SLURM_STEP_TASKS_PER_NODE="2(x2),3",
        SLURM_STEP_NODELIST="gpu[03-04,09]",
        SLURM_PROCID="5",
        SLURM_LOCALID="1",
        SLURM_NODEID="2",
    )
    assert group_of_this_process() == Group(rank=5, local_rank=1, world_size=7, local_world_size=3)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03", "21234")


def test_a_batch_script_of_slurm_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM_JOB_ID="1234", SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert group_of_this_process() is None


def test_the_machine_of_the_endpoint_leads() -> None:
    assert leads(1, None)
    assert leads(2, "127.0.0.1:29400")
    assert not leads(2, "192.0.2.1:29400")  # an address that is nobody's (RFC 5737)


@pytest.mark.parametrize("endpoint", ["localhost", "localhost:http:", "no.such.host.invalid:29400"])
def test_an_endpoint_that_cannot_be_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"^parallelism\.rdzv_endpoint: "):
        addresses(endpoint)


def test_several_machines_need_an_endpoint() -> None:
    with pytest.raises(ConfigError, match=r"^parallelism\.rdzv_endpoint: is null"):
        leads(2, None)
