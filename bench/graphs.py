"""Calls in a CUDA graph: what the device takes, without the host that launches.

A graph holds one call for each slot of the pool, so that every call finds inputs of its own, out of the L2 where
the pool is larger than it, and writes results of its own. A replay runs them all.
"""

from __future__ import annotations

import contextlib
import gc
from typing import Any, Protocol

import torch

from bench import traffic
from bench.buffers import Pool
from bench.cases import Case
from bench.clock import Call
from bench.interleave import Contender
from bench.providers import Provider

# Before a capture: the first call compiles, the second finds everything as later ones will.
WARM_UPS = 2


class Capturable(Contender, Protocol):
    """A contender whose calls read and write on the device alone, each with a result of its own."""

    provider: Provider
    incoming: float
    case: Case
    pool: Pool

    def undo(self) -> None:
        """Put back everything that calls wrote over, in every slot."""

    def traffic(self) -> traffic.Traffic | None: ...


class GraphContender:
    """The calls of `inner`, one a slot, captured once and replayed.

    Args:
        inner: What is captured. Its first calls run before the capture, on another stream.
        name: Of the row.
        provider: Of the row; None for the inner's.

    Raises:
        Exception: Whatever the inner's calls raise; a capture that was under way is ended.
    """

    replayed = True

    def __init__(self, inner: Capturable, name: str, provider: Provider | None = None) -> None:
        self.inner, self.name = inner, name
        self.provider = provider or inner.provider
        self.incoming, self.calls = inner.incoming, len(inner.pool.slots)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                inner.prepare()()
        torch.cuda.synchronize()
        inner.undo()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.results = self._capture(side)
        inner.finish()

    def _capture(self, side: Any) -> list[Any]:
        """What `torch.cuda.graph` does, without the collections and the emptied cache that take it 0.1 s a graph."""
        collects = gc.isenabled()
        gc.disable()  # what a collection destroys could be another graph, which ends a capture
        try:
            with torch.cuda.stream(side):
                self.graph.capture_begin()
                try:
                    results = [self.inner.prepare()() for _ in range(self.calls)]
                except BaseException:
                    # The stream leaves its capture, whose own complaint would hide what was wrong.
                    with contextlib.suppress(RuntimeError):
                        self.graph.capture_end()
                    raise
                self.graph.capture_end()
                return results
        finally:
            if collects:
                gc.enable()

    def prepare(self) -> Call:
        graph, last = self.graph, self.results[-1]

        def replay() -> object:
            graph.replay()
            return last

        return replay

    def finish(self) -> None:
        self.inner.undo()

    def traffic(self) -> traffic.Traffic | None:
        return self.inner.traffic()

    def differing(self) -> int:
        """After a replay: how many slots' results are not, bit for bit, the last one's, whose inputs are the same."""
        last = tensors_of(self.results[-1])
        return sum(
            not all(torch.equal(x, y) for x, y in zip(tensors_of(result), last, strict=True))
            for result in self.results[:-1]
        )


def tensors_of(result: tuple[torch.Tensor, Any]) -> list[torch.Tensor]:
    loss, gradients = result
    return [loss, *(gradients or ())]
