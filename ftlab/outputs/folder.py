"""The run folder: what a run leaves behind, written so that a kill at any instant leaves valid files.

One process (rank 0) writes a folder; the other ranks only add their own ``rank<i>.log``.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, TextIO

from ftlab.errors import FtlabError, kind_of
from ftlab.outputs.environment import code_state, machine, now, versions
from ftlab.outputs.files import read_json, to_json, to_yaml
from ftlab.outputs.secrets import mask_secrets
from ftlab.storage.disk import replace_file

Status = Literal["running", "completed", "failed", "preempted"]
FORMAT = 1  # of run.json; one without is of 1


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json`` of the run in ``folder``.

    Raises:
        OSError, ValueError: when there is none, or it cannot be read.
        NewerFormatError: when a newer ftlab wrote it.
    """
    path = folder / "run.json"
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not a JSON object")
    if isinstance(number := record.get("format"), int) and number > FORMAT:
        raise NewerFormatError(path, number)
    return record


def _told(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "kind": kind_of(error), "message": str(error)}


class NewerFormatError(FtlabError):
    """A newer ftlab wrote this record."""

    exit_code = 2

    def __init__(self, path: Path, number: int):
        self.path, self.number = path, number
        super().__init__(path, number)

    def __str__(self) -> str:
        return (
            f"{self.path} was written by a newer ftlab (format {self.number}; this one reads up to {FORMAT})\n"
            "  try: a newer ftlab"
        )


class FolderInUseError(FtlabError):
    """Another process writes this run's folder."""

    exit_code = 2

    def __init__(self, folder: Path, holder: str):
        self.folder, self.holder = folder, holder
        super().__init__(folder, holder)

    def __str__(self) -> str:
        return f"{self.folder} is in use by {self.holder or 'another process'}: a run is written by one job at a time"


def hold(folder: Path, kind: int = fcntl.LOCK_EX) -> TextIO:
    """Take the folder's lock, which is let go of when the file is closed or this process ends, however that happens.

    Raises:
        FolderInUseError: another process has it.
        OSError: nothing can be written there.
    """
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise FolderInUseError(folder, file.read().strip()) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


# Folders that this process holds for a run that it, or a worker that it starts, will write; by their real paths.
_claimed: dict[str, TextIO] = {}
_ROOM = 2**17  # bytes that the first files of a run need, before anything of it is imported


def claim(folder: Path) -> None:
    """`hold` the folder from now on, for the run that will be begun in it.

    Raises:
        FolderInUseError: another process has it.
        OSError: nothing can be written there, or not enough.
    """
    if (name := os.path.realpath(folder)) not in _claimed:
        _claimed[name] = hold(folder)
        trial = folder / ".room"
        try:
            trial.write_bytes(bytes(_ROOM))
        finally:
            trial.unlink(missing_ok=True)


def claim_lent(folder: Path) -> None:
    """Hold beside the process that started this one a folder which that one has `lent`."""
    _claimed[os.path.realpath(folder)] = hold(folder, fcntl.LOCK_SH)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """`hold` the folder for a moment, unless this process has claimed it."""
    with nullcontext() if os.path.realpath(folder) in _claimed else hold(folder):
        yield


