"""The rounds: every contender in turn, so that drift of the machine hits all alike.

A round gives every contender one sample, and each round starts with another contender. Slow contenders sit out some
rounds, spread evenly, so that ten seconds of eager code do not cost the fast ones their number of samples; a row
keeps the numbers of its rounds, and ratios pair samples of the same round.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.clock import Call, Clock, Sample
from vidfast.report.noise import takes_part

# A sample takes at least this long, over as many calls as that needs. Each call has inputs of its own, so the data
# stay cold, but the code does not: after another provider's turn the first call also pays for the instruction cache.
SHORTEST_SAMPLE = 1e-3
MOST_CALLS = 32
# Eager code over the largest maps takes so long that a few samples have to do: it is many times slower than the rest.
SLOW_SECONDS = 0.1


class Contender(Protocol):
    """One row: `prepare` makes a call ready outside the timing, `finish` cleans up after it.

    A prepared call makes `calls` calls: one, or as many as a CUDA graph holds. Such a `replayed` one is timed on the
    device alone.
    """

    name: str
    calls: int
    replayed: bool

    def prepare(self) -> Call: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class Budget:
    """How long a case may take. `seconds` is shared by its contenders; each has its fewest samples all the same."""

    seconds: float
    fewest: int = 5
    fewest_slow: int = 3
    most: int = 60
    warm_ups: int = 2


@dataclass
class Timings:
    """The samples of one contender, of `case_rounds` rounds those that `takes_part` says; none more after a failure."""

    calls_per_sample: int
    case_rounds: int = 0
    rounds: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    failure: Exception | None = None


def one_sample(contender: Contender, clock: Clock, count: int) -> Sample:
    """Seconds of a call, over `count` prepared calls."""
    prepared: list[Callable[[], object]] = [contender.prepare() for _ in range(count)]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        sample = clock.time(prepared, contender.calls, contender.replayed)
    finally:
        if was_enabled:
            gc.enable()
    prepared.clear()
    contender.finish()
    return sample


def warm_up(contender: Contender, clock: Clock, times: int) -> float:
    """Run a contender `times` times (compiling, faulting pages in) and say how long the last call took."""
    return [one_sample(contender, clock, 1).seconds for _ in range(max(times, 1))][-1]


def interleave(
    contenders: Sequence[Contender], clock: Clock, budget: Budget, estimates: Sequence[float], most_calls: int
) -> dict[str, Timings]:
    """Measure every contender and return its samples. One that raises sits out the rest, with its failure kept.

    `estimates` are the seconds of a warm call of each. `most_calls` in a sample: no more than there are buffers, since
    a call in place must not find a mean that another one has written over. A graph is replayed as often as makes a
    sample long: what it finds then is another gradient, which costs the same, and what the L2 still holds at the end
    of a sample, unwritten, is little beside what went through it.
    """
    share = budget.seconds / max(len(contenders), 1)
    wanted, timings = [], {}
    for contender, estimate in zip(contenders, estimates, strict=True):
        each = max(estimate * contender.calls, 1e-9)
        most = MOST_CALLS if contender.replayed else min(MOST_CALLS, most_calls)
        calls = min(max(math.ceil(SHORTEST_SAMPLE / each), 1), most)
        fewest = budget.fewest if estimate < SLOW_SECONDS else min(budget.fewest, budget.fewest_slow)
        wanted.append(min(max(int(share / (each * calls)), fewest), budget.most))
        timings[contender.name] = Timings(calls * contender.calls)
    rounds = max(wanted, default=0)
    for timing in timings.values():
        timing.case_rounds = rounds
    for number in range(rounds):
        first = number % len(contenders)
        for index in [*range(first, len(contenders)), *range(first)]:
            if not takes_part(number, wanted[index], rounds):
                continue
            contender = contenders[index]
            timing = timings[contender.name]
            if timing.failure is not None:
                continue
            try:
                sample = one_sample(contender, clock, timing.calls_per_sample // contender.calls)
            except Exception as failure:
                timing.failure = failure
                continue
            timing.rounds.append(number)
            timing.samples.append(sample)
    return timings
