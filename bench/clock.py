"""The clocks. A sample is the mean seconds of a call over a block of calls, each with arguments of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Seconds of a call, and the part of them for which the host was busy issuing it."""

    seconds: float
    host_seconds: float


class Clock(Protocol):
    name: str

    def time(self, calls: Sequence[Call]) -> Sample: ...


class ProcessorClock:
    """Wall clock around calls that are finished when they return."""

    name = "time.perf_counter_ns"

    def time(self, calls: Sequence[Call]) -> Sample:
        start = time.perf_counter_ns()
        for call in calls:
            call()
        seconds = (time.perf_counter_ns() - start) * 1e-9 / len(calls)
        return Sample(seconds, seconds)


class DeviceClock:
    """CUDA events around the calls, and the host's clock until the last of them was issued."""

    name = "torch.cuda.Event"

    def __init__(self) -> None:
        self.start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def time(self, calls: Sequence[Call]) -> Sample:
        torch.cuda.synchronize()
        self.start.record()
        issued = time.perf_counter_ns()
        for call in calls:
            call()
        host = (time.perf_counter_ns() - issued) * 1e-9 / len(calls)
        self.end.record()
        self.end.synchronize()
        return Sample(self.start.elapsed_time(self.end) * 1e-3 / len(calls), host)


def clock_for(device: str) -> Clock:
    return DeviceClock() if torch.device(device).type == "cuda" else ProcessorClock()
