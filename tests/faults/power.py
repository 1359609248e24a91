"""Simulated power loss: which trees of files a disk may hold after it, given a journal of the changes made.

What POSIX promises, and no more: a file's bytes are there once the file was flushed after they were written; a name
made, changed or removed in a folder is so once the folder was flushed after that. All else may be or not be, each
name for itself. Bytes not flushed may be absent, there, or zeros. A rename is one change: it has happened or not.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False)
class File:
    """A file's bytes: as written, and how many of them are flushed."""

    data: bytes = b""
    n_safe: int = 0


@dataclass(eq=False)
class Dir:
    """A folder's names that are safe, and the changes since, oldest first: (name that goes, name that comes, what)."""

    safe: dict[str, File | Dir] = field(default_factory=dict)
    changes: list[tuple[str | None, str | None, File | Dir | None]] = field(default_factory=list)

    def now(self, kept: frozenset[int] | None = None) -> dict[str, File | Dir]:
        """The names with all changes, or with those numbered in ``kept``."""
        names = dict(self.safe)
        for number, (gone, come, what) in enumerate(self.changes):
            if kept is None or number in kept:
                if gone is not None:
                    names.pop(gone, None)
                if come is not None and what is not None:
                    names[come] = what
        return names

    def flush(self) -> None:
        """Make all changes safe."""
        self.safe, self.changes = self.now(), []


class Disk:
    """The run's folder, as the journal makes it."""

    def __init__(self) -> None:
        self.root = Dir()

    def apply(self, operation: str, path: str, content: bytes) -> None:
        """One entry of the journal, as ``ftlab.storage.disk`` tells it."""
        if path == "." or path.startswith(".."):  # the run's own folder
            if path == ".":
                self.root.flush()
            return
        parent, name = self._at(Path(path).parent), Path(path).name
        match operation:
            case "mkdir":
                parent.changes.append((None, name, Dir()))
            case "open":
                parent.changes.append((None, name, File()))
            case "write" | "close":
                file = parent.now()[name]
                assert isinstance(file, File)
                file.data = content
            case "fsync":
                if name not in parent.now():  # the text file beside the one it will replace: not told when opened
                    parent.changes.append((None, name, File()))
                file = parent.now()[name]
                assert isinstance(file, File)
                file.data, file.n_safe = content, len(content)
            case "rename":
                before = _name_before(name, parent.now())
                parent.changes.append((before, name, parent.now()[before]))
            case "fsync_folder":
                self._at(Path(path)).flush()
            case "remove":
                parent.changes.append((name, None, None))

    def _at(self, path: Path) -> Dir:
        here = self.root
        for part in path.parts:
            there = here.now()[part]
            assert isinstance(there, Dir)
            here = there
        return here


def _name_before(name: str, names: dict[str, File | Dir]) -> str:
    """What was renamed to ``name``: only the new name is told."""
    candidates = [f".{name}.tmp", f"{name}.tmp", name.removesuffix(".tmp")]
    [before] = [one for one in candidates if one in names and one != name]
    return before


def trees_after_power_loss(disk: Disk, rng: random.Random, n_random: int) -> Iterator[dict[str, bytes | None]]:
    """Trees that may be found: path to content, None for a folder.

    All pending changes of names, none, each alone, all but each, and some random sets; each with bytes that were not
    flushed absent, there and zero.
    """
    folders = list(_folders(disk.root))
    pending = [(folder, number) for folder in folders for number in range(len(folder.changes))]
    everything = frozenset(range(len(pending)))
    choices = {frozenset(), everything}
    choices |= {frozenset({i}) for i in everything} | {everything - {i} for i in everything}
    choices |= {frozenset(i for i in everything if rng.random() < 0.5) for _ in range(n_random)}
    unsafe = any(file.n_safe < len(file.data) for folder in folders for file in _files(folder))
    for choice in sorted(choices, key=sorted):
        kept = {folder: frozenset(pending[i][1] for i in choice if pending[i][0] is folder) for folder in folders}
        for bytes_ in ("absent", "there", "zero") if unsafe else ("there",):
            yield dict(_tree(disk.root, "", kept, bytes_))


def _folders(folder: Dir) -> Iterator[Dir]:
    yield folder
    seen = [*folder.safe.values(), *(what for _, _, what in folder.changes)]
    for what in {id(one): one for one in seen if isinstance(one, Dir)}.values():
        yield from _folders(what)


def _files(folder: Dir) -> Iterator[File]:
    yield from (one for one in folder.now().values() if isinstance(one, File))


def _tree(folder: Dir, at: str, kept: dict[Dir, frozenset[int]], bytes_: str) -> Iterator[tuple[str, bytes | None]]:
    for name, what in folder.now(kept[folder]).items():
        if isinstance(what, Dir):
            yield at + name, None
            yield from _tree(what, f"{at}{name}/", kept, bytes_)
            continue
        lost = len(what.data) - what.n_safe
        tail = {"absent": b"", "there": what.data[what.n_safe :], "zero": bytes(lost)}[bytes_]
        yield at + name, what.data[: what.n_safe] + tail


def snapshot(disk: Disk) -> Disk:
    """The disk as it is now; the original goes on."""
    return copy.deepcopy(disk)
