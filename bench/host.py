"""The host's time of a step, measured without a GPU: `python -m bench.host [--seconds N]`.

Forward and backward of the loss on 32 elements through autograd, beside the least that an `autograd.Function` costs:
one that saves its inputs and hands them back. The back ends for GPUs run with their native calls and launches replaced
by nothing, on tensors of the CPU: what is left is what Python and torch take to come to a kernel, but for torch's
answers about streams and devices. Their rows include 0.3 us in which the back end is put in its place.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from bench.buffers import Pool
from bench.cases import Case, overhead_cases
from bench.clock import Call, ProcessorClock
from bench.interleave import Budget, interleave, warm_up
from bench.machine import processor
from bench.providers import STRATEGIES, Provider, StepContender, save_and_return, vidfast_loss
from bench.suites import SAVE_AND_RETURN
from vidfast import backends
from vidfast.backends.base import Backend
from vidfast.backends.cuda import CudaBackend

STAND_IN = "cpu"  # the name under which `auto` finds a back end for tensors on the CPU


class _Nothing:
    """A native module whose kernels do nothing."""

    @staticmethod
    def _nothing(*_: object) -> None:
        return None

    cuda_forward = cuda_forward_grad = cuda_backward = cuda_scale = _nothing
    cuda_total = cuda_device_unsupported = _nothing

    @staticmethod
    def cuda_workspace_bytes(*_: int) -> int:
        return 304

    @staticmethod
    def cuda_total_workspace_bytes(count: int) -> int:
        return 0


class _NoLaunch:
    """A Triton kernel whose launches do nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


def cuda_without_kernels() -> Backend:
    """The CUDA back end, on tensors of the CPU."""
    backend: Any = CudaBackend(_Nothing(), None, "cpu", lambda index: 0)
    backend.name = STAND_IN
    return backend  # type: ignore[no-any-return]


def triton_without_kernels() -> Backend:
    """The Triton back end, on tensors of the CPU."""
    import triton.language as tl

    from vidfast.backends.triton import TritonBackend

    backend: Any = TritonBackend()
    names = ("sweep_planes", "sweep_rows", "finish", "alpha_gradient", "scale", "sum_positions", "total")
    backend._module = SimpleNamespace(tl=tl, **{name: _NoLaunch() for name in names})
    backend._probed, backend._kind, backend.name = True, "cpu", STAND_IN
    backend.supports = lambda *_: None
    return backend  # type: ignore[no-any-return]


@contextmanager
def standing_in(backend: Backend) -> Iterator[None]:
    """`auto` takes this back end for tensors on the CPU."""
    before = backends.load(STAND_IN)
    backends._loaded[STAND_IN] = backend
    try:
        yield
    finally:
        backends._loaded[STAND_IN] = before


@dataclass
class HostContender:
    """Steps whose loss is computed by one back end, or by whatever there is where `backend` is None."""

    step: StepContender
    name: str
    backend: Backend | None

    calls, replayed = 1, False

    def prepare(self) -> Call:
        step, backend = self.step.prepare(), self.backend
        if backend is None:
            return step

        def run() -> object:
            with standing_in(backend):
                return step()

        return run

    def finish(self) -> None:
        self.step.finish()


def contenders(case: Case, pool: Pool) -> list[HostContender]:
    """The floor, and every back end and strategy."""

    def of(name: str, provider: Provider, backend: Backend | None) -> HostContender:
        return HostContender(StepContender(provider, case, pool, provider.build(case), 1.0), name, backend)

    found = [of(SAVE_AND_RETURN, Provider(SAVE_AND_RETURN, "floor", save_and_return, compared=False), None)]
    kinds: dict[str, Backend] = {"cuda": cuda_without_kernels(), "cpu": backends.load("cpu")}
    try:
        kinds["triton"] = triton_without_kernels()
    except ImportError:
        print("triton is not installed: left out")
    for name, backend in kinds.items():
        for strategy in STRATEGIES:
            in_place = strategy.endswith("in place")
            loss = vidfast_loss("auto", strategy.split()[0], in_place)
            provider = Provider(f"{name} {strategy}", "vidfast", loss, strategy, writes_mean=in_place)
            found.append(of(provider.name, provider, backend))
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    arguments.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="of measuring, for all rows together (default: %(default)g)",
    )
    seconds = arguments.parse_args(argv).seconds
    if not 0 < seconds < math.inf:
        arguments.error(f"--seconds must be positive and finite, got {seconds:g}")
    torch.set_num_threads(1)
    (case,) = overhead_cases("host", False, "cpu")
    pool = Pool(case)
    rows = contenders(case, pool)
    clock = ProcessorClock()
    estimates = [warm_up(row, clock, 20) for row in rows]
    timings = interleave(rows, clock, Budget(seconds, most=4000), estimates, len(pool.slots))
    middles = {name: statistics.median(s.seconds for s in timing.samples) for name, timing in timings.items()}
    print(f"{case.title}, torch {torch.__version__}, {processor().get('brand_raw')}")
    print("The first row is the floor. Of cuda and triton the kernels are left out, those of cpu run.")
    for name, middle in middles.items():
        print(f"{name:<28} {1e6 * middle:7.1f} us  {middle / middles[SAVE_AND_RETURN]:5.2f} times the floor")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