@contextmanager
def lent(folder: Path) -> Iterator[None]:
    """Keep the folder for a worker of this process, which is to `claim_lent` it; nobody else gets it in between."""
    folder.mkdir(parents=True, exist_ok=True)
    with _claimed.pop(os.path.realpath(folder), None) or hold(folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_held(folder: Path) -> bool:
    """Whether a process of this machine has the folder's lock."""
    try:
        with (folder / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # never begun
    return False


class RunFolder:
    """One run's folder and its ``run.json``; the folder is created if it does not exist.

    Args:
        writes: whether this is the process that writes it; in the others all methods do nothing, so that the same
            code runs in all.
    """

    def __init__(self, path: Path | str, *, writes: bool = True):
        self.path = Path(path).absolute()
        self.writes = writes
        self._record: dict[str, Any] = {}
        self._lock: TextIO | None = None
        self._session, self._before_s = now(), 0.0  # since when this process writes; seconds of those before
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of_a_lost_process(cls, path: Path | str) -> RunFolder | None:
        """The folder of a run whose writer is gone, to be finished in its place; None if it has been finished."""
        folder = cls(path)
        with suppress(OSError, ValueError):
            folder._record = read_record(folder.path)
        if "started" in folder._record:
            sessions = [folder._record["started"], *(one["at"] for one in folder._record.get("resumed", []))]
            folder._session = datetime.fromisoformat(sessions[-1])
            folder._before_s = folder._record.get("duration_s") or 0.0
        return folder if folder._record.get("status", "running") == "running" else None

    def write_config(self, config: dict[str, Any]) -> None:
        """``config.yaml``: the resolved config that ran, secrets masked."""
        if self.writes:
            replace_file(self.path / "config.yaml", to_yaml(mask_secrets(config)))

    def write_json(self, name: str, obj: Any) -> None:
        """Write ``name`` atomically, secrets masked."""
        if self.writes:
            replace_file(self.path / name, to_json(mask_secrets(obj), indent=2) + "\n")

    def lock(self) -> None:
        """Keep every other process from writing this folder for as long as this one lives.

        Raises:
            FolderInUseError: when another one does.
            OSError: nothing can be written there.
        """
        self._lock = _claimed.pop(os.path.realpath(self.path), None) or hold(self.path)

    def unlock(self) -> None:
        """Let others write it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def cut_back(self, step: int | None) -> int:
        """Remove what was logged after ``step``, of which no checkpoint knows; None: all of it.

        Returns:
            The last step that had been logged.
        """
        last = 0
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if not self.writes or not path.exists():
                continue
            kept = []
            # Not splitlines(): answers hold other line ends (U+2028), which JSON leaves as they are.
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    logged_at = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):  # torn by the kill
                    continue
                last = max(last, logged_at)
                if step is not None and logged_at <= step:
                    kept.append(line + "\n")
            replace_file(path, "".join(kept))
        return last

    def start(self, *, gpus: list[str], **fields: Any) -> None:
        """Begin ``run.json``: status running, the time, and the code, versions and machine that run it.

        Args:
            gpus: names of the devices in use (only torch knows them, and this module must not import it).
            fields: what else is known now, e.g. ``name, seed, data_fingerprint, n_params, parent_run``.
        """
        self.update(
            format=FORMAT,
            id=token_hex(4),
            status="running",
            started=now().isoformat(timespec="seconds"),
            ended=None,
            duration_s=None,
            code=code_state(),
            versions=versions(),
            hardware={**machine(), "gpus": gpus},
            error=None,
            resumed=[],
            **fields,
        )
        self._session, self._before_s = now(), 0.0

    def resume(self, *, gpus: list[str], **fields: Any) -> None:
        """Go on with the ``run.json`` that is there; what this session is and runs on is added to ``resumed``.

        Args:
            fields: e.g. the step it goes on from, and what the user changed.
        """
        self._record = read_record(self.path)
        session = {
            "at": now().isoformat(timespec="seconds"),
            "code": code_state(),
            "versions": versions(),
            "hardware": {**machine(), "gpus": gpus},
            **fields,
        }
        self._session, self._before_s = now(), self._record.get("duration_s") or 0.0
        sessions = [*self._record.get("resumed", []), session]
        self.update(status="running", ended=None, error=None, resumed=sessions)

    @property
    def is_open(self) -> bool:
        """Whether this process has begun, or gone on with, ``run.json``."""
        return bool(self._record)

    def recorded_id(self) -> str | None:
        """The id of the run that the folder holds; None when it holds none."""
        try:
            return str(read_record(self.path)["id"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def run_id(self) -> str:
        """The run's own, for ever; empty where this process does not write."""
        return str(self._record.get("id", ""))

    def update(self, **fields: Any) -> None:
        """Set fields of ``run.json`` and replace the file."""
        self._record |= fields
        self.write_json("run.json", self._record)

    def finish(self, status: Status, *, error: BaseException | None = None, **fields: Any) -> None:
        """End ``run.json``: status, duration, the error if there was one, and e.g. the final metrics."""
        ended = now()
        self.update(
            status=status,
            ended=ended.isoformat(timespec="seconds"),
            duration_s=self._before_s + (ended - self._session).total_seconds(),
            error=None if error is None else _told(error),
            **fields,
        )

    def link_latest(self) -> None:
        """Point ``latest`` beside the date folder at this run: ``outputs/latest -> <date>/<time>_<name>``.

        Only for folders of that shape: a sweep's jobs and a folder of the user's own choosing get no link.
        Where links cannot be made (Windows without the right, some network disks) there is simply none.
        """
        date = self.path.parent
        link = date.parent / "latest"
        dated = re.fullmatch(r"\d{4}-\d\d-\d\d", date.name)
        if not self.writes or not dated or (link.exists() and not link.is_symlink()):
            return
        aside = date.parent / f".latest.{os.getpid()}"
        try:
            aside.symlink_to(Path(date.name, self.path.name), target_is_directory=True)
            os.replace(aside, link)
        except OSError as error:
            logging.getLogger(__name__).debug("no link %s: %s", link, error)
