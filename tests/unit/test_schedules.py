import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlab.errors import ConfigError
from ftlab.optim.schedules import WSD, Constant, Cosine, Linear


def factors(schedule):
    return [schedule(step) for step in range(schedule.total_steps)]


def test_warmup_rises_in_equal_parts_and_wastes_no_step_at_zero():
    schedule = Constant(total_steps=6, warmup_steps=4, warmup_ratio=None)
    assert factors(schedule) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warmup_ratio_is_a_share_of_all_steps_rounded_up():
    assert Constant(total_steps=100, warmup_steps=None, warmup_ratio=0.025).n_warmup == 3


def test_cosine_is_half_way_down_in_the_middle():
    schedule = Cosine(total_steps=100, warmup_steps=0, warmup_ratio=None, min_lr_ratio=0.2)
    assert schedule(0) == 1.0
    assert schedule(50) == pytest.approx(0.6)
    assert schedule(25) == pytest.approx(0.2 + 0.8 * (0.5 + math.sqrt(0.5) / 2))


def test_linear_falls_by_equal_parts():
    schedule = Linear(total_steps=4, warmup_steps=0, warmup_ratio=None, min_lr_ratio=0.0)
    assert factors(schedule) == [1.0, 0.75, 0.5, 0.25]


def test_wsd_holds_the_peak_until_its_last_part():
    schedule = WSD(total_steps=10, warmup_steps=2, warmup_ratio=None, min_lr_ratio=0.0, decay_ratio=0.4)
    assert factors(schedule) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@given(
    total=st.integers(1, 300),
    warmup=st.integers(0, 300),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
    kind=st.sampled_from(["constant", "cosine", "linear", "wsd"]),
)
def test_every_schedule_stays_between_zero_and_the_peak_and_never_rises_after_warmup(total, warmup, floor, decay, kind):
    shared = {"total_steps": total, "warmup_steps": min(warmup, total), "warmup_ratio": None}
    schedule = {
        "constant": lambda: Constant(**shared),
        "cosine": lambda: Cosine(**shared, min_lr_ratio=floor),
        "linear": lambda: Linear(**shared, min_lr_ratio=floor),
        "wsd": lambda: WSD(**shared, min_lr_ratio=floor, decay_ratio=decay),
    }[kind]()
    values = factors(schedule)
    assert all(0 < value <= 1 + 1e-12 for value in values)
    after = values[schedule.n_warmup :]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))


def test_wsd_begins_to_decay_where_a_long_warmup_ends():
    schedule = WSD(total_steps=10, warmup_steps=8, warmup_ratio=None, min_lr_ratio=0.0, decay_ratio=0.4)
    assert factors(schedule)[7:] == [1.0, 1.0, 0.5]


def test_a_warmup_longer_than_the_run_names_both_numbers():
    with pytest.raises(ConfigError, match=r"scheduler\.warmup_steps: 11 is more than the run's 10"):
        Constant(total_steps=10, warmup_steps=11, warmup_ratio=None)
