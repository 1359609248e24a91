"""Intervals over seeds, differences paired by seed, and what nothing else beats."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlab.lab.statistics import interval, paired, pareto, t_quantile

# Student's t, two-sided 95 %: any printed table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 20: 2.086, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("df", "t"), TABLE.items())
def test_the_quantiles_are_those_of_a_printed_table(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=5e-4)


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    draw = random.Random(5)
    covers = 0
    for _ in range(4000):
        found = interval([draw.gauss(3.0, 2.0) for _ in range(4)])
        covers += abs(found.mean - 3.0) <= found.half
    assert 0.935 < covers / 4000 < 0.965  # four standard errors


def test_a_single_seed_has_no_interval():
    assert (interval([2.5]).mean, interval([2.5]).half) == (2.5, None)
    assert not interval([2.5]).excludes_zero


def test_pairing_sees_what_the_spread_between_seeds_hides():
    draw = random.Random(0)
    baseline = {seed: draw.gauss(2.0, 0.5) for seed in range(5)}
    better = {seed: loss - 0.1 + draw.gauss(0, 0.01) for seed, loss in baseline.items()} | {99: 100.0}
    difference = paired(better, baseline)
    assert difference.n == 5
    assert difference.mean == pytest.approx(-0.1, abs=0.03)
    assert difference.excludes_zero
    apart = interval([better[seed] for seed in baseline]).half + interval(list(baseline.values())).half
    assert apart > abs(difference.mean)
    assert difference.half == pytest.approx(
        t_quantile(4) * statistics.stdev([better[s] - baseline[s] for s in baseline]) / math.sqrt(5)
    )
    assert paired({1: 1.0}, {2: 1.0}) is None


POINTS = st.lists(st.none() | st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


@given(POINTS)
def test_the_front_is_what_brute_force_finds(points):
    def beaten(point):
        others = [other for other in points if other is not None]
        return any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in others)

    assert pareto(points) == [point is not None and not beaten(point) for point in points]
