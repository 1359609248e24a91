"""Files that a configuration reads, and the folder that it writes."""

from __future__ import annotations

import difflib
import errno
import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlab.errors import ConfigError
from ftlab.outputs.files import read_json
from ftlab.typed import override

_INPUTS = ("model.checkpoint", "tokenizer.path", "dataset.data_files", "dataset.val_data_files")


def missing_inputs(values: Mapping[str, Any]) -> Iterator[ConfigError]:
    """The local files and folders that ``values`` (dotted key to value) name and that are not there.

    A name that no local path starts with may be one on the Hub; only the Hub can say.
    """
    reported: set[str] = set()
    for key in _INPUTS:
        for path in _paths(values.get(key)):
            must_exist = key.endswith("data_files") or path.startswith(("/", ".", "~"))
            if must_exist and path not in reported and not _exists(path):
                reported.add(path)  # tokenizer.path follows model.checkpoint: say it once
                tried = Path(path).expanduser().absolute()
                nearest = _sibling(tried)
                example = override(key, str(nearest) if nearest else f"/path/to/{tried.name}")
                yield ConfigError(key, f"no such file or folder: {tried}", example)


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for element in value.values():
            yield from _paths(element)
    elif isinstance(value, list):
        for element in value:
            yield from _paths(element)


def _exists(path: str) -> bool:
    return "://" in path or bool(glob.glob(os.path.expanduser(path))) or os.path.exists(os.path.expanduser(path))


def _sibling(path: Path) -> Path | None:
    try:
        names = os.listdir(path.parent)
    except OSError:
        return None
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / nearest[0] if nearest else None


def output_problem(folder: str) -> ConfigError | None:
    """Why no run can be written into ``folder``; None when one can. Nothing is created."""
    path = Path(folder).absolute()
    # torchrun started this process again (--max-restarts): the run is its own, and will be gone on with.
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    try:
        taken = (path / "run.json").is_file()
    except OSError as error:  # a name too long for the system
        return unwritable(path, error.errno or errno.EINVAL)
    if taken and not again:
        free = next(f"{path}_{n}" for n in range(2, 1000) if not os.path.lexists(f"{path}_{n}"))
        run = _describe(path / "run.json")
        fix = f"{override('paths.output_dir', free)}, or to go on with that run: {override('resume', str(path))}"
        return ConfigError("paths.output_dir", f"{path} already holds {run}", fix)
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        return unwritable(path, errno.ENOTDIR)
    if os.access(existing, os.W_OK | os.X_OK):
        return None
    read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
    return unwritable(path, errno.EROFS if read_only else errno.EACCES)


def unwritable(path: Path, number: int) -> ConfigError:
    """The error for a folder that the system refuses to create, by its ``errno``."""
    problem = f"cannot write to {path}: {os.strerror(number)} ({errno.errorcode.get(number, number)})"
    shorter = "a shorter run_name, or " if number == errno.ENAMETOOLONG else ""
    return ConfigError("paths.output_dir", problem, f"{shorter}paths.output_dir=/a/folder/of/yours")


def _describe(run_json: Path) -> str:
    try:
        run = read_json(run_json)
        return f"the run {run['name']!r} ({run['id']}, {run['status']}); a run never overwrites another"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run (its run.json cannot be read); a run never overwrites another"
