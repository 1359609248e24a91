"""Which rows are held out for validation."""

from __future__ import annotations

import numpy as np

from ftlab.data.order import permutation
from ftlab.errors import ConfigError


def draw_validation(digests: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows to hold out.

    Whole groups of equal rows are drawn, at least one, until the share is reached; so no row is on both sides,
    not even as a copy. The draw depends on the rows' contents and the seed, not on their order.

    Args:
        digests: (n,) uint64; equal rows have equal digests.
        fraction: share of the rows, in [0, 1); 0 draws none.

    Returns:
        (n,) bool, true for validation.

    Raises:
        ConfigError: if nothing would be left to train on.
    """
    if fraction == 0:
        return np.zeros(len(digests), dtype=bool)
    groups, group_of_row, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    order = permutation(len(groups), seed)
    wanted = max(1, round(fraction * len(digests)))
    n_groups = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    if n_groups >= len(groups):
        raise ConfigError(
            "dataset.val_fraction",
            f"{fraction} leaves nothing to train on: {len(digests)} rows, {len(groups)} of them different",
            "dataset.val_fraction=0",
        )
    return np.isin(group_of_row, order[:n_groups])
