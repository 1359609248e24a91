"""The order of the samples, and the batches of each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ftlab.data.batch import Batch, Sample, collate


def permutation(n: int, seed: int, *path: int) -> np.ndarray:
    """A permutation of ``range(n)`` that depends on nothing but its arguments.

    ``RandomState`` over ``MT19937`` and ``SeedSequence`` are the parts of NumPy whose streams are frozen
    (NEP 19): a run resumed years later, on another machine and another version, sees the same order.

    Args:
        seed: any non-negative integer, 0 included.
        path: further non-negative integers; each path gives an independent order, e.g. one per epoch.
    """
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=path)
    return np.random.RandomState(np.random.MT19937(sequence)).permutation(n)


class SampleSource(Protocol):
    """What a loader draws from."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


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
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.global_batch_size = batch_size * gradient_accumulation_steps * dp_size
        self.shuffle, self.seed = shuffle, seed
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.pad_id = pad_id

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that use every sample once, the last partial one included."""
        return -(-len(self.dataset) // self.global_batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the dataset's indices in the order of ``epoch``, the same on every rank."""
        n = len(self.dataset)
        return permutation(n, self.seed, epoch) if self.shuffle else np.arange(n)

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
