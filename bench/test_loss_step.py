"""The loss step, forward and backward, over the real layer shapes."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import loss_cases
from bench.suites import StepSuite


def suite(full: bool, device: str) -> StepSuite:
    return StepSuite("loss step", loss_cases, full, device)


def test_loss_step(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
