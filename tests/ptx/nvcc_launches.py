"""What CUDA's native host code launches, with the PTX that nvcc makes of csrc/cuda.

The host code is that of tests/emulation: it gives a launch to this module instead of running it. A kernel is known by
the address of its function on the host, whose name the library's table of symbols has.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from interpreted import steps_of
from memory import GlobalMemory
from program import Kernel, Module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from waves import Launch

from vidfast.backends.cuda import CudaBackend

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
_WITHOUT_LAUNCHES = ("gaussian_nll", "probe")
# What the emulation has in place of CUDA's types.
_TYPES = {"vidfast::cpu::bf16": "__nv_bfloat16", "vidfast::cpu::f16": "__half"}


def nvcc() -> str | None:
    """That of CUDA_HOME or CUDA_PATH, of PATH, or of the usual place: in the order of setup.py."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named and (Path(named) / "bin" / "nvcc").exists():
        return str(Path(named) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def missing_tool() -> str | None:
    """The first of the programs that are needed and not there."""
    if nvcc() is None:
        return "nvcc"
    return next((name for name in ("c++filt", "nm") if shutil.which(name) is None), None)


def plain(demangled: str) -> str:
    """planes<float, float, true>: a kernel's name without its namespaces and parameters."""
    for host, device in _TYPES.items():
        demangled = demangled.replace(host, device)
    name = re.sub(r"vidfast::cuda::|\(anonymous namespace\)::|^void ", "", demangled)
    name = re.sub(r"\((?:bool|int|unsigned int|long)\)(?=\w)", "", name)  # of a template's numbers
    return re.sub(r"\(.*\)$", "", name)


def compile_ptx(into: Path) -> dict[str, str]:
    """The PTX of every file with kernels, by its name."""
    into.mkdir(parents=True, exist_ok=True)
    sources = sorted(p for p in CUDA.glob("*.cu") if p.stem not in _WITHOUT_LAUNCHES)
    compiler = nvcc()
    assert compiler is not None

    def one(source: Path) -> str:
        out = into / f"{source.stem}.ptx"
        command = [compiler, "-std=c++17", "-O3", "-arch=compute_90", "--ptx", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out.read_text()

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", min(os.cpu_count() or 1, 4)))) as pool:
        return {s.stem: text for s, text in zip(sources, pool.map(one, sources), strict=True)}


class NvccKernels:
    """The kernels of some files of PTX, by the names they have in C++."""

    def __init__(self, texts: dict[str, str]) -> None:
        modules = [Module(text) for text in texts.values()]
        names = [(module, name) for module in modules for name in module.names]
        filtered = subprocess.run(
            ["c++filt"], input="\n".join(n for _, n in names), capture_output=True, text=True, check=True
        )
        self._kernels = {plain(d): mn for d, mn in zip(filtered.stdout.splitlines(), names, strict=True)}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            raise KeyError(f"nvcc made no kernel {name}; there are {', '.join(sorted(self._kernels))}")
        module, mangled = self._kernels[name]
        return module.kernel(mangled)


class NvccLaunches:
    """The launches of CUDA's back end.

    Args:
        native: The emulated module.
        library: Its file.
        kernels: nvcc's.
    """

    def __init__(self, native: Any, library: Path, kernels: NvccKernels) -> None:
        self.native, self.kernels = native, kernels
        listed = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True)
        symbols = re.findall(r"^([0-9a-f]+) [tTwW] (.*)$", listed.stdout, re.MULTILINE)
        self._names = {int(place, 16): plain(name) for place, name in symbols if "vidfast::cuda" in name}

    def __call__(
        self, primitive: str, inputs: tuple[Any, ...], outputs: dict[str, Any], memory: GlobalMemory
    ) -> list[Launch]:
        made: list[Launch] = []
        backend = CudaBackend(self.native, None, "cpu", lambda index: 0)
        machine = self.native.machine()
        machine.instead = lambda launch: made.append(self._launch(launch))
        try:
            with _Allocations(memory):
                getattr(backend, primitive)(*inputs, **outputs)
        finally:
            machine.instead = None
        return made

    def _launch(self, launch: Any) -> Launch:
        name = self._names[launch.offset]
        kernel = self.kernels[name]
        wanted = kernel.parameter_bytes
        assert len(launch.arguments) == wanted, f"{name} takes {wanted} bytes, given {len(launch.arguments)}"
        return Launch(
            kernel, steps_of(kernel), name, launch.grid, launch.threads, launch.shared, launch.arguments,
            launch.overlap,
        )  # fmt: skip


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells memory of what the back end allocates itself: its workspaces, which hold nothing."""

    def __init__(self, memory: GlobalMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and "empty" in str(func):
            self._memory.add(out, "a workspace", holds=False, writable=True)
        return out
