"""Samples, and the padded batches that the model is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ftlab import IGNORE_INDEX


@dataclass(frozen=True)
class Sample:
    """One tokenised row.

    Attributes:
        tokens: (T,) int32, BOS and EOS included.
        trained: (T,) bool, the tokens that the model is taught to predict. The first token never is:
            nothing comes before it.
        sample_id: row number in the source, counted from 0.
    """

    tokens: np.ndarray
    trained: np.ndarray
    sample_id: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right to its longest sample.

    Padding on the right needs no attention mask under causal attention: no real token comes after it.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, already shifted: ``targets[:, t]`` is what position ``t`` has to predict,
            or ``IGNORE_INDEX``. The last token of a sample predicts nothing; it stays in ``tokens`` so
            that full rows keep their round length, which kernels like better than ``seq_len - 1``.
        sample_ids: row number in the source of each sample; empty for a batch without samples.
        lengths: real tokens of each sample, padding not counted.
        n_targets: targets that count in the loss.

    The counts are host integers taken when the batch is made: asking the device would block on it.
    """

    tokens: Tensor
    targets: Tensor
    sample_ids: list[int]
    lengths: list[int]
    n_targets: int

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; on CUDA the copy overlaps with work already queued there."""
        device = torch.device(device)
        if device.type == "cuda":  # only a copy from pinned memory is asynchronous
            tokens, targets = self.tokens.pin_memory(), self.targets.pin_memory()
        else:
            tokens, targets = self.tokens, self.targets
        return replace(
            self,
            tokens=tokens.to(device, non_blocking=True),
            targets=targets.to(device, non_blocking=True),
        )

    @classmethod
    def empty(cls, pad_id: int) -> Batch:
        """One row of which nothing counts, for a rank without samples that must still join the collectives."""
        return cls(
            tokens=torch.full((1, 1), pad_id, dtype=torch.int64),
            targets=torch.full((1, 1), IGNORE_INDEX, dtype=torch.int64),
            sample_ids=[],
            lengths=[],
            n_targets=0,
        )


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad ``samples`` on the right and shift their targets.

    Args:
        samples: at least one, none of them empty.
        pad_id: any valid token id; it is never a target and no real token can attend to it.
    """
    shape = (len(samples), max(len(sample.tokens) for sample in samples))
    tokens = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, sample in enumerate(samples):
        n = len(sample.tokens)
        tokens[row, :n] = sample.tokens
        targets[row, : n - 1] = np.where(sample.trained[1:], sample.tokens[1:], IGNORE_INDEX)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        sample_ids=[sample.sample_id for sample in samples],
        lengths=[len(sample.tokens) for sample in samples],
        n_targets=int((targets != IGNORE_INDEX).sum()),
    )
