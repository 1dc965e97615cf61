"""How the loss step scales: with the batch, the channels, the map, and the number of threads."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import all_scaling_cases
from bench.suites import ScalingSuite


def suite(full: bool, device: str) -> ScalingSuite:
    return ScalingSuite("scaling", all_scaling_cases, full, device)


def test_scaling(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
