"""Work done once per machine and found again by its content: safe for many processes at once, whole or not there.

An entry is a folder named by a hash of everything that decides what is in it. It is written aside and renamed when
complete, under a lock that the system releases if its holder dies, so a kill at any instant costs only the work
since the last complete entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftlab.errors import ConfigError

_COMPLETE = "COMPLETE.json"  # name and size of every file of an entry; written last


def cache_folder(configured: str | None) -> Path:
    """Where the cache is: ``paths.cache_dir``, else $FTLAB_CACHE_DIR, else under $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ConfigError: when a folder that was asked for cannot be written.
    """
    asked = configured or os.environ.get("FTLAB_CACHE_DIR")
    folder = Path(asked or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ftlab").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if asked:
            raise ConfigError(
                "paths.cache_dir", f"cannot write to {folder}: {error.strerror}", "paths.cache_dir=/a/folder/of/yours"
            ) from error
    # A home that cannot be written, as in many containers: the machine's own folder for what need not last.
    folder = Path(tempfile.gettempdir()) / f"ftlab-cache-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def key_of(parts: Any) -> str:
    """A hash in hex of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached(root: Path, kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of the entry ``key``, which ``build(folder)`` fills if it is not there.

    Of several processes that ask at once, one builds and the others wait for it; if it dies, another takes over.
    """
    shelf = root / kind
    folder = shelf / key
    if _is_complete(folder):
        return folder
    shelf.mkdir(parents=True, exist_ok=True)
    with (shelf / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_complete(folder):
            return folder
        # Whoever holds the lock is alone: what lies aside was left by one that was killed.
        for left in (folder, *shelf.glob(f".{key}.*")):
            shutil.rmtree(left, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=shelf))
        try:
            build(aside)
            _seal(aside)
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _sync(shelf)
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _seal(folder: Path) -> None:
    """Bring every file to the disk, then say that all are there: a power cut must not leave a name without content."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in files:
        _sync(file)
    complete = folder / _COMPLETE
    complete.write_text(json.dumps({str(file.relative_to(folder)): file.stat().st_size for file in files}))
    _sync(complete)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of all files under ``paths``."""
    total = 0
    for path in paths:
        for folder, _, names in os.walk(path):
            for name in names:
                with suppress(OSError):  # another process may be clearing up
                    total += os.stat(os.path.join(folder, name)).st_size
    return total
