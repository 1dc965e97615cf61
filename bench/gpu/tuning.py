"""The free numbers of the CUDA back end (csrc/cuda/chunks.h), each changed alone, and some together: device time.

All rows of a case are captured first, each under its own numbers, and then replayed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from bench.buffers import Pool
from bench.cases import Case
from bench.device_kernels import IN_PLACE, DeviceKernel
from bench.graphs import GraphContender
from bench.providers import COPY
from bench.suites import Built, built, copy_of
from vidfast.backends import load
from vidfast.report.device import AS_BUILT

# What is tried, beside the value in the code.
GRID: dict[str, tuple[int, ...]] = {
    "kPlane": (128, 512, 1024),
    "kFewestVectors": (64, 256),
    "kMostVectors": (512, 2048),
    "kChunks": (1024, 2048, 8192),
    "kFewestRows": (2, 8, 16),
    "kMostRows": (32,),
    "kBlocks": (128, 512, 1024),
    "kAlone": (1, 8, 64),
    "kShare": (4, 16),
    "kOverlap": (0,),
    "kPrefetch": (0,),
}
# Several at once: what may only pay together.
TOGETHER: tuple[dict[str, int], ...] = (
    {"kBlocks": 128, "kFewestRows": 8},
    {"kPlane": 128, "kChunks": 2048},
)


def native() -> Any:
    """The native module of the back end `cuda`."""
    return load("cuda")._native  # type: ignore[attr-defined]


def missing(backends: Sequence[str]) -> str | None:
    """Why nothing can be tuned here, where these back ends run; or None."""
    if "cuda" not in backends:
        return "the CUDA back end does not run here"
    module = native()
    if module is None or not hasattr(module, "cuda_free_numbers"):
        return "this build has no free numbers: python -m bench.gpu.build makes one that has"
    return None


@contextmanager
def free_numbers(values: Mapping[str, int]) -> Iterator[None]:
    """The CUDA back end plans with these values inside the block, and as before behind it."""
    module, backend = native(), load("cuda")
    before = module.cuda_free_numbers()
    forget = backend._workspace_bytes.cache_clear  # type: ignore[attr-defined]
    try:
        for name, value in values.items():
            module.cuda_set_free_number(name, value)
        forget()
        yield
    finally:
        for name in values:
            if name in before:
                module.cuda_set_free_number(name, before[name])
        forget()


def free_number(name: str, value: int) -> AbstractContextManager[None]:
    """One of them."""
    return free_numbers({name: value})


def named(values: Mapping[str, int]) -> str:
    """The name of a row: kOverlap=1 with kAlone=64."""
    return " with ".join(f"{name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class TuningSuite:
    """forward_grad in place under every value of GRID, and some together; `parts` limits it to single names."""

    parts: Sequence[str] | None = None

    def settings(self) -> dict[str, Mapping[str, int]]:
        """What the rows are built with, by their names."""
        singles = [{name: v} for name in self.parts or GRID for v in GRID[name]]
        return {named(values): values for values in [*singles, *(TOGETHER if self.parts is None else ())]}

    def names(self, case: Case) -> list[str]:
        del case
        return [COPY, AS_BUILT, *self.settings()]

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Built:
        for name in names:
            yield built(name, lambda name=name: self.of_name(name, case, pool))  # type: ignore[misc]

    def of_name(self, name: str, case: Case, pool: Pool) -> Any:
        if name == COPY:
            return copy_of(case, pool)
        if name == AS_BUILT:
            return self.captured(name, case, pool)
        with free_numbers(self.settings()[name]):
            return self.captured(name, case, pool)

    def captured(self, name: str, case: Case, pool: Pool) -> GraphContender:
        kernel = DeviceKernel("cuda", IN_PLACE, case, pool)
        return GraphContender(kernel, name, kernel.provider.named(name))
