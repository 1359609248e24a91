"""The code, the versions and the machine that a run ran with and on."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil


def now() -> datetime:
    return datetime.now(UTC)


def code_state() -> dict[str, Any]:
    """``{"commit": str | None, "dirty": bool | None}`` of the checkout that ftlab was imported from.

    None where ftlab is an installed package (even one inside somebody's repository) or git is not at hand.
    """
    root = Path(__file__).resolve().parents[2]

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


def commits_between(before: str | None, after: str | None) -> list[str]:
    """Commit and subject of what lies between two commits of ftlab's own checkout, newest first; empty where git does
    not know them."""
    if not before or not after or before == after:
        return []
    command = ["git", "-C", str(Path(__file__).resolve().parents[2]), "log", "--oneline", "--no-decorate"]
    try:
        # Three dots: those of either that the other has not.
        log = subprocess.run([*command, f"{before}...{after}"], capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return []
    return log.stdout.splitlines()


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


def machine() -> dict[str, Any]:
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
