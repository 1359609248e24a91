"""How much a trained token counts in the loss, where that is not one."""

from __future__ import annotations

from typing import Any

import numpy as np

ONE = 1 << 28
"""A weight of 1, as a whole number: sums of weights are sums of integers, the same in whatever order and on however
many ranks, and fit 64 bits up to 2**35 tokens of weight 1."""

SMALLEST, LARGEST = 1e-6, 1000.0
ALLOWED = f"0, or a number from {SMALLEST:f} to {LARGEST:g}"


def is_weight(value: Any) -> bool:
    """Whether a row may say so; NaN may not."""
    return isinstance(value, (int, float)) and (value == 0 or SMALLEST <= value <= LARGEST)


def rounded(weight: float) -> float:
    """The nearest multiple of 1 / ``ONE`` that float32 has: what is multiplied with is what the sum holds."""
    return float(np.float32(round(weight * ONE) / ONE))


def total(weights: np.ndarray) -> int:
    """The sum of rounded weights in units of 1 / ``ONE``, exactly."""
    return int(np.rint(weights.astype(np.float64) * ONE).astype(np.int64).sum())
