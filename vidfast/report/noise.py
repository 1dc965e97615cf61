"""When one time is really smaller than another: medians, their spread, paired ratios and ties."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Fewer common rounds than this say nothing about a spread: the ratio is then formed from both spreads.
FEWEST_PAIRS = 3


@dataclass(frozen=True)
class Interval:
    """A middle value and its spread."""

    low: float
    middle: float
    high: float

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high


def spread(values: Sequence[float]) -> Interval:
    """The median of `values` between their quartiles, or between the 95% confidence limits of the median where those
    are wider: of few samples. Below six there are no such limits, and the spread is all of the range.

    Quartiles alone would call half of all comparisons of three samples a difference where there is none, and a fifth of
    those of seven.

    :raises ValueError: there are no values.
    """
    if not values:
        raise ValueError("wanted at least one value to take a spread of, got none")
    ordered = sorted(values)
    middle = statistics.median(ordered)
    if len(ordered) == 1:
        return Interval(middle, middle, middle)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    outside = values_outside_limits(len(ordered))
    return Interval(min(low, ordered[outside]), middle, max(high, ordered[-1 - outside]))


def values_outside_limits(n: int, confidence: float = 0.95) -> int:
    """How many of n ordered values lie below the lower limit of a confidence interval of the median, and above the
    upper one: the most that a fair coin, tossed n times, undercuts on either side with at most 1 - confidence. None
    (0) where even the range is less sure than that.
    """
    below, tail = 0, 0.0
    while below < n // 2:
        tail += 2.0 * math.comb(n, below) / 2.0**n
        if tail > 1.0 - confidence:
            break
        below += 1
    return max(below - 1, 0)


@dataclass(frozen=True)
class Ratio:
    """How many times faster `ours` is than `theirs`, with the spread of that ratio."""

    interval: Interval
    paired: bool

    @property
    def value(self) -> float:
        return self.interval.middle

    @property
    def tie(self) -> bool:
        """The difference is smaller than the spread."""
        return self.interval.contains(1.0)


def takes_part(round_number: int, wanted: int, rounds: int) -> bool:
    """Whether a row with `wanted` samples has one of this round, out of `rounds`: spread evenly, exactly `wanted`."""
    return (round_number + 1) * wanted // rounds > round_number * wanted // rounds


@dataclass(frozen=True)
class Samples:
    """Seconds by round. Rounds are numbers shared by all rows of a case."""

    rounds: Sequence[int]
    seconds: Sequence[float]

    @classmethod
    def spread(cls, seconds: Sequence[float], case_rounds: int) -> Samples:
        """Samples as a stored row has them: in order, of the rounds that `takes_part` gives to so many."""
        return cls([n for n in range(case_rounds) if takes_part(n, len(seconds), case_rounds)], seconds)

    def __post_init__(self) -> None:
        if len(self.rounds) != len(self.seconds):
            raise ValueError(
                f"wanted a round for every sample, got {len(self.rounds)} and {len(self.seconds)}"
            )


def times_faster(ours: Samples, theirs: Samples) -> Ratio:
    """The ratio theirs / ours, from samples of the same rounds where there are enough of them.

    Samples of one round were taken one after the other, so a slow moment of the machine is in both and leaves their
    ratio alone. Where the rows have too few rounds in common, the widest ratio of their spreads stands in.
    """
    mine = dict(zip(ours.rounds, ours.seconds, strict=True))
    pairs = [
        (mine[number], seconds)
        for number, seconds in zip(theirs.rounds, theirs.seconds, strict=True)
        if number in mine
    ]
    if len(pairs) >= FEWEST_PAIRS:
        return Ratio(spread([their / our for our, their in pairs]), paired=True)
    us, them = spread(ours.seconds), spread(theirs.seconds)
    return Ratio(Interval(them.low / us.high, them.middle / us.middle, them.high / us.low), paired=False)


def changed(before: Interval, after: Interval, drift: float = 0.0) -> float | None:
    """The relative change of a time from one run to another, or None where it is within the noise.

    Beyond the noise means that the spreads do not overlap and that the change exceeds `drift`: the relative change,
    between the same two runs, of a row that cannot have changed (the copy), which is the machine's own.
    """
    change = after.middle / before.middle - 1.0
    if before.overlaps(after) or abs(change) <= abs(drift):
        return None
    return change
