"""The forward pass alone: evaluation, without gradients."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import forward_cases
from bench.suites import ForwardSuite


def suite(full: bool, device: str) -> ForwardSuite:
    return ForwardSuite("forward", forward_cases, full, device)


def test_forward(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
