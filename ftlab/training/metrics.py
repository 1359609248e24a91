"""Meters: where the time of a step goes, how much memory it took, what share of the machine it used."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch

GIB = 2**30


class PhaseClock:
    """Splits wall-clock time into named phases.

    ``enter`` ends the phase before it, so the loop stays flat. On a GPU work is
    queued, not done, when a phase ends: the parts then say where the *host* was,
    and only their sum over a window that ends in a synchronisation is exact.
    ``synchronize`` makes the parts exact too, at the price of the overlap
    (``benchmarks/step.py`` does). ``on_enter`` is told every phase as it begins.
    """

    def __init__(self, synchronize: torch.device | None = None, on_enter: Callable[[str], None] = lambda _: None):
        self._synchronize = synchronize if synchronize is not None and synchronize.type == "cuda" else None
        self.on_enter = on_enter
        self.phase = "start"
        self._since = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        """Begin ``phase`` now."""
        if self._synchronize is not None:
            torch.cuda.synchronize(self._synchronize)
        now = time.perf_counter()
        self._seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now
        self.on_enter(phase)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last ``take``; the current phase goes on."""
        self.enter(self.phase)
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far in GiB: what the allocator gave out on CUDA, the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # Linux counts in KiB


def training_flops(n_matmul_params: int, n_layers: int, attention_dim: int, lengths: list[int]) -> float:
    """FLOPs of one forward and backward over sequences of ``lengths`` real tokens.

    ``6·N·t`` for the matrix products of N weights over t tokens (2 forward, 4 backward) and
    ``12·L·d·T²`` for attention scores and values of a sequence of T tokens, causality not
    subtracted: PaLM's convention (arXiv:2204.02311, appendix B). Padding counts nothing.

    Args:
        n_matmul_params: weights that multiply activations: all but the input embedding and the norms.
        n_layers: decoder blocks.
        attention_dim: heads × head_dim.
        lengths: real tokens of every sequence.
    """
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    return 6.0 * n_matmul_params * tokens + 12.0 * n_layers * attention_dim * squares
