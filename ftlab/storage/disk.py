"""Changes on disk in an order that a kill or a power loss at any instant leaves whole.

A file's bytes are safe once the file was flushed after its last write; its name is safe once the folder that holds it
was. Every change goes through this module and is told to ``observer``, so that tests can stop the world after any of
them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import shutil
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

_CHUNK = 4 * 2**20  # bytes hashed or written at a time
_HASH_BEHIND = 256  # chunks that hashing may be behind writing: it goes on while the disk flushes


def _nobody(operation: str, path: Path) -> None:
    del operation, path


observer: Callable[[str, Path], None] = _nobody
"""Told of every change just done: ``mkdir, open, write, fsync, close, rename, fsync_folder, remove``, and its path."""


def make_folder(path: Path) -> None:
    """Create a new folder.

    Raises:
        FileExistsError: there is something of that name.
    """
    path.mkdir()
    observer("mkdir", path)


class DurableFile:
    """A new file that is on the disk when the ``with`` block ends, hashed on the way.

    Hashing runs in a thread beside the writing: both release the interpreter, so it costs no time where there is a
    second core.

    Attributes:
        n_bytes: written so far.
    """

    def __init__(self, path: Path):
        self.path, self.n_bytes = path, 0
        self._digest = hashlib.sha256()
        self._chunks: queue.Queue[memoryview | None] = queue.Queue(_HASH_BEHIND)
        self._hashing = threading.Thread(target=self._hash, name="hash", daemon=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        observer("open", path)
        self._hashing.start()

    def write(self, data: bytes | memoryview) -> int:
        """Append ``data``, which must not change before the block ends."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._chunks.put(chunk)
            written = 0
            while written < len(chunk):  # a single write may take only part, on a full disk for example
                written += os.write(self._fd, chunk[written:])
            self.n_bytes += len(chunk)
            observer("write", self.path)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.n_bytes

    def sha256(self) -> str:
        """In hex, of all that was written; after the block only."""
        assert not self._hashing.is_alive(), "the file is still being written"
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                os.fsync(self._fd)
                observer("fsync", self.path)
        finally:
            self._chunks.put(None)
            os.close(self._fd)
            self._hashing.join()
        observer("close", self.path)

    def _hash(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._digest.update(chunk)


def write_file(path: Path, data: bytes) -> str:
    """Write a new file, flushed; returns its sha256 in hex."""
    with DurableFile(path) as file:
        file.write(data)
    return file.sha256()


def flush_file(path: Path) -> None:
    """Bring to the disk what somebody else wrote into a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    observer("fsync", path)


def rename(path: Path, to: Path) -> None:
    """Rename within one folder, and make sure of it; ``to`` must not exist."""
    assert path.parent == to.parent
    if os.path.lexists(to):
        raise FileExistsError(f"{to} exists")
    os.rename(path, to)
    observer("rename", to)
    sync_folder(to.parent)


def sync_folder(path: Path) -> None:
    """Make sure of the names in a folder: files made in it, renamed or removed."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(fd)
    observer("fsync_folder", path)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, one file after another."""
    for name in sorted(os.listdir(path)):
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        observer("remove", entry)
    path.rmdir()
    observer("remove", path)


def replace_file(path: Path, text: str, *, aside: Path | None = None) -> None:
    """Replace a file as one step: a reader, or a kill at any instant, sees the old text or the new.

    Args:
        aside: where the new text is written first, on the same disk; null: beside ``path``.
    """
    aside = aside or path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # before the rename: else a power loss can leave the new name with no content
    observer("fsync", aside)
    os.replace(aside, path)
    observer("rename", path)
    sync_folder(path.parent)


class LineFile:
    """Lines appended to a file that others may read meanwhile; what the disk does not take now is kept for later.

    Every line is whole on the disk, but for a last one that a full disk or a kill tore; the next write completes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pending = bytearray()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(path, flags, 0o666)

    def add(self, lines: Iterable[str]) -> None:
        """Append ``lines``, which have no line ends yet; they are on their way, not in the file."""
        for line in lines:
            self._pending += line.encode() + b"\n"

    def write(self) -> None:
        """Hand all that was added to the system, where a kill of this process does not reach it.

        Raises:
            OSError: the disk does not take it; nothing is lost, and the next call tries again.
        """
        while self._pending:
            del self._pending[: os.write(self._fd, self._pending)]

    def sync(self) -> None:
        """`write`, and make sure that it outlives a power loss."""
        self.write()
        os.fsync(self._fd)

    def close(self) -> None:
        """`write` and close."""
        try:
            self.write()
        finally:
            os.close(self._fd)


def read_small_file(path: Path, at_most: int) -> bytes:
    """A file's content; not of a pipe or a device, at which a reader would hang, nor more than it can sensibly have.

    Args:
        at_most: bytes.

    Raises:
        OSError: saying which it is.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    if status.st_size > at_most:
        raise OSError(errno.EFBIG, f"has {status.st_size} bytes, more than the {at_most} that it may have", str(path))
    return path.read_bytes()


def file_sha256(path: Path) -> str:
    """sha256 in hex of a file's content."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()
