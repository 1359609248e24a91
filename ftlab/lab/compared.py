"""Two runs side by side: files by their hashes, logs line by line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlab.storage.checkpoints import Found
from ftlab.storage.manifest import Manifest

_OF_TIME = ("perf/", "memory/")  # metrics that no two runs share


@dataclass(frozen=True)
class Compared:
    """One thing that both runs should end with: what it is, and how far it is the same."""

    what: str
    same: bool
    detail: str


def compare_files(what: str, prefix: str, ends: Sequence[Found]) -> Compared:
    """The files of two checkpoints whose names begin with ``prefix``, by their hashes."""
    hashes = [
        {name: entry.sha256 for name, entry in Manifest.read(end.path).files.items() if name.startswith(prefix)}
        for end in ends
    ]
    differing = [name for name in {**hashes[0], **hashes[1]} if hashes[0].get(name) != hashes[1].get(name)]
    sizes = sum(Manifest.read(ends[0].path).files[name].bytes for name in hashes[0])
    same = f"{sizes:,} bytes in {len(hashes[0])} files, sha256 equal"
    return Compared(what, not differing, f"{', '.join(differing)} differ" if differing else same)


def compare_lines(name: str, one: Path, other: Path) -> Compared:
    """Two logs, line by line, but for times and memory."""
    logged = [_read(path) for path in (one, other)]
    for i, (ours, theirs) in enumerate(zip(*logged, strict=False)):
        if ours != theirs:
            keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
            return Compared(name, False, f"line {i + 1}: {keys[0]} is {ours.get(keys[0])} and {theirs.get(keys[0])}")
    n, m = map(len, logged)
    return Compared(name, n == m, f"{n} lines, every value but times equal" if n == m else f"{n} and {m} lines")


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [untimed(json.loads(line)) for line in lines]


def untimed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those that two runs can share: without times and memory."""
    return {key: value for key, value in metrics.items() if not key.startswith(_OF_TIME)}
