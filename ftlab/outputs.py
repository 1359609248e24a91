"""The run folder: what a run leaves behind, written so that a kill at any instant leaves valid files, and
so that no secret gets in.

One process (rank 0) writes a folder; the other ranks only add their own ``rank<i>.log``.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, TextIO

import psutil
import yaml

from ftlab.errors import FtlabError
from ftlab.storage.disk import replace_file

Status = Literal["running", "completed", "failed", "preempted"]

MASK = "***"

# ---------------------------------------------------------------------------------------------- secrets

# Environment variables whose *value* is a secret, wherever it turns up. AWS_REGION and AWS_PROFILE are no
# secrets, and masking "us-east-1" out of every bucket name would cost the reader more than it protects.
_SECRET_ENV = re.compile(r"(_TOKEN|_API_?KEY|_ACCESS_KEY(_ID)?|_SECRET.*|_PASSWORD|_PASSWD)$|^(TOKEN|PASSWORD)$")
_MIN_SECRET_LENGTH = 8  # shorter values ("none", "true", "x") would mask ordinary words

# Names under which a value is secret. `token` only as the whole name, or after a word that makes it an access
# token: eos_token, max_new_tokens, tokenizer and train/tokens are the daily bread of this project.
_SECRET_NAME = (
    r"(?:\w*(?:api_?key|password|passwd|credentials|secret(?:_(?:access_)?key)?|private_key|access_key(?:_id)?)"
    r"|(?:\w*_)?(?:access|auth|api|hf|hub)_token|token)"
)
_SECRET_KEY = re.compile(rf"(?:.*[./])?{_SECRET_NAME}", re.IGNORECASE)
# `name=value` and `name: "value"` inside a string: overrides, command lines, query strings, printed mappings.
# Numbers stay ("loss per token: 0.693147"), and so do interpolations, which hold a secret's name only.
_ASSIGNMENT = re.compile(
    rf"(?<!\w)({_SECRET_NAME}[\"']?\s?[=:]\s?[\"']?)(?!\$\{{|[\d.]+\b(?!\w))[^\s\"',;&}}\]]{{6,}}",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(\w://)[^\s/@:]*:[^\s/]+@")
_TOKEN_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-(?=[\w-]*\d)[\w-]{16,}|AKIA[0-9A-Z]{12,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|wandb_v1_\w{16,})"
)


def mask_secrets(obj: Any) -> Any:
    """A copy of ``obj`` in which every secret reads ``***``; what is not a secret comes back unchanged.

    Masked are: values of environment variables that hold secrets, logins in URLs, the shapes of well-known
    access tokens, and whatever stands under a name that says secret (``api_key``, ``password``, ``token``).

    Args:
        obj: str, or dict / list / tuple of such, nested at will; other types pass through.
    """
    return _mask(obj, _environment_secrets())


def _environment_secrets() -> list[str]:
    found = {v for k, v in os.environ.items() if _SECRET_ENV.search(k) and len(v) >= _MIN_SECRET_LENGTH}
    return sorted(found, key=len, reverse=True)  # a secret that contains another one goes first


def _mask(obj: Any, secrets: list[str]) -> Any:
    match obj:
        case str():
            return _mask_text(obj, secrets)
        case dict():
            return {_mask(key, secrets): _mask_item(key, value, secrets) for key, value in obj.items()}
        case list() | tuple():
            return type(obj)(_mask(item, secrets) for item in obj)
        case _:
            return obj


def _mask_item(key: Any, value: Any, secrets: list[str]) -> Any:
    if value in (None, "") or isinstance(value, bool) or not isinstance(key, str):
        return _mask(value, secrets)
    return MASK if _SECRET_KEY.fullmatch(key) else _mask(value, secrets)


def _mask_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = _URL_LOGIN.sub(rf"\1{MASK}@", text)
    text = _TOKEN_SHAPE.sub(MASK, text)
    return _ASSIGNMENT.sub(rf"\1{MASK}", text)


def mask_files(folder: Path) -> None:
    """Mask the YAML files directly in ``folder`` in place; a file without a secret is not touched.

    For ``.hydra/``, which Hydra writes by itself before ftlab gets a say.
    """
    for path in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        masked = mask_secrets(content)
        if masked != content:
            replace_file(path, _to_yaml(masked))


# ------------------------------------------------------------------------------------------------ files


class _Dumper(yaml.SafeDumper):
    """YAML that Hydra reads back with the same types."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML leaves "1e3" bare because YAML 1.1 reads it as a string; OmegaConf reads it as a number.
    try:
        float(text)
    except ValueError:
        return yaml.SafeDumper.represent_str(dumper, text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _represent_str)


