"""MANIFEST.json: what a complete checkpoint consists of, written last, believed only when everything agrees with it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ftlab.errors import CheckpointError
from ftlab.storage.disk import file_sha256, write_file

NAME = "MANIFEST.json"
FORMAT = 2
"""2: ``state.json`` tells the steps left out and what the guard of the numbers remembers. 1 is read, too."""

KEY_VARIABLE = "FTLAB_CHECKPOINT_SECRET"
"""Environment variable: with it, manifests are signed, and only signed ones are believed."""

_MAX_BYTES = 256 * 2**20  # of a manifest: 10,000 ranks need a few; more is somebody's trap
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and its sha256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``MANIFEST.json`` says.

    Attributes:
        step: optimizer steps done.
        run: id of the run that wrote it.
        parent: digest of the run's checkpoint before this one; null for the first.
        config_hash: sha256 of the configuration it was trained with.
        metrics: validation metrics measured at this step, if there were any.
        files: name to size and hash, of all files but the manifest.
        format: of the whole checkpoint.
    """

    step: int
    run: str
    parent: str | None
    config_hash: str
    metrics: dict[str, float]
    files: dict[str, FileEntry]
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """sha256 in hex of all it says, and so of the whole checkpoint."""
        return hashlib.sha256(_text(asdict(self)).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write it into ``folder``, flushed."""
        write_file(folder / NAME, self.text.encode())

    @property
    def text(self) -> str:
        """The file's content; signed where there is a key."""
        return _text(asdict(self) | {"digest": self.digest, "signature": _signature(self.digest)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the checkpoint in ``folder``; the files themselves are not looked at.

        Raises:
            CheckpointError: it is absent, damaged, unsigned though there is a key, or of a newer format.
        """
        path = folder / NAME
        raw = _read_small_file(path)
        try:
            content = json.loads(raw)
            as_written = isinstance(content, dict) and _text(content) == raw.decode()
        except (ValueError, RecursionError) as error:
            raise CheckpointError(path, f"is damaged: {error}") from None
        if not as_written:
            raise CheckpointError(path, "is damaged: it is not as it was written")
        if isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise CheckpointError(
                path,
                f"was written by a newer ftlab (format {content['format']}; this one reads up to {FORMAT})",
                "a newer ftlab",
            )
        digest, signature = content.pop("digest", None), content.pop("signature", None)
        manifest = _checked(content, path)
        if manifest.digest != digest:
            raise CheckpointError(path, "is damaged: its digest is not that of its content")
        expected = _signature(manifest.digest)
        if expected is not None and not hmac.compare_digest(expected, str(signature)):
            raise CheckpointError(path, f"is not signed with the key in {KEY_VARIABLE}")
        return manifest

    def verify(self, folder: Path, *, only: frozenset[str] | None = None) -> None:
        """Compare the files in ``folder`` with the manifest: kinds, names and sizes first, then contents.

        Args:
            only: hash these files alone; null: all.

        Raises:
            CheckpointError: naming the first file that differs.
        """
        try:
            self._compare(folder, only)
        except OSError as error:  # a sector that is gone, a file of somebody else's
            raise CheckpointError(error.filename or folder, f"cannot be read: {error.strerror or error}") from None

    def _compare(self, folder: Path, only: frozenset[str] | None) -> None:
        found = {entry.name: entry for entry in os.scandir(folder)}
        for name, entry in found.items():
            # lstat: neither links out of the folder nor pipes and devices, which would hang the reader, are opened.
            if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                raise CheckpointError(folder / name, "is not a regular file")
            if name != NAME and name not in self.files:
                raise CheckpointError(folder / name, f"does not belong here: {NAME} does not name it")
        for name, expected in self.files.items():
            if name not in found:
                raise CheckpointError(folder / name, "is missing")
            size = found[name].stat(follow_symlinks=False).st_size
            if size != expected.bytes:
                raise CheckpointError(folder / name, f"has {size} bytes instead of {expected.bytes}")
        names = [name for name in self.files if only is None or name in only]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for name, sha256 in zip(names, pool.map(lambda name: file_sha256(folder / name), names), strict=True):
                if sha256 != self.files[name].sha256:
                    raise CheckpointError(folder / name, f"is damaged: its content is not what {NAME} says")


def _text(content: Mapping[str, Any]) -> str:
    """The one way to write it: what reads back equal and is written otherwise has been touched."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _signature(digest: str) -> str | None:
    key = os.environ.get(KEY_VARIABLE)
    return hmac.new(key.encode(), digest.encode(), hashlib.sha256).hexdigest() if key else None


def _read_small_file(path: Path) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(path, "is not a regular file")
        if status.st_size > _MAX_BYTES:
            raise CheckpointError(path, f"has {status.st_size} bytes, which no manifest needs")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from None


def _checked(content: dict[str, Any], path: Path) -> Manifest:
    """The manifest that ``content`` is, once every part is known to be of its kind."""
    files, metrics, parent = content.get("files"), content.get("metrics"), content.get("parent")
    if content.keys() != {field.name for field in fields(Manifest)}:
        raise CheckpointError(path, f"is damaged: it holds {', '.join(sorted(content))}")
    named = files if isinstance(files, dict) else {}
    entries = named.items()
    fine = (
        isinstance(content["step"], int)
        and isinstance(content["format"], int)
        and isinstance(content["run"], str)
        and isinstance(content["config_hash"], str)
        and (parent is None or isinstance(parent, str))
        and isinstance(files, dict)
        and isinstance(metrics, dict)
        and all(isinstance(value, int | float) for value in metrics.values())
        and all(isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} for _, entry in entries)
        and all(isinstance(entry["bytes"], int) and entry["bytes"] >= 0 for _, entry in entries)
        and all(_SHA256.fullmatch(str(entry["sha256"])) for _, entry in entries)
    )
    if not fine:
        raise CheckpointError(path, "is damaged: a part of it is not of its kind")
    for name in named:
        if not _FILE_NAME.fullmatch(name) or name == NAME:
            raise CheckpointError(path, f"names the file {name!r}, which is no plain file name")
    return Manifest(**content | {"files": {name: FileEntry(**entry) for name, entry in entries}})
