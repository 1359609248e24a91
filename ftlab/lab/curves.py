"""Curves small enough for a page of hundreds of runs: thinned so that the eye sees no difference, packed as bytes."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from ftlab.lab.runs import Series

Array = np.ndarray[Any, np.dtype[Any]]


def thin(steps: Array, values: Array, n_points: int) -> tuple[Array, Array, Array]:
    """At most ``n_points`` of a curve: its ends, and the least and the greatest value of every stretch of it.

    What is drawn of a dense curve is a band from its lowest to its highest value in every column of pixels: that band
    stays, spikes included. An average over the points would be biased, so each comes with the mean of its stretch.

    Args:
        steps, values: (n,) float64; NaN marks a value that was not finite.
        n_points: at least 4.

    Returns:
        Steps, values, and means to smooth, (m,) each, m ≤ n_points.
    """
    assert n_points >= 4
    if len(steps) <= n_points:
        return steps, values, values
    n_stretches = (n_points - 2) // 2  # two points are for the ends
    bounds = np.linspace(0, len(steps), n_stretches + 1).astype(int)[:-1]
    filled = np.isfinite(values)
    low, high = np.where(filled, values, np.inf), np.where(filled, values, -np.inf)
    picked = []
    ends = np.append(bounds[1:], len(steps))
    for start, end in zip(bounds, ends, strict=True):
        pair = {start + int(low[start:end].argmin()), start + int(high[start:end].argmax())}
        picked.append(pair if len(pair) == 2 else pair | {end - 1})  # of a level stretch the end
    picked[0].add(0)
    picked[-1].add(len(steps) - 1)
    indices = np.array([index for pair in picked for index in sorted(pair)])
    counts = np.add.reduceat(filled, bounds)
    sums = np.add.reduceat(np.where(filled, values, 0.0), bounds)
    with np.errstate(invalid="ignore"):
        means = np.repeat(sums / counts, [len(pair) for pair in picked])
    return steps[indices], values[indices], means


def pack(series: Series, n_points: int) -> dict[str, str | int]:
    """A curve as base64 of little-endian arrays: ``y`` (float32) and, where it was thinned, ``mean``.

    What was not finite, and what float32 cannot hold, is NaN there: a gap. Of the steps there is the ``first``, and
    what each is ``apart`` from the one before it, in as many ``bits`` as these take: mostly 8 of 32.
    """
    steps = np.array([step for step, _ in series], np.float64)
    values = np.array([np.nan if value is None else value for _, value in series], np.float64)
    values[np.abs(values) > np.finfo(np.float32).max] = np.nan
    x, y, mean = thin(steps, values, n_points)
    apart = np.diff(x, prepend=x[0])
    bits = next((bits for bits in (8, 16) if apart.min() >= 0 and apart.max() < 2**bits), 32)
    of_steps: dict[str, str | int] = {"first": int(x[0]), "apart": _base64(apart, _DIFFERENCES[bits]), "bits": bits}
    packed = of_steps | {"y": _base64(y, "<f4")}
    return packed if mean is y else packed | {"mean": _base64(mean, "<f4")}


_DIFFERENCES = {8: "<u1", 16: "<u2", 32: "<i4"}


def _base64(array: Array, dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode("ascii")
