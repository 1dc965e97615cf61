"""VIDFAST_AUTOTUNE=1: search the free numbers of the plan on the device, once for each shape, and remember."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidfast.backends.triton.plan import Tuning
from vidfast.layout import Layout

CANDIDATES = tuple(
    Tuning(vectors=vectors, warps=warps, programs=programs)
    for vectors in (1, 2, 4)
    for warps in (4, 8)
    for programs in (512, 1024, 2048)
)

_best: dict[tuple[Any, ...], Tuning] = {}


def autotunes() -> bool:
    """Whether VIDFAST_AUTOTUNE asks for the search."""
    return os.environ.get("VIDFAST_AUTOTUNE", "0").lower() in ("1", "true", "on", "yes", "y")


def tuned(
    mean: Tensor, target: Tensor, layout: Layout, rule: Tuning, seconds: Callable[[Tuning], float]
) -> Tuning:
    """The fastest candidate for this shape; the rule's while a CUDA graph is captured, and interpreted.

    The winner decides the chunks and so the order of summation: two processes may differ in the last bits.

    Args:
        mean: Of the call.
        target: Of the call.
        layout: Of both.
        rule: The numbers of a call that is not tuned.
        seconds: How long a candidate takes on the device.
    """
    key = (mean.device, mean.dtype, target.dtype, layout[:5])
    if key not in _best:
        if mean.is_cpu or (mean.is_cuda and torch.cuda.is_current_stream_capturing()):
            return rule
        times = {candidate: seconds(candidate) for candidate in _candidates(rule)}
        _best[key] = min(times, key=lambda candidate: times[candidate])
    return _best[key]


def _candidates(rule: Tuning) -> list[Tuning]:
    return [candidate._replace(lanes=rule.lanes) for candidate in CANDIDATES]


def median_seconds(call: Callable[[], None]) -> float:
    """How long a call takes on the device, launched again and again."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median")) / 1000
