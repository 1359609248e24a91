"""How much memory code takes, told by running it on tensors that have shapes and no data.

``LiveBytes`` sees every operation below autograd, the backward's too, and keeps the books of storages as they come
and go: exactly what torch's allocators are asked for. What these make of it is for `cuda_peaks` and `heap_peak`.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import groupby
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Event = tuple[int, int]  # (number of the storage, bytes): positive where it is allocated, negative where it is freed

_CUDA_BLOCK = 512  # the smallest that torch's CUDA allocator gives out


class Phase(NamedTuple):
    """A stretch of work and its events, in order."""

    name: str
    events: list[Event]


class LiveBytes(TorchDispatchMode):
    """While active, records when storages are allocated and freed.

    Attributes:
        phases: in the order they were entered; a name may come several times.
        live: bytes held now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[Phase] = []
        self.live = 0
        self._held: dict[int, tuple[int, int, Any]] = {}  # storage's address -> its number, bytes, weak reference
        self._n_seen = 0
        self._undo = ExitStack()

    def enter(self, phase: str) -> None:
        """Begin ``phase``."""
        self.phases.append(Phase(phase, []))

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that no operation made."""
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # asked oftener than anything is computed
            return result
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def __enter__(self) -> Self:
        # FSDP2 gives gathered weights back by resizing their storage to nothing, which is no operation.
        resize = torch.UntypedStorage.resize_

        def seen(storage: torch.UntypedStorage, size: int) -> Any:
            self._resized(storage, size)
            return resize(storage, size)

        torch.UntypedStorage.resize_ = seen  # type: ignore[method-assign, assignment]
        self._undo.callback(setattr, torch.UntypedStorage, "resize_", resize)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.close()
        super().__exit__(*error)

    def _see(self, tensor: Tensor) -> None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage._cdata not in self._held:
            self._allocated(storage, storage.nbytes())

    def _allocated(self, storage: torch.UntypedStorage, n_bytes: int) -> None:
        address = storage._cdata
        self._n_seen += 1
        self._held[address] = self._n_seen, n_bytes, weakref.ref(storage, lambda _: self._freed(address))
        self._note(self._n_seen, n_bytes)

    def _freed(self, address: int) -> None:
        number, n_bytes, _ = self._held.pop(address)
        self._note(number, -n_bytes)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self._held and size != self._held[storage._cdata][1]:
            self._freed(storage._cdata)
            self._allocated(storage, size)

    def _note(self, number: int, n_bytes: int) -> None:
        if n_bytes:
            self.live += n_bytes
            self.phases[-1].events.append((number, n_bytes))


def live_peaks(phases: Iterable[Phase], block: int = 1) -> list[int]:
    """Most bytes held at once in each phase, sizes rounded up to whole ``block`` s."""
    live, peaks = 0, []
    for phase in phases:
        peak = live
        for _, n_bytes in phase.events:
            rounded = -(-abs(n_bytes) // block) * block
            live += rounded if n_bytes > 0 else -rounded
            peak = max(peak, live)
        peaks.append(peak)
    return peaks


def cuda_peaks(phases: Iterable[Phase]) -> list[int]:
    """Most bytes that torch's CUDA allocator gives out in each phase (``torch.cuda.max_memory_allocated``)."""
    return live_peaks(phases, _CUDA_BLOCK)


def heap_peak(phases: list[Phase]) -> int:
    """What the resident set of a process grows by, with glibc's malloc as ``distributed.env`` sets it.

    Everything is then on one heap from which nothing goes back. Blocks are asked for at 64-byte boundaries, so a
    sliver is left before each; while small allocations (the nodes of the autograd graph) sit in the slivers, the place
    of a freed block is too small for another of its size, and the heap grows though there is room. In the forward
    that holds for all of them, until the backward has come back to that point. In the backward it depends on chance:
    the same run, repeated, differed by 5 %, and by more where a few blocks are very large. So the answer is the mean
    of the two extremes, of all slivers kept free and of all in use.
    """
    extremes = [_heap_top(phases, slivers_of_backward_free=free) for free in (True, False)]
    return sum(extremes) // 2


def _heap_top(phases: list[Phase], *, slivers_of_backward_free: bool) -> int:
    heap = _Heap()
    phases = [
        Phase(name, [event for phase in stretch for event in phase.events])
        for name, stretch in groupby(phases, key=lambda phase: phase.name)
    ]
    held: list[tuple[float, tuple[int, int]]] = []  # slivers in use, and how far into the forward they were made
    for phase in phases:
        n = len(phase.events)
        if phase.name == "forward":
            held = []
        for i, (number, n_bytes) in enumerate(phase.events):
            while phase.name == "backward" and held and held[-1][0] >= 1 - i / n:
                heap.give(*held.pop()[1])
            if n_bytes < 0:
                heap.free(number)
                continue
            sliver = heap.allocate(number, n_bytes)
            if sliver is None:
                continue
            if phase.name == "forward":
                held.append((i / n, sliver))
            elif phase.name != "backward" or slivers_of_backward_free:
                heap.give(*sliver)
        if phase.name == "backward":
            while held:
                heap.give(*held.pop()[1])
    return heap.top


class _Heap:
    """glibc's heap: the smallest free piece that is large enough is split, free neighbours become one."""

    _ALIGNMENT, _HEADER, _LEAST = 64, 16, 32

    def __init__(self) -> None:
        self.top = 0
        self._used: dict[int, tuple[int, int]] = {}  # number -> start, size
        self._by_size: list[tuple[int, int]] = []  # free (size, start)
        self._size_at: dict[int, int] = {}  # free pieces by where they start
        self._start_of: dict[int, int] = {}  # and by where they end

    def allocate(self, number: int, n_bytes: int) -> tuple[int, int] | None:
        """Find a place as ``memalign`` does; returns the sliver (start, size) left before it, if any."""
        size = (n_bytes + 8 + 15) // 16 * 16
        needed = size + self._ALIGNMENT + self._LEAST
        i = bisect_left(self._by_size, (needed, 0))
        if i < len(self._by_size):
            found, start = self._by_size[i]
            self._take(start)
        else:  # what is free at the top is used as far as it goes
            start = self._start_of.get(self.top, self.top)
            if start < self.top:
                self._take(start)
            self.top = max(self.top, start + needed)
            found = self.top - start
        before = 0
        if (start + self._HEADER) % self._ALIGNMENT:
            before = self._LEAST + -(start + self._LEAST + self._HEADER) % self._ALIGNMENT
        after = found - before - size
        if after >= self._LEAST:
            self.give(start + before + size, after)
            after = 0
        self._used[number] = start + before, size + after
        return (start, before) if before else None

    def free(self, number: int) -> None:
        self.give(*self._used.pop(number))

    def give(self, start: int, size: int) -> None:
        """Make a piece free."""
        if (before := self._start_of.get(start)) is not None:
            size += self._take(before)
            start = before
        if start + size in self._size_at:
            size += self._take(start + size)
        self._size_at[start] = size
        self._start_of[start + size] = start
        insort(self._by_size, (size, start))

    def _take(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_of[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size
