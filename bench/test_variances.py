"""Losses with one variance an element, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

from bench.variances import VarianceSuite, variance_suite


def suite(full: bool, device: str) -> VarianceSuite:
    return variance_suite(full, device)


def test_variances(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
