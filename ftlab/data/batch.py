"""Samples, and the padded or packed batches that the model is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ftlab import IGNORE_INDEX
from ftlab.data.weights import ONE, total
from ftlab.prefixes import Tree, fold


@dataclass(frozen=True)
class Sample:
    """One tokenised row.

    Attributes:
        tokens: (T,) whole numbers, BOS and EOS included.
        trained: (T,) bool, the tokens that the model is taught to predict. The first token never is:
            nothing comes before it. Or float32, how much each of them counts in the loss, 0 for those that are not
            trained.
        sample_id: row number in the source, counted from 0.
    """

    tokens: np.ndarray
    trained: np.ndarray
    sample_id: int


@dataclass(frozen=True)
class Pack:
    """Several samples in one row, none of which may see another.

    Attributes:
        samples: at least one.
        length: tokens of the row, at least as many as the samples have: equal for all packs, so that shapes stay.
    """

    samples: Sequence[Sample]
    length: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch: one sample a row, padded on the right to the longest, or packed rows of equal length.

    Padding on the right needs no attention mask under causal attention: no real token comes after it.
    Folded, it is one row of all samples' nodes (``ftlab/prefixes.py``), with next to no padding.

    Attributes:
        tokens: (B, T) int64; folded (1, U).
        targets: (B, T) int64, already shifted: ``targets[:, t]`` is what position ``t`` has to predict,
            or ``IGNORE_INDEX``. The last token of a sample predicts nothing; it stays in ``tokens`` so
            that full rows keep their round length, which kernels like better than ``seq_len - 1``. Folded (M,).
        sample_ids: row number in the source of each sample; empty for a batch without samples.
        lengths: real tokens of each sample, padding not counted.
        n_targets: targets that count in the loss, of all samples.
        total_weight: how much they count together, in units of 1 / ``weights.ONE``.
        weights: (B, T) float32, how much each counts, 0 where there is no target; None where each counts 1.
            Folded (M,), each as much as in all samples together.
        doc_ids: (B, T) int64 in packed batches: the number of each token's sample in its row, padding having one of
            its own; None where every row is one sample. Folded (1, N): of all samples' tokens one after the other,
            and of what packs have left over.
        tree: of a folded batch.

    The counts are host integers taken when the batch is made: asking the device would block on it.
    """

    tokens: Tensor
    targets: Tensor
    sample_ids: list[int]
    lengths: list[int]
    n_targets: int
    total_weight: int
    doc_ids: Tensor | None = None
    weights: Tensor | None = None
    tree: Tree | None = None

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)

    @property
    def n_padding(self) -> int:
        """Tokens that are computed and belong to no sample."""
        return self.tokens.numel() - (self.n_tokens if self.tree is None else self.tree.n_nodes)

    @property
    def n_shared(self) -> int:
        """Real tokens that are not computed, for another sample's are the same."""
        return 0 if self.tree is None else self.n_tokens - self.tree.n_nodes

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; from pinned memory the copy overlaps with work already queued there."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in memory that the operating system leaves in place, where a GPU can fetch it by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        doc_ids, weights = (None if tensor is None else move(tensor) for tensor in (self.doc_ids, self.weights))
        tree = None if self.tree is None else self.tree.each(move)
        tokens, targets = move(self.tokens), move(self.targets)
        return replace(self, tokens=tokens, targets=targets, doc_ids=doc_ids, weights=weights, tree=tree)

    @classmethod
    def empty(cls, pad_id: int) -> Batch:
        """One row of which nothing counts, for a rank without samples that must still join the collectives."""
        return cls(
            tokens=torch.full((1, 1), pad_id, dtype=torch.int64),
            targets=torch.full((1, 1), IGNORE_INDEX, dtype=torch.int64),
            sample_ids=[],
            lengths=[],
            n_targets=0,
            total_weight=0,
        )


def collate(rows: Sequence[Sample | Pack], pad_id: int) -> Batch:
    """Pad ``rows`` on the right and shift their targets.

    Args:
        rows: at least one, none of them empty; all samples, or all packs.
        pad_id: any valid token id; it is never a target and no real token can attend to it.
    """
    packed = any(isinstance(row, Pack) for row in rows)
    samples_of = [_samples_of(row) for row in rows]
    width = max(row.length if isinstance(row, Pack) else len(row.tokens) for row in rows)
    tokens = np.full((len(rows), width), pad_id, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    doc_ids = np.zeros((len(rows), width), dtype=np.int64)
    weighted = any(_is_weighted(sample) for samples in samples_of for sample in samples)
    weights = np.zeros((len(rows), width), dtype=np.float32) if weighted else None
    for row, samples in enumerate(samples_of):
        start = 0
        for number, sample in enumerate(samples):
            end = start + len(sample.tokens)
            tokens[row, start:end] = sample.tokens
            # The last token of a sample predicts nothing, least of all the first of the next.
            targets[row, start : end - 1] = np.where(sample.trained[1:], tokens[row, start + 1 : end], IGNORE_INDEX)
            if weights is not None:
                weights[row, start : end - 1] = sample.trained[1:]
            doc_ids[row, start:end] = number
            start = end
        doc_ids[row, start:] = len(samples)
    samples = [sample for row in samples_of for sample in row]
    n_targets = int((targets != IGNORE_INDEX).sum())
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        sample_ids=[sample.sample_id for sample in samples],
        lengths=[len(sample.tokens) for sample in samples],
        n_targets=n_targets,
        total_weight=n_targets * ONE if weights is None else total(weights),
        doc_ids=torch.from_numpy(doc_ids) if packed else None,
        weights=None if weights is None else torch.from_numpy(weights),
    )


def collate_folded(rows: Sequence[Sample | Pack]) -> Batch:
    """The same samples, of which what they begin with in common is computed once.

    Args:
        rows: as for ``collate``.
    """
    samples = [sample for row in rows for sample in _samples_of(row)]
    lengths = [len(sample.tokens) for sample in samples]
    n_places = sum(row.length if isinstance(row, Pack) else len(row.tokens) for row in rows)  # attention's shapes stay
    folded = fold([sample.tokens for sample in samples], [sample.trained for sample in samples], n_places)
    in_order = [lengths[i] for i in folded.order]
    trained = np.concatenate([sample.trained[1:] for sample in samples])
    n_targets = int(np.count_nonzero(trained))
    weighted = any(_is_weighted(sample) for sample in samples)
    return Batch(
        tokens=torch.from_numpy(folded.tokens)[None],
        targets=torch.from_numpy(folded.targets),
        sample_ids=[sample.sample_id for sample in samples],
        lengths=lengths,
        n_targets=n_targets,
        total_weight=total(trained.astype(np.float32, copy=False)) if weighted else n_targets * ONE,
        doc_ids=torch.from_numpy(np.repeat(np.arange(len(samples) + 1), [*in_order, n_places - sum(lengths)]))[None],
        weights=torch.from_numpy(folded.weights),
        tree=folded.tree,
    )


def _samples_of(row: Sample | Pack) -> Sequence[Sample]:
    return row.samples if isinstance(row, Pack) else [row]


def _is_weighted(sample: Sample) -> bool:
    """Whether its targets count as more or less than one."""
    weights = sample.trained
    return weights.dtype != bool and not bool(((weights == 0) | (weights == 1)).all())
