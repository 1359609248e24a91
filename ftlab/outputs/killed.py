"""Why a process ended that could not say so itself."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from ftlab.errors import FtlabError, KilledError, OutOfMemoryError

# How many processes the kernel has killed for want of memory: in this container, and on the machine.
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


def n_oom_kills() -> int:
    """By the kernel's own count; 0 where it keeps none that we may read."""
    total = 0
    for file in _COUNTERS:
        try:
            found = re.search(r"^oom_kill (\d+)", file.read_text(), re.MULTILINE)
        except OSError:
            continue
        total += int(found.group(1)) if found else 0
    return total


class Watch:
    """Begun before a process starts, so that its end can be explained."""

    def __init__(self) -> None:
        self._oom_kills = n_oom_kills()

    def explain(self, number: int) -> FtlabError:
        """The error for a process that signal ``number`` ended."""
        name = signal.Signals(number).name
        if number == signal.SIGKILL and n_oom_kills() > self._oom_kills:
            return OutOfMemoryError(
                "the kernel killed the job's process: the machine had no memory left\n"
                "  try: fewer sweep.jobs_at_once, a smaller trainer.batch_size"
            )
        hint = "; the kernel does that, too, when memory runs out" if number == signal.SIGKILL else ""
        return KilledError(f"the job's process was killed by {name}{hint}")
