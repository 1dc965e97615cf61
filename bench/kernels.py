"""The CPU kernels alone: the native calls over buffers that exist already, without allocation and without autograd.

This is what can be held against the machine's copy rate: the whole step adds the allocator, page faults on a fresh
gradient and autograd's bookkeeping, and those are on other rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import traffic
from bench.buffers import EPS, Pool, Slot
from bench.cases import Case
from bench.clock import Call
from bench.providers import Provider, eager_formula

# The native interface's numbers for dtypes: csrc/gaussian_nll.h.
# No weights of positions: absent addresses.
NO_MASK = (0, False, 0)
NATIVE_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

FORWARD, INTO_BUFFER, IN_PLACE = "kernel forward", "kernel forward_grad", "kernel forward_grad in place"
PASSES_OF = {FORWARD: "forward", INTO_BUFFER: "one_pass", IN_PLACE: "one_pass in place"}


def extents(case: Case) -> tuple[int, int, int]:
    """The tensor as (outer, channels, inner): csrc's view of every dense layout."""
    dim = case.channel_dim % len(case.shape)
    if case.layout == "channels_last" or dim == len(case.shape) - 1:
        return case.elements // case.channels, case.channels, 1
    outer = 1
    for extent in case.shape[:dim]:
        outer *= extent
    return outer, case.channels, case.elements // (outer * case.channels)


class KernelContender:
    """One native call. In place the gradient lies over the mean; otherwise in one buffer that every call reuses."""

    incoming, calls, replayed = 1.0, 1, False

    def __init__(self, name: str, case: Case, pool: Pool) -> None:
        self.name, self.case, self.pool = name, case, pool
        self.provider = Provider(name, "kernel", eager_formula, PASSES_OF[name], writes_mean=name == IN_PLACE)
        self.used: list[Slot] = []
        self.buffers = [torch.empty_like(slot.mean) for slot in pool.slots] if name == INTO_BUFFER else []
        self.loss = torch.zeros((), dtype=torch.float32)
        self.per_channel = torch.zeros(case.channels, dtype=torch.float64)
        self.turn = 0

    def prepare(self) -> Call:
        from vidfast import _C

        slot = self.pool.take()
        self.used.append(slot)
        outer, channels, inner = extents(self.case)
        dtype, stride = NATIVE_DTYPES[self.case.dtype], channels * inner
        problem = (
            *(slot.mean.data_ptr(), stride, dtype, slot.target.data_ptr(), stride, dtype),
            *(self.pool.alpha.data_ptr(), NATIVE_DTYPES[self.pool.alpha.dtype], outer, channels, inner),
            *(1.0 / self.case.elements, EPS, False, *NO_MASK),
            *(self.loss.data_ptr(), NATIVE_DTYPES[torch.float32]),
        )
        threads, loss, per_channel = torch.get_num_threads(), self.loss, self.per_channel
        if self.name == FORWARD:
            native: Callable[..., None] = _C.cpu_forward
            arguments: tuple[object, ...] = (*problem, per_channel.data_ptr(), threads)
            outputs: tuple[object, ...] = (loss, None)
        else:
            grad_mean = slot.mean
            if self.name == INTO_BUFFER:
                grad_mean = self.buffers[self.turn % len(self.buffers)]
                self.turn += 1
            native = _C.cpu_forward_grad
            arguments = (*problem, grad_mean.data_ptr(), stride, per_channel.data_ptr(), threads)
            outputs = (loss, (grad_mean, per_channel))

        def call() -> object:
            native(*arguments)
            return outputs

        return call

    def finish(self) -> None:
        if self.name == IN_PLACE:
            for slot in self.used:
                self.pool.restore(slot)
        self.used.clear()

    def traffic(self) -> traffic.Traffic:
        assert self.provider.strategy is not None
        return traffic.of_strategy(self.provider.strategy, True, self.case.nbytes)
