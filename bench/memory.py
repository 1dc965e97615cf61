"""Peak extra memory of a call: what torch's allocator handed out above what was live before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

import vidfast.memory as kept


@contextmanager
def torch_alone() -> Iterator[None]:
    """All memory comes from torch's allocator, large gradients too: the profiler sees no other. Sizes are the same."""
    before, kept.KEPT_FROM = kept.KEPT_FROM, sys.maxsize
    try:
        yield
    finally:
        kept.KEPT_FROM = before


def peak_extra_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory that `call` held at once beyond its arguments, in bytes.

    On a GPU the caching allocator keeps the count. On the CPU the profiler records every allocation and release, of
    eager operators and of compiled code alike, and the running sum's maximum is the peak: exact, where the process's
    resident size would miss whatever malloc had kept from before.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return max(int(torch.cuda.max_memory_allocated()) - before, 0)
    with torch_alone(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    kineto = recorded.profiler.kineto_results if recorded.profiler is not None else None
    if kineto is None:
        raise RuntimeError("torch.profiler returned no results to read the allocations from")
    changes = [(event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak


def kernel_launches(call: Callable[[], object]) -> int:
    """How many kernels, copies and fills `call` puts on a CUDA device."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(1 for event in recorded.events() or [] if event.device_type.name == "CUDA")
