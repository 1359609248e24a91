"""A sweep's folder: ``sweep.json`` lists its jobs and how each of them is doing.

The plan is written before the first job starts; what became of a job is read from the job's own ``run.json``. So a
sweep that is killed at any instant loses nothing: whoever opens its folder next knows which jobs are missing.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, TextIO

from ftlab.errors import ConfigError
from ftlab.outputs.environment import now
from ftlab.outputs.files import to_json
from ftlab.outputs.folder import RunFolder, hold, is_held, read_record
from ftlab.outputs.secrets import mask_secrets
from ftlab.storage.disk import replace_file

FILE = "sweep.json"
PRUNED = "pruned.json"  # in a job's folder: a search gave it up, after which step and with which value
DONE = ("completed", "pruned")
_CLOSING_S = 60.0  # how long a job whose sweep was killed may take to save and leave


@dataclass(kw_only=True)
class Job:
    """One job of a sweep.

    Attributes:
        number: counted from 0; names its folder, and stays its own when the sweep is resumed or extended.
        overrides: what makes it differ from ``train.py`` without any.
        status: ``pending``, a run's own (``running, completed, failed, preempted``), or ``pruned``.
        kind: of a failure, see ``ftlab.errors.kind_of``.
        value: the last validation loss, or whatever metric the run is judged by.
    """

    number: int
    overrides: list[str]
    folder: str
    status: str = "pending"
    kind: str | None = None
    error: str | None = None
    step: int = 0
    value: float | None = None
    duration_s: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in DONE


@dataclass
class SweepFolder:
    """The folder of one sweep.

    Attributes:
        path: absolute.
        about: what ``sweep.json`` says beside the jobs: ``id, name, command, metric, started, ended``.
        lock: held by the process that runs the sweep.
    """

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    lock: TextIO | None = field(default=None, repr=False)

    @classmethod
    def read(cls, path: Path | str) -> SweepFolder:
        """The sweep in ``path``, its jobs as their folders say they are now.

        Raises:
            ConfigError: there is none.
        """
        sweep = cls.noted(path)
        sweep._look()
        return sweep

    @classmethod
    def noted(cls, path: Path | str) -> SweepFolder:
        """The sweep in ``path`` as ``sweep.json`` has it, without a look at its jobs' folders.

        Raises:
            ConfigError: there is none.
        """
        path = Path(path).expanduser().absolute()
        try:
            content = json.loads((path / FILE).read_text(encoding="utf-8"))
            jobs = [Job(**job) for job in content.pop("jobs")]
            _require_as_written(content, jobs)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"there is no sweep in {path}: {FILE} cannot be read ({type(error).__name__})"
            raise ConfigError("sweep.resume", problem, "a folder below multirun_outputs/") from None
        return cls(path, content, jobs)

    @classmethod
    def begin(cls, path: Path | str, command: Sequence[str], metric: str) -> SweepFolder:
        """The sweep in ``path``: the one that is there, or a new one without jobs.

        Args:
            command: the overrides that it is started with.
            metric: what its jobs are judged by.

        Raises:
            FolderInUseError: another process runs it.
        """
        path = Path(path).absolute()
        path.mkdir(parents=True, exist_ok=True)
        sweep = cls.read(path) if (path / FILE).is_file() else cls(path)
        sweep.lock = hold(path)
        told = {"name": path.name, "command": list(command), "metric": metric, "ended": None}
        sweep.about = {"id": token_hex(4), "started": _time()} | sweep.about | told
        sweep.refresh()
        return sweep

    def job_of(self, overrides: Sequence[str]) -> Job | None:
        """The job that these overrides make, if the sweep has it."""
        for job in self.jobs:
            if mask_secrets(job.overrides) == mask_secrets(list(overrides)):
                job.overrides = list(overrides)  # in the file, secrets are masked
                return job
        return None

    def add(self, overrides: Sequence[str], folder: str) -> Job:
        """A further job; counts once it is in ``sweep.json``, see `refresh`."""
        job = Job(number=len(self.jobs), overrides=list(overrides), folder=folder)
        self.jobs.append(job)
        return job

    def varying(self, job: Job) -> list[str]:
        """The overrides of ``job`` that not all jobs have."""
        return [text for text in job.overrides if any(text not in other.overrides for other in self.jobs)]

    def refresh(self) -> None:
        """Bring ``sweep.json`` up to what the jobs' folders say."""
        self._look()
        content = self.about | {"jobs": [asdict(job) for job in self.jobs]}
        replace_file(self.path / FILE, to_json(mask_secrets(content), indent=2) + "\n")

    def end(self) -> None:
        """Note that nothing is running any more, and let go of the folder."""
        self.about["ended"] = _time()
        self.refresh()
        if self.lock is not None:
            self.lock.close()

    def wait_for_leftovers(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Those of ``jobs`` that nobody works on; what a killed sweep left running gets the time to save and leave."""
        deadline = time.monotonic() + _CLOSING_S
        for job in jobs:
            while is_held(self.path / job.folder) and time.monotonic() < deadline:
                time.sleep(0.2)
            if not is_held(self.path / job.folder):
                yield job

    def _look(self) -> None:
        for job in self.jobs:
            _look_at(job, self.path / job.folder, self.about.get("metric", "val/loss"))


def _require_as_written(about: dict[str, Any], jobs: Sequence[Job]) -> None:
    """Raise ValueError where ``sweep.json`` says what no sweep would have written."""
    texts = [about.get("id", ""), about.get("metric", ""), *(job.folder for job in jobs)]
    lists = [about.get("command", []), *(job.overrides for job in jobs)]
    if not all(isinstance(one, list) for one in lists):
        raise ValueError("no list of overrides")
    if not all(isinstance(one, str) for one in [*texts, *itertools.chain.from_iterable(lists)]):
        raise ValueError("no text")
    if [job.number for job in jobs] != list(range(len(jobs))):
        raise ValueError("jobs are numbered from 0")


def _look_at(job: Job, folder: Path, metric: str) -> None:
    try:
        record = read_record(folder)
    except (OSError, ValueError):
        return
    error = record.get("error") or {}
    job.status, job.kind, job.error = record.get("status", "running"), error.get("kind"), error.get("message")
    if job.status == "preempted" and (folder / PRUNED).is_file():
        job.status = "pruned"
    job.step = (record.get("progress") or {}).get("step", 0)
    job.duration_s = record.get("duration_s")
    with suppress(OSError, ValueError):
        job.value = last_value(folder, metric)


def last_value(folder: Path, metric: str) -> float | None:
    """The last value of ``metric`` in a run's ``metrics.jsonl``; None when there is none."""
    found = None
    with (folder / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if f'"{metric}"' in line:
                with suppress(ValueError):  # torn by a kill
                    found = json.loads(line).get(metric, found)
    return found


_OF_THE_ATTEMPT = (".hydra", ".lock", "console.log")  # what there is of the new attempt when it makes room


def set_aside(folder: Path) -> None:
    """Make room for another attempt at a job that left nothing to go on from."""
    names = (Path(f"{folder}.attempt_{number}") for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    aside.mkdir()
    entries = [entry for entry in folder.iterdir() if entry.name not in _OF_THE_ATTEMPT]
    for entry in sorted(entries, key=lambda entry: entry.name == "run.json"):  # last: until then it is that attempt's
        entry.rename(aside / entry.name)


def fail(folder: Path, error: BaseException) -> None:
    """Let ``run.json`` of a job that ended without a word say why."""
    if (lost := RunFolder.of_a_lost_process(folder)) is not None:
        lost.finish("failed", error=error)


def _time() -> str:
    return now().isoformat(timespec="seconds")
