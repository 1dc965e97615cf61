"""The clocks. A sample is the mean seconds of a call over a block of calls, each with arguments of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.machine import last_level_cache

Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Seconds of a call, and the part of them for which the host was busy issuing it."""

    seconds: float
    host_seconds: float


class Clock(Protocol):
    name: str

    def time(self, prepared: Sequence[Call], calls_each: int = 1, device_alone: bool = False) -> Sample:
        """Seconds of a call. Each of `prepared` makes `calls_each` calls.

        device_alone: leave out what the host takes until the device has something to do.
        """


class ProcessorClock:
    """Wall clock around calls that are finished when they return."""

    name = "time.perf_counter_ns"

    def time(self, prepared: Sequence[Call], calls_each: int = 1, device_alone: bool = False) -> Sample:
        del device_alone  # on the CPU the host computes: there is nothing to leave out
        start = time.perf_counter_ns()
        for call in prepared:
            call()
        seconds = (time.perf_counter_ns() - start) * 1e-9 / (len(prepared) * calls_each)
        return Sample(seconds, seconds)


class DeviceClock:
    """CUDA events around the calls, and the host's clock until the last of them was issued."""

    name = "torch.cuda.Event"
    # So many reads of so many times the L2 take most of a millisecond: longer than launching a graph of hundreds of
    # nodes.
    LEAD_READS, LEAD_MULTIPLE = 12, 4

    def __init__(self, device: str) -> None:
        self.device = device
        self.start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._lead: torch.Tensor | None = None

    def time(self, prepared: Sequence[Call], calls_each: int = 1, device_alone: bool = False) -> Sample:
        torch.cuda.synchronize()
        if device_alone:
            self._keep_busy()
        self.start.record()
        issued = time.perf_counter_ns()
        for call in prepared:
            call()
        host = time.perf_counter_ns() - issued
        self.end.record()
        self.end.synchronize()
        calls = len(prepared) * calls_each
        return Sample(self.start.elapsed_time(self.end) * 1e-3 / calls, host * 1e-9 / calls)

    def _keep_busy(self) -> None:
        """Gives the device something to read while the host issues the calls.

        A read, not a write: it leaves no dirty lines in the L2 that a later call would have to write back.
        """
        if self._lead is None:
            nbytes = self.LEAD_MULTIPLE * last_level_cache(self.device)
            self._lead = torch.ones(nbytes // 4, dtype=torch.float32, device=self.device)
            torch.cuda.synchronize()
        for _ in range(self.LEAD_READS):
            self._lead.amax()


def clock_for(device: str) -> Clock:
    return DeviceClock(device) if torch.device(device).type == "cuda" else ProcessorClock()
