"""How often values fell into which range."""

from __future__ import annotations

import bisect

from hypothesis import given
from hypothesis import strategies as st

from nbllm.histogram import Histogram

VALUES = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), max_size=20)


def test_a_value_on_a_bound_is_in_the_range_below() -> None:
    histogram = Histogram([1, 8])
    for value in (0, 1, 1.5, 8, 9):
        histogram.observe(value)
    assert histogram.cumulative() == [(1, 2), (8, 4), (float("inf"), 5)]
    assert histogram.sum == 19.5
    assert histogram.flat("x") == {
        "x_bucket_1": 2,
        "x_bucket_8": 4,
        "x_bucket_inf": 5,
        "x_sum": 19.5,
    }


@given(VALUES)
def test_each_bound_counts_what_is_not_larger(values: list[tuple[int, int]]) -> None:
    histogram = Histogram([1, 2, 4, 8])
    for value, times in values:
        histogram.observe(value, times)
    all_values = sorted(value for value, times in values for _ in range(times))
    for bound, count in histogram.cumulative():
        assert count == bisect.bisect_right(all_values, bound)
    assert histogram.sum == sum(all_values)
