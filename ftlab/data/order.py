"""The order in which rows are seen: a pure function of seed, epoch and position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GROUPED_STEPS = 50  # optimizer steps whose rows are sorted together: long enough to find rows of a length


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


def group_by_length(order: np.ndarray, lengths: np.ndarray, block: int, seed: int, epoch: int) -> np.ndarray:
    """``order`` with rows of like length brought together into the same optimizer step.

    Some steps' worth of rows at a time are sorted by length, cut into steps, and the steps are shuffled, so that
    training never goes from short rows to long ones. What is left at the end of an epoch stays there.

    Args:
        lengths: (n,) tokens of every row.
        block: rows of an optimizer step.
    """
    whole = len(order) // block * block
    grouped = []
    for start in range(0, whole, block * _GROUPED_STEPS):
        rows = order[start : min(start + block * _GROUPED_STEPS, whole)]
        steps = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, block)
        grouped.append(steps[permutation(len(steps), seed, epoch, start)].ravel())
    return np.concatenate([*grouped, order[whole:]]) if grouped else order


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """(k,) whole numbers in the proportion of ``weights`` that sum to ``total`` (largest remainders)."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    short = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return counts


def mixed(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
    """One epoch of a mixture: ``counts[k]`` rows of source ``k``, as indices into all sources one after another.

    Each source goes on where the epoch before left it: it is gone through once, in an order of its own, before any
    of its rows comes again. With ``shuffle`` the sources are interleaved at random, else evenly.
    """
    first = np.concatenate([[0], np.cumsum(sizes)])
    drawn = []
    for k, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        positions = np.arange(epoch * count, (epoch + 1) * count)
        rounds, places = positions // size, positions % size
        rows = places.copy()
        if shuffle:
            for turn in np.unique(rounds):
                here = rounds == turn
                rows[here] = permutation(size, seed, k, int(turn))[places[here]]
        drawn.append(first[k] + rows)
    rows = np.concatenate(drawn)
    if shuffle:
        return rows[permutation(len(rows), seed, len(sizes), epoch)]
    evenly = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return rows[np.argsort(evenly, kind="stable")]
