"""Jobs on this machine: a process each, some side by side, each with its share of the GPUs or cores."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from ftlab import ctrl_c
from ftlab.distributed.started import group_of_this_process
from ftlab.errors import ConfigError, FtlabError, Interrupted
from ftlab.outputs.killed import Watch
from ftlab.outputs.sweep import fail

log = logging.getLogger(__name__)


class LocalLauncher(Launcher):
    """Runs jobs here, at most ``jobs_at_once`` of them at a time.

    Under torchrun or Slurm the ranks of this process's group run each job together, one job after another.
    """

    def __init__(self, jobs_at_once: int):
        self.jobs_at_once = jobs_at_once
        self.on_end: Callable[[], None] = lambda: None  # after each job

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = [self._compose(job, initial_job_idx + i) for i, job in enumerate(job_overrides)]
        if (group := group_of_this_process()) is None or group.world_size == 1:
            return _Pool(self.task_function, self.jobs_at_once, self.on_end).run(configs)
        if self.jobs_at_once > 1:
            problem = (
                f"{self.jobs_at_once}, but the {group.world_size} processes started together run one job at a time"
            )
            raise ConfigError("sweep.jobs_at_once", problem, "sweep.jobs_at_once=1")
        return [self._run_with_the_group(config) for config in configs]

    def _compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.hydra.runtime.choices = dict(config.hydra.runtime.choices)
        return config

    def _run_with_the_group(self, config: DictConfig) -> JobReturn:
        _say(config)
        result = _run(self.task_function, config)
        self.on_end()
        if (exit_code := result.return_value) > 128:  # someone wanted it so, and means the sweep
            raise Interrupted(exit_code - 128)
        return result


def _say(config: DictConfig) -> None:
    number, _, overrides = Path(config.hydra.sweep.subdir).name.partition("_")
    log.info("#%s : %s", number, overrides)


def _run(task: TaskFunction, config: DictConfig) -> JobReturn:
    from hydra._internal.callbacks import Callbacks

    return run_job(
        # Of the context, a job only asks for callbacks.
        hydra_context=HydraContext(config_loader=None, callbacks=Callbacks(config)),  # type: ignore[arg-type]
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


class _Pool:
    """Processes, at most ``size`` at a time, each told which share of the machine is its own."""

    def __init__(self, task: TaskFunction, size: int, on_end: Callable[[], None]):
        self._task, self._on_end, self._size = task, on_end, size
        self._shares = list(range(size))  # those that nobody has
        self._running: dict[Any, tuple[BaseProcess, DictConfig, int, Watch]] = {}  # by sentinel
        self._results: dict[int, JobReturn] = {}  # by the job's number

    def run(self, configs: Sequence[DictConfig]) -> list[JobReturn]:
        from ftlab.training.wishes import ending_on_signals

        waiting = list(configs)
        with ending_on_signals():
            try:
                while waiting or self._running:
                    ctrl_c.heed()
                    while waiting and self._shares:
                        self._start(waiting.pop(0))
                    self._end_some()
            except KeyboardInterrupt as interrupt:
                self._close(interrupt.number if isinstance(interrupt, Interrupted) else None)
                raise
        return [self._results[config.hydra.job.num] for config in configs]

    def _start(self, config: DictConfig) -> None:
        _say(config)
        share = self._shares.pop(0)
        gpus = share_of(visible_gpus(), share, self._size)
        # spawn, not fork: nothing of this process (locks, threads, CUDA) is there to trip over.
        process = multiprocessing.get_context("spawn").Process(
            target=_job, args=(self._task, config, share, self._size, gpus)
        )
        process.start()
        self._running[process.sentinel] = (process, config, share, Watch())

    def _end_some(self) -> None:
        for sentinel in wait(list(self._running)):
            process, config, share, watch = self._running.pop(sentinel)
            process.join()
            self._shares.append(share)
            self._shares.sort()
            exit_code = process.exitcode
            assert exit_code is not None
            if exit_code < 0:  # it could not say so itself
                error = watch.explain(-exit_code)
                print(error, file=sys.stderr)
                fail(folder_of(config), error)
                exit_code = 128 - exit_code
            elif exit_code:
                fail(
                    folder_of(config),
                    FtlabError(f"the job's process ended with exit code {exit_code}, see console.log"),
                )
            result = JobReturn(status=JobStatus.COMPLETED, cfg=None, hydra_cfg=None)
            result.return_value = exit_code
            self._results[config.hydra.job.num] = result
            self._on_end()

    def _close(self, number: int | None) -> None:
        """Let the jobs save and leave; Ctrl-C has reached them already, another signal is passed on."""
        for process, *_ in self._running.values():
            if number is not None and process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        while self._running:
            self._end_some()


def folder_of(config: DictConfig) -> Path:
    """The folder of the job that ``config`` describes."""
    return Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()


# ---- in the job's own process


def _job(task: TaskFunction, config: DictConfig, share: int, n_shares: int, gpus: list[str]) -> None:
    ctrl_c.remember()
    _follow_parent()
    if n_shares > 1:
        _keep_to_share(share, n_shares, gpus)
        _write_to(folder_of(config) / "console.log")  # side by side on one terminal nobody could read them
    from hydra.core.utils import JobRuntime

    from ftlab.config.compose import prepare

    prepare()
    JobRuntime.instance().set("name", config.hydra.job.name)
    HydraConfig.instance().set_config(config)
    result = _run(partial(task, own_process=False), config)  # type: ignore[call-arg]
    sys.exit(result.return_value)


def _follow_parent() -> None:
    """End like a run that is told to, saved, when the sweep's own process is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _keep_to_share(share: int, n_shares: int, gpus: list[str]) -> None:
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share_of(sorted(os.sched_getaffinity(0)), share, n_shares))


def _write_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def visible_gpus() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` may name on this machine."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch  # loaded already: the check of the command line has looked at every target

    return [str(i) for i in range(torch.cuda.device_count())]


def share_of(things: Sequence[Any], share: int, n_shares: int) -> list[Any]:
    """An equal part of ``things``; where there are fewer things than shares, some shares have one in common."""
    if len(things) < n_shares:
        return [things[share % len(things)]] if things else []
    return list(things[share * len(things) // n_shares : (share + 1) * len(things) // n_shares])
