"""The free numbers of the CUDA back end (csrc/cuda/chunks.h), each changed alone: a suite of device time.

All rows of a case are captured first, each under its own numbers, and then replayed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.buffers import Pool
from bench.cases import Case
from bench.device_kernels import IN_PLACE, DeviceKernel
from bench.graphs import GraphContender
from bench.providers import COPY
from bench.suites import Built, built, copy_of
from vidfast import dispatch
from vidfast.report.device import AS_BUILT

# What is tried, beside the value in the code.
GRID: dict[str, tuple[int, ...]] = {
    "kLoads": (1, 2, 8, 64),
    "kMostVectors": (256, 512),
    "kFewestVectors": (64, 256),
    "kChunks": (2048, 8192),
    "kFewestRows": (8, 16),
    "kMostRows": (32, 128),
    "kBlocks": (512, 2048),
    "kPlane": (256, 512, 4096),
}


def native() -> Any:
    """The native module of the back end `cuda`."""
    return dispatch.load("cuda")._native  # type: ignore[attr-defined]


def missing(backends: Sequence[str]) -> str | None:
    """Why nothing can be tuned here, where these back ends run; or None."""
    if "cuda" not in backends:
        return "the CUDA back end does not run here"
    module = native()
    if module is None or not hasattr(module, "cuda_free_numbers"):
        return "this build has no free numbers: python -m bench.gpu.build makes one that has"
    return None


@contextmanager
def free_number(name: str, value: int) -> Iterator[None]:
    """The CUDA back end plans with this value inside the block, and as before behind it."""
    module, backend = native(), dispatch.load("cuda")
    before = module.cuda_free_numbers()[name]
    forget = backend._workspace_bytes.cache_clear  # type: ignore[attr-defined]
    try:
        module.cuda_set_free_number(name, value)
        forget()
        yield
    finally:
        module.cuda_set_free_number(name, before)
        forget()


@dataclass(frozen=True)
class TuningSuite:
    """forward_grad in place under every value of GRID; `parts` limits it to some names."""

    parts: Sequence[str] = tuple(GRID)

    def names(self, case: Case) -> list[str]:
        del case
        return [COPY, AS_BUILT, *(f"{name}={value}" for name in self.parts for value in GRID[name])]

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Built:
        for name in names:
            yield built(name, lambda name=name: self.of_name(name, case, pool))  # type: ignore[misc]

    def of_name(self, name: str, case: Case, pool: Pool) -> Any:
        if name == COPY:
            return copy_of(case, pool)
        if name == AS_BUILT:
            return self.captured(name, case, pool)
        number, value = name.split("=")
        with free_number(number, int(value)):
            return self.captured(name, case, pool)

    def captured(self, name: str, case: Case, pool: Pool) -> GraphContender:
        kernel = DeviceKernel("cuda", IN_PLACE, case, pool)
        return GraphContender(kernel, name, kernel.provider.named(name))
