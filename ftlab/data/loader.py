"""The order of the samples, and the batches of each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ftlab.data.batch import Batch, Pack, Sample, collate
from ftlab.data.order import group_by_length, permutation


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
        dataset: anything with ``len`` and ``sample(i)``.
        batch_size: samples per rank and micro-batch.
        gradient_accumulation_steps: micro-batches per optimizer step.
        shuffle: a new order each epoch; otherwise the dataset's own.
        seed: what the order is drawn from, together with the epoch.
        dp_rank: this data-parallel rank, of ``dp_size``.
        pad_id: token id that fills the short rows of a batch.
        grouped: bring rows of like length into the same step (``order.group_by_length``); padding is then rare.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        shuffle: bool,
        seed: int,
        dp_rank: int,
        dp_size: int,
        pad_id: int,
        grouped: bool = False,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.global_batch_size = batch_size * gradient_accumulation_steps * dp_size
        self.shuffle, self.seed = shuffle, seed
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.pad_id = pad_id
        self.grouped = grouped

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that use every sample once, the last partial one included."""
        return -(-len(self.dataset) // self.global_batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the dataset's indices in the order of ``epoch``, the same on every rank."""
        n = len(self.dataset)
        if hasattr(self.dataset, "order"):
            order: np.ndarray = self.dataset.order(epoch, self.seed, shuffle=self.shuffle)
        else:
            order = permutation(n, self.seed, epoch) if self.shuffle else np.arange(n)
        if self.grouped:
            lengths: np.ndarray = getattr(self.dataset, "lengths")  # noqa: B009 - not every source can be grouped
            order = group_by_length(order, lengths, self.global_batch_size, self.seed, epoch)
        return order

    def sample_ids(self, epoch: int, n_steps: int) -> Iterator[int]:
        """The samples that the first ``n_steps`` of ``epoch`` deal out to all ranks together, in order."""
        for index in self.order(epoch)[: n_steps * self.global_batch_size]:
            row = self.dataset.sample(int(index))
            yield from (sample.sample_id for sample in (row.samples if isinstance(row, Pack) else [row]))

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of this rank, one list per optimizer step, from ``start_step`` of ``epoch`` on.

        Every rank gets lists of equal length, for each micro-batch may be a collective; where the samples
        of the last step run out, the rank that has none left gets ``Batch.empty``.
        """
        order = self.order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            block = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
            largest_share = -(-len(block) // self.dp_size)
            # Dealt like cards: in a partial last step the ranks' shares differ by at most one sample.
            mine = block[self.dp_rank :: self.dp_size]
            yield [self._batch(mine[i : i + self.batch_size]) for i in range(0, largest_share, self.batch_size)]

    def _batch(self, indices: np.ndarray) -> Batch:
        if len(indices) == 0:
            return Batch.empty(self.pad_id)
        return collate([self.dataset.sample(int(i)) for i in indices], self.pad_id)
