"""What can be said about results over seeds, and which of them nothing else beats. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided 95 % confidence interval, mean ± half, by Student's t.

    Attributes:
        half: None where a single value says nothing about the spread.
    """

    n: int
    mean: float
    half: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """Of independent values, at least one."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(1, mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(n, mean, t_quantile(n - 1) * math.sqrt(variance / n))


def paired(ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float]) -> Interval | None:
    """Of ours − theirs over what both have (seeds); None where that is nothing.

    Pairing takes out what a seed does to both: two settings may each vary more between seeds than they differ, and
    yet one be better under every seed.
    """
    shared = [key for key in ours if key in theirs]
    return interval([ours[key] - theirs[key] for key in shared]) if shared else None


@cache
def t_quantile(df: int, confidence: float = 0.95) -> float:
    """The t with ``confidence`` of Student's distribution between −t and t; bisected, to 1e-12."""
    low, high = 0.0, 1.0
    while _within(high, df) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < confidence else (low, middle)
    return high


def _within(t: float, df: int) -> float:
    """P(−t < T < t) for a whole number of degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cos2, total, term = math.cos(angle) ** 2, 0.0, 1.0
    first = 2 if df % 2 else 1
    for k in range(first, df - 1, 2):
        total += term
        term *= cos2 * k / (k + 1)
    if df > 1:
        total += term
    if df % 2:
        return 2 / math.pi * (angle + (math.sin(angle) * math.cos(angle) * total if df > 1 else 0.0))
    return math.sin(angle) * total


def pareto(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """For each point whether none is at least as good in both coordinates and better in one; less is better.

    Args:
        points: None where there is no result.
    """
    order = sorted((point, i) for i, point in enumerate(points) if point is not None)
    front = [False] * len(points)
    least = math.inf
    start = 0
    while start < len(order):
        first = order[start][0][0]
        end = next((k for k in range(start, len(order)) if order[k][0][0] != first), len(order))
        best = order[start][0][1]  # sorted: the least second coordinate among those with this first one
        if best < least:
            for (_, second), i in order[start:end]:
                front[i] = second == best
            least = best
        start = end
    return front
