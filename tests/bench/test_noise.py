"""When a difference is a difference: pairs, ties, changes between runs."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from vidfast.report.noise import (
    Interval,
    Samples,
    changed,
    spread,
    takes_part,
    times_faster,
    values_outside_limits,
)


def test_many_samples_spread_between_their_quartiles() -> None:
    values = [float(n) for n in range(41)]
    assert spread(values[::-1]) == Interval(10.0, 20.0, 30.0)


def test_few_samples_spread_over_all_of_their_range() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Interval(1.0, 3.0, 5.0)
    assert spread([7.0]) == Interval(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_the_limits_between_are_those_of_the_sign_test() -> None:
    """By the table: the median is outside of the 2nd and 8th of 9 values with 3.9%, of the 3rd and 7th with 18%."""
    wanted = {1: 0, 2: 0, 5: 0, 6: 0, 8: 0, 9: 1, 11: 1, 12: 2, 15: 3, 17: 4, 20: 5, 25: 7, 30: 9}
    assert {n: values_outside_limits(n) for n in wanted} == wanted
    assert spread([float(n) for n in range(1, 10)]) == Interval(2.0, 5.0, 8.0)


def test_equal_code_is_rarely_called_different() -> None:
    """Seven paired rounds of the same distribution, as a training step has: a false difference in 1.6% of the runs."""
    generator = random.Random(1)
    runs = 4000
    false = 0
    for _ in range(runs):
        ours, theirs = (Samples.spread([generator.gauss(1.0, 0.05) for _ in range(7)], 7) for _ in range(2))
        false += not times_faster(ours, theirs).tie
    assert 0.008 < false / runs < 0.025


@pytest.mark.parametrize(("wanted", "rounds"), [(1, 1), (5, 5), (5, 60), (7, 60), (59, 60), (3, 4)])
def test_takes_part_gives_exactly_as_many_rounds_evenly(wanted: int, rounds: int) -> None:
    taken = [number for number in range(rounds) if takes_part(number, wanted, rounds)]
    assert len(taken) == wanted
    gaps = [after - before for before, after in pairwise(taken)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_drift_that_both_rows_saw_cancels_in_a_paired_ratio() -> None:
    """The machine slows threefold; unpaired, the ranges would overlap and hide the factor of two."""
    drift = [1.0, 1.4, 1.9, 2.5, 3.0]
    ours, theirs = Samples.spread(drift, 5), Samples.spread([2 * d for d in drift], 5)
    ratio = times_faster(ours, theirs)
    assert ratio.paired
    assert ratio.value == pytest.approx(2.0)
    assert not ratio.tie


def test_rows_with_different_rounds_are_paired_by_round_and_not_by_position() -> None:
    fast = Samples.spread([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], 6)
    slow = Samples([0, 3, 5], [10.0, 20.0, 20.0])
    assert times_faster(fast, slow).interval == Interval(10.0, 10.0, 10.0)


def test_a_difference_within_the_spread_is_a_tie() -> None:
    ours, theirs = Samples.spread([1.0, 1.2, 0.9, 1.1], 4), Samples.spread([1.1, 1.0, 1.1, 1.0], 4)
    assert times_faster(ours, theirs).tie


def test_too_few_common_rounds_fall_back_to_the_widest_ratio() -> None:
    ratio = times_faster(Samples([0, 1, 2], [1.0, 2.0, 3.0]), Samples([7, 8, 9], [4.0, 4.0, 4.0]))
    assert not ratio.paired
    assert ratio.interval.low == pytest.approx(4.0 / 3.0)
    assert ratio.interval.high == pytest.approx(4.0 / 1.0)


def test_samples_need_a_round_each() -> None:
    with pytest.raises(ValueError, match="a round for every sample, got 2 and 1"):
        Samples([0, 1], [1.0])


def test_changed() -> None:
    before = Interval(0.9, 1.0, 1.1)
    assert changed(before, Interval(1.05, 1.2, 1.3)) is None, "the spreads overlap"
    assert changed(before, Interval(1.4, 1.5, 1.6)) == pytest.approx(0.5)
    assert changed(before, Interval(1.4, 1.5, 1.6), drift=0.6) is None, "the copy moved further"
    assert changed(before, Interval(0.4, 0.5, 0.6), drift=0.1) == pytest.approx(-0.5)