def _to_yaml(obj: Any) -> str:
    return yaml.dump(obj, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _finite(obj: Any) -> Any:
    """JSON has no NaN or infinity: they become null, so that every reader can open the file."""
    match obj:
        case float():
            return obj if math.isfinite(obj) else None
        case Mapping():
            return {key: _finite(value) for key, value in obj.items()}
        case list() | tuple():
            return [_finite(item) for item in obj]
        case _:
            return obj


def to_json(obj: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity become null, a path becomes a string."""
    return json.dumps(_finite(obj), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def shortest(path: Path) -> Path:
    """The path as a person would type it: relative to where they stand, when it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json`` of the run in ``folder``.

    Raises:
        OSError, ValueError: when there is none, or it cannot be read.
    """
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"{folder / 'run.json'} is not a JSON object")
    return record


class FolderInUseError(FtlabError):
    """Another process writes this run's folder."""

    exit_code = 2

    def __init__(self, folder: Path, holder: str):
        self.folder, self.holder = folder, holder
        super().__init__(folder, holder)

    def __str__(self) -> str:
        return f"{self.folder} is in use by {self.holder or 'another process'}: a run is written by one job at a time"


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
        self._session, self._before_s = _now(), 0.0  # since when this process writes; seconds of those before
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
            replace_file(self.path / "config.yaml", _to_yaml(mask_secrets(config)))

    def write_json(self, name: str, obj: Any) -> None:
        """Write ``name`` atomically, secrets masked."""
        if self.writes:
            replace_file(self.path / name, to_json(mask_secrets(obj), indent=2) + "\n")

    def lock(self) -> None:
        """Keep every other process from writing this folder for as long as this one lives.

        Raises:
            FolderInUseError: when another one does.
        """
        self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError:
            self._lock.seek(0)
            raise FolderInUseError(self.path, self._lock.read().strip()) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}\n")
        self._lock.flush()

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
            id=token_hex(4),
            status="running",
            started=_now().isoformat(timespec="seconds"),
            ended=None,
            duration_s=None,
            code=code_state(),
            versions=versions(),
            hardware={**_machine(), "gpus": gpus},
            error=None,
            resumed=[],
            **fields,
        )
        self._session, self._before_s = _now(), 0.0

    def resume(self, *, gpus: list[str], **fields: Any) -> None:
        """Go on with the ``run.json`` that is there; what this session is and runs on is added to ``resumed``.

        Args:
            fields: e.g. the step it goes on from, and what the user changed.
        """
        self._record = read_record(self.path)
        session = {
            "at": _now().isoformat(timespec="seconds"),
            "code": code_state(),
            "versions": versions(),
            "hardware": {**_machine(), "gpus": gpus},
            **fields,
        }
        self._session, self._before_s = _now(), self._record.get("duration_s") or 0.0
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
        ended = _now()
        self.update(
            status=status,
            ended=ended.isoformat(timespec="seconds"),
            duration_s=self._before_s + (ended - self._session).total_seconds(),
            error=None if error is None else {"type": type(error).__name__, "message": str(error)},
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


# ---------------------------------------------------------------------------- what the run ran with and on


def _now() -> datetime:
    return datetime.now(UTC)


def code_state() -> dict[str, Any]:
    """``{"commit": str | None, "dirty": bool | None}`` of the checkout that ftlab was imported from.

    None where ftlab is an installed package (even one inside somebody's repository) or git is not at hand.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*args: str) -> list[str]:
        # No optional locks: a run must not fight with the user's own git over the index.
        command = ["git", "--no-optional-locks", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.splitlines()

    try:
        toplevel, commit = git("rev-parse", "--show-toplevel", "HEAD")
        if Path(toplevel).resolve() == root:
            return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"commit": None, "dirty": None}


def versions() -> dict[str, str | None]:
    """Versions that decide what a run computes, read from package metadata: nothing is imported for it."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("ftlab", "torch", "hydra-core", "datasets")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": platform.platform(),
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        # The cores this process may use: in a container or under Slurm fewer than the machine has.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


@functools.cache
def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------- logging


class _MaskingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # The finished text, not the message: tracebacks carry secrets too.
        return mask_secrets(super().format(record))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Looks ``sys.stderr`` up anew for each line: a live progress bar replaces it, to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_handlers: list[logging.Handler] = []


def setup_logging(folder: Path, rank: int) -> None:
    """Send the ``ftlab`` logger and the process's warnings to the run folder and to stderr, secrets masked.

    Rank 0 writes ``train.log`` and talks on the terminal from INFO up; rank i writes ``rank<i>.log`` and
    talks from WARNING up; where the folder is on another machine, it has no file. A second call (the next run in
    this process) takes the place of the first.
    """
    loggers = [logging.getLogger("ftlab"), logging.getLogger("py.warnings")]
    while _handlers:
        handler = _handlers.pop()
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
    if folder.is_dir():
        to_file = logging.FileHandler(folder / ("train.log" if rank == 0 else f"rank{rank}.log"), encoding="utf-8")
        to_file.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _handlers.append(to_file)
    to_terminal = _StderrHandler(sys.stderr)
    to_terminal.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    to_terminal.setFormatter(_MaskingFormatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    _handlers.append(to_terminal)
    for logger in loggers:
        for handler in _handlers:
            logger.addHandler(handler)
    logging.getLogger("ftlab").setLevel(logging.INFO)
    logging.captureWarnings(False)  # else, where somebody put Python's own display back, True would do nothing
    logging.captureWarnings(True)
