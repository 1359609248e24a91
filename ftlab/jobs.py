"""Where a job runs: in this process, in workers started for it, or with those that torchrun or Slurm started."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ftlab import ctrl_c
from ftlab.config.build import build
from ftlab.distributed.base import Workers
from ftlab.distributed.board import RankError
from ftlab.distributed.env import WorkerEnv, share_cores
from ftlab.distributed.launch import first_failure, last_word, leave, n_local_workers, start_workers
from ftlab.distributed.meeting import Jobs, attempt, job_store, meet
from ftlab.distributed.started import group_of_this_process, leads
from ftlab.errors import ConfigError, Interrupted
from ftlab.outputs.folder import RunFolder, claim_lent, lent
from ftlab.outputs.killed import Watch
from ftlab.outputs.sweep import fail
from ftlab.run import Config, train, train_in_team
from ftlab.training.wishes import ending_on_signals


def launch(config: Config, *, own_process: bool) -> int:
    """Train ``config``: here, in workers started for it, or together with the group that this process belongs to.

    Args:
        own_process: never in this very process, so that the jobs of a sweep share no state.

    Returns:
        The exit code: 0 completed, 1 a bug or the machine, 2 bad input, 3 non-finite numbers; 130, 138, 143: stopped
        by SIGINT, SIGUSR1, SIGTERM.
    """
    ctrl_c.heed()
    settings = build(config["parallelism"])
    group = group_of_this_process()
    if group is not None and group.world_size > 1 and not isinstance(settings, Workers):
        problem = f"this one is for a single process, but {group.world_size} were started together"
        raise ConfigError("parallelism", problem, "parallelism=fsdp")
    if not isinstance(settings, Workers):
        config = with_seed(config)
        return _in_own_process(_train_alone, config) if own_process else _train_alone(config)
    if group is not None:
        job: Config = {"config": with_seed(config), "own_process": own_process}
        exit_code = _join(**job, number=_jobs().hand_out(job))
        if exit_code and not own_process:
            leave(exit_code)  # so do the others, without waiting for another word
        return exit_code
    n_local = n_local_workers(settings, config["device"])
    if settings.nnodes > 1 and own_process:
        problem = f"is {settings.nnodes}, but a sweep starts workers on this machine only"
        raise ConfigError("parallelism.nnodes", problem, "torchrun --nnodes ... train.py -m ...")
    if n_local * settings.nnodes == 1 and not settings.max_restarts:
        config = with_seed(config)
        return _in_own_process(_train_alone, config) if own_process else _train_alone(config)
    return _start(config, settings, n_local)


def with_seed(config: Config) -> Config:
    """``config`` with its seed drawn if it has none: once, before any worker starts, and recorded like a given one."""
    return config | {"seed": secrets.randbelow(2**31)} if config["seed"] is None else config


def _train_alone(config: Config) -> int:
    return train(config, WorkerEnv.alone(config["device"]))


def _in_own_process(work: Callable[..., int], config: Config, *args: Any) -> int:
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method("spawn", force=True)  # joblib's workers have one that a child does not know
    # spawn, not fork: threads of this process (BLAS, W&B) do not survive a fork.
    process = multiprocessing.get_context("spawn").Process(target=_and_leave, args=(work, config, *args))
    watch = Watch()
    process.start()
    try:
        with ending_on_signals():
            process.join()
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Interrupted):
            os.kill(process.pid or 0, interrupt.number)
        process.join()  # Ctrl-C reached the child as well: let it close its folder
        raise
    assert process.exitcode is not None
    if process.exitcode < 0:  # killed: it could not say so itself
        error = watch.explain(-process.exitcode)
        print(error, file=sys.stderr)
        fail(Path(config["paths"]["output_dir"]), error)
        return 128 - process.exitcode
    return process.exitcode


def _and_leave(work: Callable[..., int], *args: Any) -> None:
    if exit_code := work(*args):
        leave(exit_code)


# ---- workers that others started: torchrun, Slurm


@cache
def _jobs() -> Jobs:
    group = group_of_this_process()
    assert group is not None
    return Jobs(group)


def follow() -> int:
    """Run what rank 0 of this process's group composes, job after job, until it says so; returns the exit code."""
    while True:
        job, number = _jobs().take()
        if "exit_code" in job:
            _jobs().go()
            return job["exit_code"]
        exit_code = _join(**job, number=number)
        if exit_code and not job["own_process"]:
            leave(exit_code)


def dismiss(exit_code: int) -> None:
    """Send the ranks that ``follow`` home, with their exit code."""
    with suppress(ConfigError):  # there is nowhere to meet them, which has been said
        _jobs().end(exit_code)


def _join(config: Config, own_process: bool, number: int) -> int:
    return _in_own_process(_train_joined, config, number) if own_process else _train_joined(config, number)


def _train_joined(config: Config, number: int) -> int:
    group = group_of_this_process()
    assert group is not None
    worker = replace(WorkerEnv.here(config["device"]), store=job_store(group, number))
    share_cores(worker.local_world_size)
    return train_in_team(config, worker, None)


# ---- workers of our own


def _start(config: Config, settings: Workers, n_local: int) -> int:
    leading = leads(settings.nnodes, settings.rdzv_endpoint)
    if leading:
        config = with_seed(config)
    folder = Path(config["paths"]["output_dir"]) if leading else None  # of another machine the leader's is used
    scratch = Path(tempfile.mkdtemp(prefix="ftlab-"))
    try:
        with nullcontext() if folder is None else lent(folder):
            failed = start_workers(settings, n_local, scratch, _work, config, scratch, leading)
            if not failed:
                return 0
            failure = first_failure(scratch, settings, n_local, failed)
            if folder is not None and (lost := RunFolder.of_a_lost_process(folder)) is not None:
                print(failure.message, file=sys.stderr)  # no worker lived to tell
                lost.finish("preempted" if failure.interrupted else "failed", error=RankError(failure))
            return failure.exit_code
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _work(config: Config, scratch: Path, leading: bool) -> None:
    group = group_of_this_process()
    assert group is not None
    if attempt() and (exit_code := last_word(scratch, group.local_world_size)) is not None:
        leave(exit_code)
    worker = meet(WorkerEnv.here(config["device"]), group, leads=leading)
    if leading and worker.rank == 0:
        claim_lent(Path(config["paths"]["output_dir"]))
    if exit_code := train_in_team(config, worker, scratch):
        leave(exit_code)
