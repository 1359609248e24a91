"""Meters: where the time of a step goes, how much memory it took, what share of the machine it used."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

GIB = 2**30

Metrics = dict[str, float]


class PhaseClock:
    """Splits wall-clock time into named phases; ``enter`` ends the phase before it, so the loop stays flat.

    On a GPU work is queued, not done, when the host enters the next phase. There the device keeps the time: an event
    is queued with the work, and read when the time is asked for. A phase in which the device waits for the host
    (for data) is as long as it waits. ``on_enter`` is told every phase as it begins.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device | None = None, on_enter: Callable[[str], None] = lambda _: None):
        self._on_gpu = device is not None and device.type == "cuda"
        self.on_enter = on_enter
        self.phase = "start"
        self._begun = [(self.phase, self._now())]

    def enter(self, phase: str) -> None:
        """Begin ``phase`` now."""
        self.phase = phase
        self._begun.append((phase, self._now()))
        self.on_enter(phase)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last ``take``; the current phase goes on. Waits for the device."""
        self.enter(self.phase)
        if self._on_gpu:
            self._begun[-1][1].synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in pairwise(self._begun):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        self._begun = self._begun[-1:]
        return dict(seconds)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def frozen_garbage() -> Iterator[Callable[[], None]]:
    """Gives a function to call after the first step: from then on Python's collector passes over all there is.

    What is built until then (modules, compiled code, libraries) lives as long as the run; looking through it all again
    takes half a second now and then, in the middle of a step. What is made later is collected as ever.
    """
    frozen = False

    def freeze() -> None:
        nonlocal frozen
        if not frozen:
            frozen = True
            gc.freeze()

    try:
        yield freeze
    finally:
        if frozen:
            gc.unfreeze()


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far in GiB: what the allocator gave out on CUDA, the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # Linux counts in KiB


def training_flops(
    n_matmul_params: int, n_layers: int, attention_dim: int, lengths: list[int], n_shared: int = 0
) -> float:
    """FLOPs of one forward and backward over sequences of ``lengths`` real tokens.

    ``6·N·t`` for the matrix products of N weights over t tokens (2 forward, 4 backward) and
    ``12·L·d·T²`` for attention scores and values of a sequence of T tokens, causality not
    subtracted: PaLM's convention (arXiv:2204.02311, appendix B). Padding counts nothing.

    Args:
        n_matmul_params: weights that multiply activations: all but the input embedding and the norms.
        n_layers: decoder blocks.
        attention_dim: heads × head_dim.
        lengths: real tokens of every sequence.
        n_shared: those of them whose products are another sequence's (``trainer.share_prefixes``).
    """
    tokens, squares = sum(lengths) - n_shared, sum(length * length for length in lengths)
    return 6.0 * n_matmul_params * tokens + 12.0 * n_layers * attention_dim * squares
