"""Work done once per machine and found again by its content: safe for many processes at once, whole or not there.

An entry is a folder named by a hash of everything that decides what is in it. It is written aside and renamed when
complete, under a lock that the system releases if its holder dies, so a kill at any instant costs only the work
since the last complete entry. Most entries stay; one that was leased goes with the last who reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ftlab.errors import ConfigError
from ftlab.storage.disk import flush_file, sync_folder

_POLL_S = 0.02
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


def cached(root: Path, kind: str, key: str, build: Callable[[Path], None], *, lasting: bool = True) -> Path:
    """The folder of the entry ``key``, which ``build(folder)`` fills if it is not there.

    Of several processes that ask at once, one builds and the others wait for it; if it dies, another takes over.

    Args:
        lasting: flushed, so that it outlives a power cut.
    """
    shelf = root / kind
    folder = shelf / key
    if _is_complete(folder):
        return folder
    shelf.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            lock = _locked(shelf / f"{key}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # Not in flock: whoever made a leased entry may share the lock before its waiters have it, and keep it.
            time.sleep(_POLL_S)
            if _is_complete(folder):
                return folder
    with lock:
        if _is_complete(folder):
            return folder
        # Whoever holds the lock is alone: what lies aside was left by one that was killed.
        for left in (folder, *shelf.glob(f".{key}.*")):
            shutil.rmtree(left, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=shelf))
        try:
            build(aside)
            _seal(aside, lasting=lasting)
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if lasting:
            sync_folder(shelf)
    return folder


class Lease:
    """An entry that is there as long as somebody on this machine holds a lease of it, and gone after the last one.

    Attributes:
        built: whether it was this holder that made it.
    """

    def __init__(self, root: Path, kind: str, key: str, build: Callable[[Path], None]):
        self.built = False

        def build_here(folder: Path) -> None:
            build(folder)
            self.built = True

        while True:
            self.folder = cached(root, kind, key, build_here, lasting=False)
            lock = _locked(self.folder.with_name(f"{key}.lock"), fcntl.LOCK_SH)
            if _is_complete(self.folder):
                break
            lock.close()  # whoever had it left before the lock was ours
        weakref.finalize(self, _leave, lock, self.folder)  # when nobody holds this object, or the process ends


def clear_leased(root: Path, kind: str) -> None:
    """Remove the leased entries that killed processes left behind."""
    for path in (root / kind).glob("*.lock"):
        with suppress(BlockingIOError, FileNotFoundError):
            _leave(_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB), path.with_suffix(""))


def _leave(lock: IO[str], folder: Path) -> None:
    """Close ``lock``, and remove the entry if nobody else has it."""
    with lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in (folder, *folder.parent.glob(f".{folder.name}.*")):
            shutil.rmtree(path, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


def _locked(path: Path, how: int) -> IO[str]:
    """A lock file, open and locked.

    Raises:
        BlockingIOError: somebody has it, and ``how`` does not wait.
    """
    while True:
        lock = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(lock, how)
            if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                return lock
        except FileNotFoundError:
            pass  # its last holder has removed it, and it locks nothing any more
        except BaseException:
            lock.close()
            raise
        lock.close()


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _seal(folder: Path, *, lasting: bool) -> None:
    """Say that all files are there, on the disk if it is to last: a power cut must not leave a name without content."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    complete = folder / _COMPLETE
    complete.write_text(json.dumps({str(file.relative_to(folder)): file.stat().st_size for file in files}))
    if lasting:
        with ThreadPoolExecutor(len(files) + 1) as threads:  # the disk brings many at once in the time of a few
            list(threads.map(flush_file, (*files, complete)))
        sync_folder(folder)


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of all files under ``paths``."""
    total = 0
    for path in paths:
        for folder, _, names in os.walk(path):
            for name in names:
                with suppress(OSError):  # another process may be clearing up
                    total += os.stat(os.path.join(folder, name)).st_size
    return total
