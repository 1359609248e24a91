"""A search: Optuna chooses the values of each job by how the jobs before it went, and gives up hopeless ones."""

from __future__ import annotations

import math
import warnings
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig

from ftlab.errors import ConfigError
from ftlab.loggers.pruning import load_optuna, open_study
from ftlab.outputs.sweep import Job
from ftlab.storage.checkpoints import less_is_better
from hydra_plugins.ftlab_sweeps.sweeper import GridSweeper


class OptunaSweeper(GridSweeper):
    """Asks a study for values, and tells it how validation ended.

    Hydra's own plugin for Optuna needs Optuna 2 of 2021, runs its trials without pruning, and keeps nothing of a sweep
    that was killed; the part of it that was wanted is this file.

    Args:
        params: key to ``interval(low, high)``, ``tag(log, interval(low, high))``, ``range(...)`` or ``choice(...)``;
            the same on the command line takes its place.
        n_trials: jobs in all, those of earlier sessions included.
        sampler: ``tpe``, ``gp`` or ``random``.
        seed: of the sampler.
        pruner: ``median``, ``halving`` or ``none``.
        startup_trials: that are never pruned: the first ones, which the others are compared with.
        warmup_evaluations: of every trial, before it may be pruned.
    """

    def __init__(
        self,
        params: DictConfig | None,
        n_trials: int,
        sampler: str,
        seed: int | None,
        pruner: str,
        startup_trials: int,
        warmup_evaluations: int,
    ):
        super().__init__(params)
        self.n_trials, self.sampler, self.seed = n_trials, sampler, seed
        self.pruner = {"name": pruner, "startup_trials": startup_trials, "warmup_evaluations": warmup_evaluations}

    def _is_settled(self, job: Job) -> bool:
        return job.is_done or job.kind == "diverged"  # which is an answer, too

    def _run(self, arguments: list[str]) -> None:
        typed = {one.get_key_element(): one for one in self._parsed(arguments)}
        self._fixed = [text for text in arguments if not typed[_key_of(text)].is_sweep_override()]
        self._space = {key: distribution(one) for key, one in typed.items() if one.is_sweep_override()}
        if not self._space:
            problem = "nothing to search: no key has a range"
            raise ConfigError("hydra.sweeper.params", problem, "optimizer.lr='tag(log,interval(1e-5,1e-2))'")
        self._study = self._open()
        self._tried: set[int] = set()  # trials of this session
        while batch := self._next():
            self._tried |= {trial.number for _, trial in batch}
            self.launch([job for job, _ in batch if not self._is_settled(job)])
            for job, trial in batch:
                self._tell_study(job, trial)

    def _open(self) -> Any:
        metric = self.master.evaluation.metric
        study = open_study(
            self.path, direction="minimize" if less_is_better(metric) else "maximize", sampler=self._sampler()
        )
        study.set_user_attr("pruner", self.pruner)
        return study

    def _sampler(self) -> Any:
        samplers = load_optuna().samplers
        done = len(self.folder.jobs)  # another seed each time that a search goes on, or it would draw the same again
        seed = None if self.seed is None else self.seed + done
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the Gaussian process is marked experimental
            if self.sampler == "tpe":
                return samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
            return {"gp": samplers.GPSampler, "random": samplers.RandomSampler}[self.sampler](seed=seed)

    def _next(self) -> list[tuple[Job, Any]]:
        """The next jobs with their trials: first those that earlier sessions left open, then new ones."""
        optuna, size = load_optuna(), int(self.master.sweep.jobs_at_once)
        known = self._study.get_trials(deepcopy=False)
        running = optuna.trial.TrialState.RUNNING
        left = [one for one in known if one.state == running and one.number not in self._tried][:size]
        trials = [optuna.trial.Trial(self._study, one._trial_id) for one in left]
        n_new = min(size - len(trials), self.n_trials - len(known))
        trials += [self._study.ask(self._space) for _ in range(n_new)]
        batch = [(self._job(trial.number, trial.params), trial) for trial in trials]
        self.folder.refresh()
        return batch

    def _job(self, number: int, values: dict[str, Any]) -> Job:
        return self.job([*self._fixed, *(f"{key}={value}" for key, value in values.items()), f"sweep.trial={number}"])

    def _tell_study(self, job: Job, trial: Any) -> None:
        if job.status == "completed" and job.value is not None and math.isfinite(job.value):
            self._study.tell(trial, job.value)
        elif self._is_settled(job):
            # Diverged, too: Optuna ranks pruned trials below all others, but learns nothing from failed ones.
            self._study.tell(trial, state=load_optuna().trial.TrialState.PRUNED)
        # Else the trial stays open, for a session that goes on with the sweep.

    def _tell(self) -> None:
        super()._tell()
        done = [job for job in self.folder.jobs if job.status == "completed" and job.value is not None]
        if done:
            sign = 1 if less_is_better(self.folder.about["metric"]) else -1
            best = min(done, key=lambda job: sign * (job.value or 0.0))
            print(f"best: #{best.number}  {self.folder.about['metric']} {best.value:.4f}  {self.path / best.folder}")


def distribution(swept: Override) -> Any:
    """Optuna's distribution for a sweep in Hydra's grammar; an ``interval`` may have the tags ``log, int``."""
    distributions = load_optuna().distributions
    value = swept.value()
    if isinstance(value, IntervalSweep):
        log, low, high = "log" in value.tags, value.start, value.end
        assert low is not None
        assert high is not None
        if "int" in value.tags:
            return distributions.IntDistribution(int(low), int(high), log=log)
        return distributions.FloatDistribution(float(low), float(high), log=log)
    texts = list(swept.sweep_string_iterator())
    if swept.is_range_sweep() and all(text.lstrip("-").isdigit() for text in texts):
        numbers = sorted(map(int, texts))
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        return distributions.IntDistribution(numbers[0], numbers[-1], step=step)
    return distributions.CategoricalDistribution(texts)


def _key_of(text: str) -> str:
    return OverridesParser.create().parse_override(text).get_key_element()
