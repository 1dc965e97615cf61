"""The CPU kernels alone, against the rate at which the same buffers are copied."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import kernel_cases
from bench.suites import KernelSuite


def suite(full: bool, device: str) -> KernelSuite:
    return KernelSuite("kernel alone", kernel_cases, full, device)


def test_kernel(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
