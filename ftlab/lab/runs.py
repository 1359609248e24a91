"""Run folders as plain records, in whatever state they are: running, killed, torn by a full disk. Without torch."""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ftlab.config.layers import leaves
from ftlab.config.overrides import given_values
from ftlab.config.targets import in_todays_names
from ftlab.errors import ConfigError
from ftlab.outputs.files import read_yaml
from ftlab.outputs.folder import is_held, read_record
from ftlab.outputs.sweep import FILE as SWEEP
from ftlab.outputs.sweep import Job, SweepFolder

Row = dict[str, Any]
Series = list[tuple[int, float | None]]  # step and value; None where it was not finite

PLACES = (Path("outputs"), Path("multirun_outputs"))
"""Where runs are made, unless their user says otherwise."""

# libyaml's parser, where PyYAML was built with it, reads a configuration in a tenth of the time.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunRecord:
    """One run's folder; each file is read when it is first asked for, and what cannot be read is empty.

    Attributes:
        folder: absolute, links resolved.
        job: what its sweep knows of it, in the form of a ``run.json``; only where it has none itself.
    """

    folder: Path
    job: Row | None = None

    @cached_property
    def record(self) -> Row:
        """``run.json``."""
        try:
            return read_record(self.folder)
        except (OSError, ValueError, RecursionError):
            return self.job or {}

    @cached_property
    def config(self) -> Row:
        """``config.yaml``, resolved, secrets masked, in today's names."""
        try:
            found = in_todays_names(_yaml(self.folder / "config.yaml"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """``config`` flat: dotted key and value, a list is one value; of a job that never had one, its overrides."""
        return {str(key): value for key, value in leaves(self.config)} or given_values(self.overrides)

    @cached_property
    def overrides(self) -> list[str]:
        """What the user typed, as Hydra noted it."""
        found = _yaml(self.folder / ".hydra" / "overrides.yaml") or self.part("job").get("overrides")
        return [str(item) for item in found] if isinstance(found, list) else []

    @cached_property
    def choices(self) -> dict[str, str]:
        """The option of each group, as Hydra noted it, whether it was typed or is a default."""
        found = _yaml(self.folder / ".hydra" / "hydra.yaml")
        for name in ("hydra", "runtime", "choices"):
            found = found.get(name) if isinstance(found, dict) else None
        return {str(group): str(option) for group, option in found.items()} if isinstance(found, dict) else {}

    @cached_property
    def metrics(self) -> list[Row]:
        """The lines of ``metrics.jsonl`` in the order of their steps."""
        return list(read_jsonl(self.folder / "metrics.jsonl"))

    @cached_property
    def samples(self) -> list[Row]:
        """The lines of ``samples.jsonl``."""
        return list(read_jsonl(self.folder / "samples.jsonl"))

    @cached_property
    def evaluations(self) -> list[Row]:
        """What ``ftlab evaluate`` found, from ``evaluation.json``."""
        try:
            found = json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return []
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    @property
    def evaluations_by_step(self) -> list[Row]:
        """``evaluations`` in the order of the steps that were measured; of one step the newest comes last."""

        def step(evaluation: Row) -> int:
            found = evaluation.get("step")
            return found if isinstance(found, int) else 0

        return sorted(self.evaluations, key=step)

    @property
    def id(self) -> str:
        """The run's own, for ever; empty where it is not known."""
        return str(self.record.get("id", ""))

    @property
    def name(self) -> str:
        """The name its user gave it; its folder's where that is not known."""
        return str(self.record.get("name") or self.config.get("run_name") or self.folder.name)

    @property
    def seed(self) -> int | None:
        """The one it ran with, drawn or given."""
        seed = self.record.get("seed", self.config.get("seed"))
        return seed if isinstance(seed, int) else None

    @cached_property
    def status(self) -> str:
        """``running``, ``completed``, ``failed`` or ``preempted``; ``pruned``: a search gave it up; ``lost``: it says
        running, but its process is gone; ``pending``: a sweep's job that has not begun; ``unknown``: there is no
        ``run.json`` that can be read."""
        status = str(self.record.get("status", "unknown"))
        if status == "preempted" and (self.folder / "pruned.json").is_file():
            return "pruned"
        return "lost" if status == "running" and self._writer_is_gone() else status

    @property
    def goes_on(self) -> bool:
        """Whether there will be more of it: it is running, or its sweep is and has not come to it yet."""
        return self.status == "running" or (self.status == "pending" and is_held(self.folder.parent))

    @property
    def error(self) -> dict[str, str] | None:
        """``type`` and ``message`` of what ended it, and ``kind`` where that is known; None where nothing did."""
        found = self.record.get("error")
        if isinstance(found, dict):
            return {str(key): str(value) for key, value in found.items()}
        return None if found is None else {"type": "", "message": str(found)}

    def part(self, name: str) -> Row:
        """An object inside ``run.json``, e.g. ``progress``; empty where there is none."""
        found = self.record.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as anything in the folder says."""
        done = self.part("progress").get("step")
        return done if isinstance(done, int) else max((row["step"] for row in self.metrics), default=0)

    @cached_property
    def final_metrics(self) -> dict[str, float | None]:
        """The newest value of every metric: the run's own summary, or its last lines where there is none yet."""
        summary = dict(self.part("metrics"))
        if not summary:
            for row in self.metrics:
                summary |= {key: value for key, value in row.items() if key not in ("step", "non_finite")}
        return {str(key): value for key, value in summary.items() if value is None or _is_number(value)}

    @property
    def metric_names(self) -> list[str]:
        """Every metric that was logged, in the order of first appearance."""
        names = dict.fromkeys(key for row in self.metrics for key in row)
        return [name for name in names if name not in ("step", "non_finite")]

    def series(self, metric: str) -> Series:
        """Steps and values of ``metric``; empty where it was never logged."""
        rows = ((row["step"], row[metric]) for row in self.metrics if metric in row)
        return [(step, value if _is_number(value) else None) for step, value in rows]

    def _writer_is_gone(self) -> bool:
        """Whether the process that wrote the folder was of this machine and has ended."""
        try:
            holder = (self.folder / ".lock").read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        found = re.fullmatch(r"process (\d+) on (.*)", holder.strip())
        if not found or found[2] != platform.node():
            return False
        try:
            os.kill(int(found[1]), 0)  # sends nothing; only asks
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


def find_runs(paths: Iterable[Path]) -> list[RunRecord]:
    """Every run in ``paths``: run folders themselves, and all that lie below other folders; oldest first, each once.

    Raises:
        ConfigError: a path does not exist, or there is no run in it.
    """
    paths = list(paths)
    found = find_jobs(paths)
    runs = [one for one in found if one.job is None]
    if found and not runs:
        counts = ", ".join(f"{n} {status}" for status, n in Counter(job.status for job in found).items())
        folders = " ".join(map(str, paths))
        raise ConfigError("FOLDER", f"no job has begun a run in {folders}: {counts}", f"ftlab report {folders}")
    return runs


def find_jobs(paths: Iterable[Path]) -> list[RunRecord]:
    """As `find_runs`, and then the jobs of sweeps in ``paths`` that have left no run: pending ones, lost ones.

    Raises:
        ConfigError: a path does not exist, or there is neither in it.
    """
    runs: dict[Path, RunRecord] = {}
    others: dict[Path, RunRecord] = {}
    for path in paths:
        here = path.expanduser()
        if not here.is_dir():
            raise ConfigError("FOLDER", f"there is no folder {path}", _elsewhere(here))
        folders = list(_below(here.resolve()))
        found = {folder: RunRecord(folder) for folder in folders if is_run(folder)}
        absent = {job.folder: job for folder in folders for job in _jobs_without_runs(folder)}
        if not found and not absent:
            raise ConfigError("FOLDER", f"there is no run in {path}", _elsewhere(here))
        runs, others = runs | found, others | absent
    # "~": what does not say when it began comes last
    in_order = sorted(runs.values(), key=lambda run: (str(run.record.get("started", "~")), natural(str(run.folder))))
    return in_order + list(others.values())


def _elsewhere(here: Path) -> str:
    """Where there may be runs, if not ``here``."""
    places = [str(place) for place in PLACES if place.is_dir() and place.resolve() != here.resolve()]
    return " or ".join(places) or "python train.py, which makes one"


def _jobs_without_runs(folder: Path) -> Iterator[RunRecord]:
    """Of the sweep in ``folder``, if it is one's."""
    if (folder / SWEEP).is_file():
        with suppress(ConfigError):  # its sweep.json cannot be read
            sweep = SweepFolder.noted(folder)
            for job in sweep.jobs:
                if not is_run(folder / job.folder):
                    yield RunRecord(folder / job.folder, _as_record(job, sweep))


def _as_record(job: Job, sweep: SweepFolder) -> Row:
    error = {"type": job.kind or "error", "kind": job.kind or "error", "message": job.error}
    return {
        "status": job.status,
        "error": error if job.error else None,
        "progress": {"step": job.step},
        "metrics": {} if job.value is None else {sweep.about.get("metric", "val/loss"): job.value},
        "duration_s": job.duration_s,
        "job": {"overrides": job.overrides},
    }


def _below(folder: Path) -> Iterator[Path]:
    """``folder`` and the folders in it, down to those of runs."""
    yield folder
    if is_run(folder):
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir(follow_symlinks=False) or entry.name.startswith("."):  # not outputs/latest
            continue
        if not re.search(r"\.attempt_\d+$", entry.name):  # set aside, when the job was run again
            yield from _below(Path(entry.path))


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run's, by what it holds."""
    return any((folder / name).is_file() for name in ("run.json", "config.yaml", "metrics.jsonl"))


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key under which job 10 comes after job 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def differing(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The settings in which ``runs`` differ: each with its value in every run, None where a run has no such setting.

    Where they run and what they are called is not a setting. Where runs take different components (``_target_``), the
    arguments that only one of these has are not listed: the component says it.
    """
    present = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in present for key in run.settings)
    varying = {}
    for key in keys:
        values = [run.settings[key] for run in runs if key in run.settings]
        component = f"{key.rpartition('.')[0]}._target_"
        explained = len({run.settings.get(component) for run in present}) > 1
        if key.startswith(_NO_SETTING) or key.endswith("._partial_"):
            continue
        lacking = any(key not in run.settings for run in present)
        if any(value != values[0] for value in values) or (lacking and not explained):
            varying[key] = [run.settings.get(key) for run in runs]
    return varying


_NO_SETTING = ("paths.", "run_name", "resume", "logger.")


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a file of one JSON object a line that have a ``step``; torn and foreign lines are left out."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.split(b"\n"):  # not splitlines(): texts hold other line ends, which JSON leaves as they are
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        # Where there is an anchor there may be aliases, a few lines of which stand for a billion values.
        return read_yaml(path) if "&" in text else yaml.load(text, Loader=_Loader)  # a safe loader, both of them
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
