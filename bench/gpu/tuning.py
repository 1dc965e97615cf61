"""The free numbers of the GPU back ends, each changed alone, and some together: device time.

Those of `cuda` stand in csrc/cuda/chunks.h and can be changed in a build for it, those of `triton` in its plan. All
rows of a case are captured first, each under its own numbers, and then replayed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.buffers import Pool
from bench.cases import Case
from bench.device_kernels import IN_PLACE, DeviceKernel
from bench.graphs import GraphContender
from bench.providers import COPY
from bench.suites import Built, built, copy_of
from vidfast.backends import load
from vidfast.report.device import AS_BUILT

# What is tried of `cuda`, beside the value in the code.
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


# And of `triton`. `overlap` wants compute capability 9.0 and a Triton that launches so.
TRITON_GRID: dict[str, tuple[int, ...]] = {
    "vectors": (1, 4),
    "warps": (2, 8),
    "programs": (512, 2048),
    "smallest_chunk": (1024, 2048, 8192),
    "largest_chunk": (16384, 32768),
    "ahead": (0,),
    "finish_depth": (64, 2048),
    "overlap": (1,),
}
TRITON_TOGETHER: tuple[dict[str, int], ...] = (
    {"overlap": 1, "smallest_chunk": 2048},
    {"ahead": 0, "vectors": 4},
)


def native() -> Any:
    """The native module of the back end `cuda`."""
    return load("cuda")._native  # type: ignore[attr-defined]


def missing(backends: Sequence[str]) -> str | None:
    """Why nothing of `cuda` can be tuned here, where these back ends run; or None."""
    if "cuda" not in backends:
        return "the CUDA back end does not run here"
    module = native()
    if module is None or not hasattr(module, "cuda_free_numbers"):
        return "this build has no free numbers: python -m bench.gpu.build makes one that has"
    return None


def triton_missing(backends: Sequence[str]) -> str | None:
    """Why nothing of `triton` can be tuned here, where these back ends run; or None."""
    return None if "triton" in backends else "the Triton back end does not run here"


def triton_overlaps() -> bool:
    """Whether this device and Triton can start a kernel while the one before it ends."""
    import torch
    from triton.backends.nvidia.compiler import CUDAOptions

    newer = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return newer and "launch_pdl" in CUDAOptions.__dataclass_fields__


@contextmanager
def free_numbers(values: Mapping[str, int]) -> Iterator[None]:
    """The CUDA back end plans with these values inside the block, and as before behind it."""
    module, backend = native(), load("cuda")
    before = module.cuda_free_numbers()
    forget = backend._workspace_length.cache_clear  # type: ignore[attr-defined]
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


@contextmanager
def triton_numbers(values: Mapping[str, int]) -> Iterator[None]:
    """The Triton back end likewise."""
    backend: Any = load("triton")
    before = backend.rule
    try:
        backend.rule = before._replace(**values)
        yield
    finally:
        backend.rule = before


def free_number(name: str, value: int) -> AbstractContextManager[None]:
    """One of those of `cuda`."""
    return free_numbers({name: value})


def named(values: Mapping[str, int]) -> str:
    """The name of a row: kOverlap=1 with kAlone=64."""
    return " with ".join(f"{name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class TuningSuite:
    """forward_grad in place under every value of a grid, and some together; `parts` limits it to single names."""

    parts: Sequence[str] | None = None
    backend: str = "cuda"
    grid: Mapping[str, Sequence[int]] = field(default_factory=lambda: GRID)
    together: Sequence[Mapping[str, int]] = TOGETHER
    changed: Callable[[Mapping[str, int]], AbstractContextManager[None]] = free_numbers

    def settings(self) -> dict[str, Mapping[str, int]]:
        """What the rows are built with, by their names."""
        singles = [{name: v} for name in self.parts or self.grid for v in self.grid[name]]
        return {
            named(values): values for values in [*singles, *(self.together if self.parts is None else ())]
        }

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
        with self.changed(self.settings()[name]):
            return self.captured(name, case, pool)

    def captured(self, name: str, case: Case, pool: Pool) -> GraphContender:
        kernel = DeviceKernel(self.backend, IN_PLACE, case, pool)
        return GraphContender(kernel, name, kernel.provider.named(name))


def triton_suite(parts: Sequence[str] | None = None, overlaps: bool = True) -> TuningSuite:
    """That of `triton`; `overlaps`: whether what `triton_overlaps` asks for is there."""
    grid = {name: values for name, values in TRITON_GRID.items() if overlaps or name != "overlap"}
    together = [values for values in TRITON_TOGETHER if overlaps or "overlap" not in values]
    return TuningSuite(parts, "triton", grid, together, triton_numbers)
