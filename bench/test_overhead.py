"""The host's share: a step on 32 elements, hot, beside the least that a custom autograd.Function costs."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import overhead_cases
from bench.suites import StepSuite


def suite(full: bool, device: str) -> StepSuite:
    return StepSuite("overhead", overhead_cases, full, device, floor=True)


def test_overhead(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
