"""How many cores tokenisation may use in this process."""

from __future__ import annotations

import os

_cores: int | None = None


def use_cores(n: int) -> None:
    """Tokenise on ``n`` cores in this process, where it would take all there are."""
    global _cores
    _cores = n
    os.environ["RAYON_NUM_THREADS"] = str(n)  # the threads of Hugging Face's tokenizers


def n_cores() -> int:
    """Cores this process may run on, which in a container or under Slurm are fewer than the machine has."""
    if _cores is not None:
        return _cores
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
