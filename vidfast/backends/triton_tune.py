"""VIDFAST_AUTOTUNE=1: search the free numbers of the plan on the device, once for each shape, and remember."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidfast.backends.triton_plan import Tuning, plan
from vidfast.layout import Layout, dense_like

if TYPE_CHECKING:
    from vidfast.backends.triton import TritonBackend

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


def tuned(backend: TritonBackend, mean: Tensor, target: Tensor, layout: Layout) -> Tuning:
    """The fastest candidate of forward_grad for this shape; the rule's while a CUDA graph is captured.

    The winner decides the chunks and so the order of summation: two processes may differ in the last bits.
    """
    key = (mean.device, mean.dtype, target.dtype, layout[:5])
    if key not in _best:
        if mean.is_cpu or (mean.is_cuda and torch.cuda.is_current_stream_capturing()):
            return backend.rule
        _best[key] = _search(backend, mean, target, layout)
    return _best[key]


def _search(backend: TritonBackend, mean: Tensor, target: Tensor, layout: Layout) -> Tuning:
    from triton.testing import do_bench

    alpha = torch.zeros(layout.channels, device=mean.device)
    loss = torch.empty((), dtype=torch.float64, device=mean.device)
    grad_alpha = torch.empty(layout.channels, dtype=torch.float64, device=mean.device)
    grad_mean = dense_like(mean, layout.channel)
    times = {}
    for candidate in (c._replace(lanes=backend.rule.lanes) for c in CANDIDATES):
        planned = plan(*layout[:5], mean.element_size(), target.element_size(), candidate)

        def once(planned: Any = planned) -> None:
            backend.reduce(
                mean,
                target,
                alpha,
                layout,
                1.0,
                1e-5,
                False,
                loss,
                grad_mean,
                False,
                None,
                grad_alpha,
                planned,
            )

        times[candidate] = do_bench(once, warmup=5, rep=20, return_mode="median")
    return min(times, key=lambda candidate: times[candidate])
