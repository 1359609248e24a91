"""The rows and the probe that all contestants share; needs numpy and torch only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
N_PROBED = 8  # rows


def read_rows(file: Path) -> list[list[int]]:
    """Token ids of every row, in the order of training."""
    arrays = np.load(file)
    return [part.tolist() for part in np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])]


def padded(rows: list[list[int]], pad: int) -> Tensor:
    """(B, T) int64."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


@torch.no_grad()
def probe(logits_of: Callable[[Tensor], Tensor], rows: list[list[int]]) -> float:
    """Mean loss per predicted token of the first rows; ``logits_of`` (B, T) tokens gives (B, T, V)."""
    rows = rows[:N_PROBED]
    logits = logits_of(padded(rows, 0))[:, :-1].float()
    return float(F.cross_entropy(logits.flatten(0, 1), padded(rows, IGNORE)[:, 1:].flatten(), ignore_index=IGNORE))
