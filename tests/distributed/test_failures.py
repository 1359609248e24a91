"""A rank that dies or falls silent ends the whole job at once, with one error that says which, where and why."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.jobs import ENDLESS, PYTHON, TORCHRUN, Job

FACTS = re.compile(r"rank (\d), last in step (\d+), phase ([\w ]+), (died without a word|was killed by SIGKILL)")
PHASES = {
    "start",
    "read data",
    "build model",
    "restore",
    "data",
    "other",
    "forward",
    "backward",
    "optimizer",
    "eval",
    "save",
}
STARTS = {"self-launched": PYTHON, "torchrun": TORCHRUN}


def start(how: str, cwd: Path, *arguments: str) -> Job:
    return Job(STARTS[how], "parallelism=ddp", "parallelism.nproc_per_node=2", *ENDLESS, *arguments, cwd=cwd)


def kill_and_check(job: Job, rank: int, n_times: int = 1) -> None:
    victim = job.wait_for_ranks(2)[rank]
    others = [p for p in job.ranks() if p != victim]
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    while any(p in job.look() for p in others):
        assert time.monotonic() < killed + 10
        time.sleep(0.02)
    others_gone_s = time.monotonic() - killed
    exit_code = job.wait(timeout_s=10)
    assert exit_code == 1
    assert others_gone_s < 5  # 0.1 to 0.8 s on an idle machine
    assert job.left_behind(grace_s=killed + 5 - time.monotonic()) == []
    facts = FACTS.findall(job.stderr)
    assert len(facts) == n_times, job.stderr
    assert int(facts[-1][0]) == rank
    assert facts[-1][2] in PHASES
    run = job.run_json()
    assert run["status"] == "failed"
    assert FACTS.search(run["error"]["message"])


def test_a_killed_rank_is_restarted_and_the_second_time_ends_the_job(tmp_path: Path) -> None:
    job = start("self-launched", tmp_path, "parallelism.max_restarts=1")
    job.wait_for_step(10)
    first_start = job.ranks()
    first_start[1].send_signal(signal.SIGKILL)
    job.wait_until(lambda: not set(first_start) & set(job.look()), "end of the first attempt")
    job.wait_until(lambda: job.run_json()["resumed"], "second attempt")
    job.wait_for_step(job.run_json()["resumed"][0]["step"] + 10)
    steps = [line["step"] for line in job.metrics()]
    assert steps == sorted(set(steps)), "a step was logged twice"
    kill_and_check(job, rank=1, n_times=2)
    assert "going on from step" in job.stderr


def test_under_torchrun_the_survivors_of_rank_0_keep_its_folder(tmp_path: Path) -> None:
    job = start("torchrun", tmp_path)
    job.wait_for_step(10)
    kill_and_check(job, rank=0)


def test_a_silent_rank_ends_the_job_at_the_timeout_with_the_same_facts(tmp_path: Path) -> None:
    job = start("self-launched", tmp_path, "parallelism.timeout_s=3")
    job.wait_for_step(10)
    stop_and_check(job, 1, timeout_s=3)


def stop_and_check(job: Job, rank: int, timeout_s: float) -> None:
    job.wait_for_ranks(2)[rank].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert job.wait(timeout_s=timeout_s + 10) == 1
    assert timeout_s - 0.5 < time.monotonic() - stopped < timeout_s + 2
    assert re.search(rf"rank {rank}, last in step \d+, phase \w+, showed no sign of life for {timeout_s} s", job.stderr)
    assert job.stderr.count("sign of life") == 1
    assert job.run_json()["status"] == "failed"
    assert job.left_behind() == []


def test_ctrl_c_leaves_no_process_behind_and_exits_130(tmp_path: Path) -> None:
    job = start("self-launched", tmp_path)
    job.wait_for_step(10)
    job.interrupt()
    assert job.wait(timeout_s=15) == 130
    assert job.left_behind() == []
    assert job.run_json()["status"] == "preempted"
    assert "Traceback" not in job.stderr


def test_a_mistake_of_the_user_that_only_workers_see_is_told_once_with_its_exit_code(tmp_path: Path) -> None:
    job = start("self-launched", tmp_path, "seq_len=48", "dataset.too_long=error")
    assert job.wait() == 2
    assert job.stderr.count("dataset.too_long: ") == 1
    assert "Traceback" not in job.stderr
    assert job.run_json()["status"] == "failed"
    assert job.left_behind() == []


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(20))
def test_a_rank_killed_at_any_instant_ends_the_job(trial: int, tmp_path: Path) -> None:
    how = random.choice(list(STARTS))
    job = start(how, tmp_path)
    job.wait_for_ranks(2)
    if how == "torchrun":  # before there is a folder, nobody but torchrun is left to tell
        job.wait_until(lambda: job.folders, "folder")
    time.sleep(random.uniform(0, 10))
    kill_and_check(job, random.randrange(2))


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(5))
def test_a_rank_stopped_at_any_instant_ends_the_job_at_the_timeout(trial: int, tmp_path: Path) -> None:
    job = start("self-launched", tmp_path, "parallelism.timeout_s=4")
    job.wait_for_step(10)
    time.sleep(random.uniform(0, 5))
    stop_and_check(job, random.randrange(2), timeout_s=4)
