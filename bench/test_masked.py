"""The loss with a mask, forward and backward: padded tokens and ignored pixels."""

from __future__ import annotations

from collections.abc import Callable

from bench.masked import MaskedSuite, masked_suite


def suite(full: bool, device: str) -> MaskedSuite:
    return masked_suite(full, device)


def test_masked(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
