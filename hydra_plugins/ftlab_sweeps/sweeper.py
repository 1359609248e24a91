"""A sweep over given values, kept in ``sweep.json`` so that it can be gone on with."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ftlab.config.build import build
from ftlab.config.compose import CONF
from ftlab.config.sweeps import of_the_jobs
from ftlab.errors import ConfigError, FtlabError
from ftlab.outputs.files import shortest, to_yaml
from ftlab.outputs.secrets import mask_secrets
from ftlab.outputs.sweep import Job, SweepFolder
from ftlab.storage.disk import replace_file
from ftlab.typed import argument, override

log = logging.getLogger(__name__)


class GridSweeper(Sweeper):
    """Every combination of the values given on the command line and in ``params``, in Hydra's grammar."""

    def __init__(self, params: DictConfig | None):
        self.params: dict[str, Any] = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.master = hydra_context, config
        self.engine: Any = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run what is not done yet of the sweep in ``hydra.sweep.dir``; ends the process with its worst exit code."""
        # Absolute, and settled now: a job may be composed on another machine, at another time.
        self.path = Path(self.master.hydra.sweep.dir).absolute()
        settings = [text for text in self.master.hydra.overrides.hydra if not text.startswith("hydra.mode=")]
        self.folder = SweepFolder.begin(self.path, [*settings, *arguments], self.master.evaluation.metric)
        master = OmegaConf.to_container(self.master, resolve=False, enum_to_str=True)
        replace_file(self.path / "multirun.yaml", to_yaml(mask_secrets(master)))
        if hasattr(self.engine, "on_end"):
            self.engine.on_end = self._look
        self.exit_codes: dict[int, int] = {}  # by the job's number
        try:
            self._run(of_the_jobs(arguments))
        finally:
            self.folder.end()
            self._tell()
        unsettled = [job.number for job in self.folder.jobs if not self._is_settled(job)]
        sys.exit(max((self.exit_codes.get(number, 1) for number in unsettled), default=0))

    def _is_settled(self, job: Job) -> bool:
        """Whether the sweep has of ``job`` what it wants."""
        return job.is_done

    def _run(self, arguments: list[str]) -> None:
        """Run the jobs that ``arguments`` make."""
        [combinations] = BasicSweeper.split_arguments(self._parsed(arguments), max_batch_size=None)
        jobs = [self.job(overrides) for overrides in combinations]
        self.folder.refresh()
        self.launch([job for job in jobs if not job.is_done])

    def _parsed(self, arguments: Sequence[str]) -> list[Override]:
        """``params``, then ``arguments``, which may take their place."""
        parser = OverridesParser.create(self.context.config_loader)
        return parser.parse_overrides([*(f"{k}={v}" for k, v in self.params.items()), *arguments])

    def job(self, overrides: Sequence[str]) -> Job:
        """The sweep's job with these overrides, a new one if it has none."""
        if (known := self.folder.job_of(overrides)) is not None:
            return known
        config = self.context.config_loader.load_sweep_config(self.master, list(overrides))
        with open_dict(config):
            config.hydra.job.num = len(self.folder.jobs)
        return self.folder.add(overrides, str(config.hydra.sweep.subdir))

    def launch(self, jobs: Sequence[Job]) -> None:
        """Run ``jobs`` to their ends, whatever these are."""
        free = list(self.folder.wait_for_leftovers(jobs))
        for job in jobs:
            if job not in free:
                log.warning("#%d is still running in a process of its own, and left alone", job.number)
        if not free:
            return
        # A batch for the launcher has consecutive numbers; a job's own one is in its folder's name.
        results: Sequence[JobReturn] = []
        _prepare_environment()
        try:
            results = self.engine.launch([self._told(job) for job in free], initial_job_idx=free[0].number)
        except FtlabError:
            raise
        except Exception as error:  # of an engine, which lost a job; the jobs' own folders say how they are
            log.warning("%s: %s", type(error).__name__, str(error).strip().splitlines()[0] if str(error) else "")
        self.folder.refresh()
        self.exit_codes |= {job.number: _exit_code(result) for job, result in zip(free, results, strict=False)}

    def _told(self, job: Job) -> list[str]:
        where = {"hydra.sweep.dir": str(self.path), "hydra.sweep.subdir": job.folder}
        return [*job.overrides, *(argument(key, value) for key, value in where.items())]

    def _look(self) -> None:
        """After each job: what became of it."""
        before = {job.number: job.status for job in self.folder.jobs}
        self.folder.refresh()
        for job in self.folder.jobs:
            if job.status != before[job.number] and job.status != "running":
                print(self._line(job), flush=True)

    def _tell(self) -> None:
        """A line for each job, and where it all is."""
        print("\n" + "\n".join(map(self._line, self.folder.jobs)))
        print(f"sweep: {shortest(self.path)}")
        self._report()
        if not all(job.is_done for job in self.folder.jobs):
            again = override("sweep.resume", str(shortest(self.path)))
            print(f"what is missing or failed:   python train.py {again}")

    def _report(self) -> None:
        """report.html on all jobs, where what draws it is installed; in W&B too, where the jobs are."""
        from ftlab.lab.report import write_report

        if all(job.status == "pending" for job in self.folder.jobs):
            return
        try:
            print(f"report: {shortest(write_report([self.path], self.path, title=self.path.name))}")
        except ConfigError as error:
            print(f"no report: {error.problem}" + (f"; try: {error.fix}" if error.fix else ""))
        if (node := self.master.logger.get("wandb")) is not None:
            settings = OmegaConf.to_container(node, resolve=True)
            assert isinstance(settings, dict)
            logger = build({str(key): value for key, value in settings.items()})
            statuses = Counter(f"jobs/{job.status}" for job in self.folder.jobs)
            logger.show_sweep(self.path, self.folder.about["id"], dict(statuses))

    def _line(self, job: Job) -> str:
        value = "" if job.value is None else f"{self.folder.about['metric']} {job.value:.4f}"
        status = f"{job.status}, {job.kind}" if job.kind else job.status
        return f"#{job.number:<3} {status:<22} step {job.step:<6} {value:<18} {' '.join(self.folder.varying(job))}"


def _prepare_environment() -> None:
    """What processes that engines start need to know; they do not begin with train.py, but with the engine's own."""
    paths = [str(CONF.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    # Slurm's warning before time is up, as submitit asks for it: the signal that a run takes as "save and stop".
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")


def _exit_code(result: JobReturn) -> int:
    if result.status != JobStatus.COMPLETED:
        return 1
    return int(result.return_value or 0)
