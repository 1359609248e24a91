"""Curves thinned for the eye, and packed as bytes."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlab.lab.curves import pack, thin


@given(st.integers(1, 3000), st.integers(4, 400), st.integers(0, 2**32 - 1))
def test_a_thinned_curve_keeps_its_ends_its_extremes_its_order_and_no_more_than_it_may(n, n_points, seed):
    draw = np.random.default_rng(seed)
    steps, values = np.cumsum(draw.integers(1, 9, n)).astype(float), draw.normal(size=n)
    values[draw.random(n) < 0.1] = np.nan
    x, y, mean = thin(steps, values, n_points)
    assert len(x) == len(y) == len(mean) <= n_points
    assert (x[0], x[-1]) == (steps[0], steps[-1])
    assert (np.diff(x) > 0).all()
    of = dict(zip(steps, values, strict=True))
    assert all(np.array_equal(of[step], value, equal_nan=True) for step, value in zip(x, y, strict=True))
    if np.isfinite(values).any():
        assert np.nanmin(y) == np.nanmin(values)
        assert np.nanmax(y) == np.nanmax(values)


@pytest.mark.parametrize("at", [0, 7, 49, 50, 99])
def test_the_only_finite_value_of_a_curve_is_kept(at):
    values = np.full(100, np.nan)
    values[at] = 1.0
    x, y, _ = thin(np.arange(100.0), values, 6)
    assert x[y == 1.0].tolist() == [at]


def test_the_means_of_a_thinned_curve_are_those_of_its_stretches_not_of_what_is_drawn():
    skewed = np.where(np.arange(10_000) % 50 == 0, 100.0, 1.0)  # a spike in fifty: the mean is 2.98
    _, y, mean = thin(np.arange(10_000.0), skewed, 202)  # a hundred stretches, and the ends
    assert y.mean() == pytest.approx(50.5, abs=0.5)
    assert mean.mean() == pytest.approx(skewed.mean())


def test_a_packed_curve_reads_back_and_what_is_not_finite_is_a_gap():
    packed = pack([(1, 2.5), (2, None), (70_000, 1e39), (70_001, -1.5)], 100)
    apart, y = (np.frombuffer(base64.b64decode(packed[key]), kind) for key, kind in (("apart", "<i4"), ("y", "<f4")))
    assert (packed["first"] + np.cumsum(apart)).tolist() == [1, 2, 70_000, 70_001]
    np.testing.assert_array_equal(y, np.array([2.5, np.nan, np.nan, -1.5], np.float32))
    assert "mean" not in packed


def test_a_metric_that_was_never_finite_is_packed_without_a_warning(recwarn):
    assert len(base64.b64decode(pack([(step, None) for step in range(500)], 50)["y"])) == 4 * 48  # of 24 stretches
    assert not recwarn.list


@pytest.mark.parametrize(("most", "bits"), [(255, 8), (256, 16), (65_535, 16), (65_536, 32)])
def test_steps_are_packed_as_differences_in_as_few_bits_as_they_take(most, bits):
    steps = np.cumsum([3_000_000, 1, most, 7])
    packed = pack([(int(step), 0.5) for step in steps], 100)
    apart = np.frombuffer(base64.b64decode(packed["apart"]), f"<{'i' if bits == 32 else 'u'}{bits // 8}")
    assert packed["bits"] == bits
    assert (packed["first"] + np.cumsum(apart)).tolist() == steps.tolist()
