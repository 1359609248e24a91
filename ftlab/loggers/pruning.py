"""The job of a search tells its study how validation goes, and ends when the study has no hope left for it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlab.errors import ConfigError
from ftlab.loggers.base import RunInfo
from ftlab.outputs.files import to_json
from ftlab.outputs.folder import Status
from ftlab.outputs.sweep import PRUNED
from ftlab.storage.disk import replace_file

log = logging.getLogger(__name__)

JOURNAL = "study.journal"
_NAME = "sweep"


def load_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("hydra/sweeper", "optuna is not installed", "pip install 'ftlab[sweeps]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(folder: Path, **creation: Any) -> Any:
    """The study in a sweep's folder.

    A journal, not a database: it is only ever appended to, so a kill costs one line at most, and it works on network
    disks.

    Args:
        creation: what a new study needs: ``direction, sampler``; empty to open one that is there.
    """
    optuna = load_optuna()
    journal = optuna.storages.journal
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(folder / JOURNAL)))
    if creation:
        return optuna.create_study(storage=storage, study_name=_NAME, load_if_exists=True, **creation)
    return optuna.load_study(storage=storage, study_name=_NAME)


def pruner(rule: Mapping[str, Any]) -> Any:
    """Optuna's pruner for ``{"name": "median", "startup_trials": 4, "warmup_evaluations": 1}``."""
    pruners = load_optuna().pruners
    if rule["name"] == "none":
        return pruners.NopPruner()
    if rule["name"] == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=rule["warmup_evaluations"] + 1, reduction_factor=2)
    return pruners.MedianPruner(n_startup_trials=rule["startup_trials"], n_warmup_steps=rule["warmup_evaluations"])


class Pruning:
    """Reports to trial ``number`` of the study in ``folder``, and stops the run as SIGUSR1 would: saved, on all ranks.

    Evaluations are counted, not steps: trials of different batch sizes are compared at equal shares of the way.
    """

    def __init__(self, folder: Path, number: int, metric: str):
        self._metric, self._evaluations, self._folder = metric, 0, Path()
        study = open_study(folder)
        study.pruner = pruner(study.user_attrs["pruner"])
        trial_id = study.get_trials(deepcopy=False)[number]._trial_id
        self._trial = load_optuna().trial.Trial(study, trial_id)

    def start(self, info: RunInfo) -> None:
        self._folder = info.folder
        told = self._trial.study.get_trials(deepcopy=False)[self._trial.number].intermediate_values
        self._evaluations = max(told, default=0) if info.first_step else 0  # a job that goes on has told some already

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if not step or self._metric not in metrics:
            return
        value = metrics[self._metric]
        self._evaluations += 1
        self._trial.report(value, self._evaluations)
        if self._trial.should_prune():
            replace_file(self._folder / PRUNED, to_json({"step": step, "value": value}) + "\n")
            log.info("pruned after step %d: %s %.4f is no better than most trials had here", step, self._metric, value)
            signal.raise_signal(signal.SIGUSR1)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        pass

    def finish(self, status: Status, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        pass
