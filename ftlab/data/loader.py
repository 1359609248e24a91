"""The order of the samples, and the batches of each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import numpy as np

from ftlab.data.batch import Batch, Pack, Sample, collate, collate_folded
from ftlab.data.order import group_by_length, permutation
from ftlab.data.stream import Stream


class SampleSource(Protocol):
    """What a loader draws from: a row is a sample or a pack of them.

    It may have an ``order(epoch, seed, shuffle=...)`` of its own, as a mixture does, and the ``lengths`` of its rows.
    """

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample | Pack: ...


class BatchLoader:
    """Deals a dataset out to optimizer steps, ranks and micro-batches, each sample once per epoch.

    An optimizer step takes the next ``batch_size × gradient_accumulation_steps × dp_size`` samples of the
    epoch's order, whichever way that product is made, so the same global batch size means the same samples
    in every step. The last step of an epoch takes what is left; nothing is dropped.

    Args:
        dataset: anything with ``len`` and ``sample(i)``, or a ``Stream`` of such, whose order is drawn within windows.
        batch_size: samples per rank and micro-batch.
        gradient_accumulation_steps: micro-batches per optimizer step.
        shuffle: a new order each epoch; otherwise the dataset's own.
        seed: what the order is drawn from, together with the epoch.
        dp_rank: this data-parallel rank, of ``dp_size``.
        pad_id: token id that fills the short rows of a batch.
        grouped: bring rows of like length into the same step (``order.group_by_length``); padding is then rare.
        share_prefixes: fold each batch, so that what its samples begin with in common is computed once.
    """

    def __init__(
        self,
        dataset: SampleSource | Stream,
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        shuffle: bool,
        seed: int,
        dp_rank: int,
        dp_size: int,
        pad_id: int,
        grouped: bool = False,
        share_prefixes: bool = False,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.global_batch_size = batch_size * gradient_accumulation_steps * dp_size
        self.shuffle, self.seed = shuffle, seed
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.pad_id = pad_id
        self.grouped, self.share_prefixes = grouped, share_prefixes

    @property
    def streams(self) -> bool:
        """Whether rows are read as they are needed."""
        return isinstance(self.dataset, Stream)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps that use every sample once, the last partial one included.

        None for a stream that was not yet read to its end; from an epoch's last step on, it is known.
        """
        n_rows = self.dataset.n_rows if isinstance(self.dataset, Stream) else len(self.dataset)
        return None if n_rows is None else -(-n_rows // self.global_batch_size)

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of this rank, one list per optimizer step, from ``start_step`` of ``epoch`` on.

        Every rank gets lists of equal length, for each micro-batch may be a collective; where the samples
        of the last step run out, the rank that has none left gets ``Batch.empty``.
        """
        for block in self._blocks(epoch, start_step):
            largest_share = -(-len(block) // self.dp_size)
            # Dealt like cards: in a partial last step the ranks' shares differ by at most one sample.
            mine = block[self.dp_rank :: self.dp_size]
            yield [self._batch(mine[i : i + self.batch_size]) for i in range(0, largest_share, self.batch_size)]

    def samples(self, epoch: int, step: int) -> list[Sample]:
        """All ranks' samples of one step of ``epoch``, in order; none where the epoch has fewer steps."""
        return [sample for block in islice(self._blocks(epoch, step), 1) for sample in _samples(block)]

    def sample_ids(self, epoch: int, n_steps: int) -> Iterator[int]:
        """The samples that the first ``n_steps`` of ``epoch`` deal out to all ranks together, in order."""
        for block in islice(self._blocks(epoch, 0), n_steps):
            yield from (sample.sample_id for sample in _samples(block))

    def place(self, epoch_step: int) -> Mapping[str, int | None]:
        """What a checkpoint should say, beside the step, for ``go_to`` to find it without reading from the start."""
        return self.dataset.place(epoch_step * self.global_batch_size) if isinstance(self.dataset, Stream) else {}

    def go_to(self, place: Mapping[str, int | None]) -> None:
        """Know again what ``place`` told."""
        if isinstance(self.dataset, Stream):
            self.dataset.go_to(place)

    def _blocks(self, epoch: int, start_step: int) -> Iterator[list[tuple[SampleSource, int]]]:
        """The rows of each step, as a set and an index in it."""
        start = start_step * self.global_batch_size
        block: list[tuple[SampleSource, int]] = []
        for first, rows, order in self._windows(epoch, start):
            for index in order[max(0, start - first) :]:
                if len(block) == self.global_batch_size:  # only now: whoever gets the last block knows that it is
                    yield block
                    block = []
                block.append((rows, int(index)))
        if block:
            yield block

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the indices of a set that is no stream in the order of ``epoch``, the same on every rank."""
        assert not isinstance(self.dataset, Stream)
        if hasattr(self.dataset, "order"):
            order: np.ndarray = self.dataset.order(epoch, self.seed, shuffle=self.shuffle)
        else:
            n = len(self.dataset)
            order = permutation(n, self.seed, epoch) if self.shuffle else np.arange(n)
        if self.grouped:
            lengths: np.ndarray = getattr(self.dataset, "lengths")  # noqa: B009 - not every source can be grouped
            order = group_by_length(order, lengths, self.global_batch_size, self.seed, epoch)
        return order

    def _windows(self, epoch: int, start: int) -> Iterator[tuple[int, SampleSource, np.ndarray]]:
        """The rows in the order of ``epoch``, the same on every rank; windows before row ``start`` are left out."""
        size = self.global_batch_size
        if isinstance(self.dataset, Stream):
            for window in self.dataset.windows(epoch, self.seed, shuffle=self.shuffle, start=start):
                if self.grouped:  # in steps, of which the first may have begun in the window before
                    head = -window.first % size
                    tail = group_by_length(window.order[head:], window.rows.lengths, size, self.seed, epoch)
                    window = window._replace(order=np.concatenate([window.order[:head], tail]))
                yield window
        else:
            yield 0, self.dataset, self.order(epoch)

    def _batch(self, rows: list[tuple[SampleSource, int]]) -> Batch:
        if not rows:
            return Batch.empty(self.pad_id)
        samples = [source.sample(i) for source, i in rows]
        return collate_folded(samples) if self.share_prefixes else collate(samples, self.pad_id)


def _samples(block: list[tuple[SampleSource, int]]) -> Iterator[Sample]:
    for source, i in block:
        row = source.sample(i)
        yield from row.samples if isinstance(row, Pack) else [row]


def ahead(steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """The same steps, each made by a thread while the caller is at the one before."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = thread.submit(next, steps, None)
        while (step := coming.result()) is not None:
            coming = thread.submit(next, steps, None)
            yield step
