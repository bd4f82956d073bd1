"""Schedules: end points, shapes, units of time, bad input."""

import pickle

import pytest
from sparsekern.training import schedules
from sparsekern.training.schedules import Schedule


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [
        (schedules.constant(0.3), 0.3, 0.3),
        (schedules.linear(1.0, 0.2), 0.8, 0.6),
        (schedules.cosine(0.3), 0.3 * 0.5 * (1 + 2**-0.5), 0.15),
        # Zhu and Gupta: s_f + (s_i - s_f) (1 - u)^3
        (schedules.cubic(0.0, 0.8), 0.8 - 0.8 * 0.75**3, 0.8 - 0.8 * 0.125),
    ],
)
def test_values(schedule, quarter, half):
    assert schedule(0, 1000) == pytest.approx(schedule.first)
    assert schedule(250, 1000) == pytest.approx(quarter)
    assert schedule(500, 1000) == pytest.approx(half)
    assert schedule(1000, 1000) == schedule(5000, 1000) == schedule.last


def test_begin_and_end_in_steps_and_fractions():
    steps, fractions = schedules.linear(1.0, begin=200, end=600), schedules.linear(1.0, begin=0.2, end=0.6)
    for step in range(0, 1001, 50):
        assert steps(step, 1000) == pytest.approx(fractions(step, 1000))
    assert steps(200, 10**6) == 1.0
    assert steps(400, 10**6) == pytest.approx(0.5)
    assert steps(600, 10**6) == 0.0


def test_a_schedule_that_ends_where_it_begins_is_a_jump():
    jump = schedules.linear(1.0, 0.5, begin=10, end=10)
    assert [jump(step, 100) for step in (9, 10, 11)] == [1.0, 0.5, 0.5]


def test_is_a_value():
    assert schedules.cosine(0.3) == schedules.cosine(0.3) != schedules.linear(0.3)
    assert pickle.loads(pickle.dumps(schedules.cubic(0.0, 0.9))) == schedules.cubic(0.0, 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curve": "square"}, r"curve must be one of \['cosine', 'cubic', 'linear'\], got 'square'"),
        ({"begin": -1}, "begin must be a fraction .* or a step .*, got -1"),
        ({"end": 1.5}, "end must be a fraction .*, got 1.5"),
        ({"end": 1}, "end must be a fraction .*, got 1$"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"curve": "linear", "first": 1.0, "last": 0.0} | arguments)
