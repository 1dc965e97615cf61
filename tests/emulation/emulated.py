"""Compiles the CUDA kernels for the host: the sources of csrc/cuda with g++ and emulation.h for CUDA's headers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"

KERNELS = (
    "masked_rows.cu", "masked_planes.cu", "planes.cu", "rows.cu", "scale.cu", "alpha.cu", "finish.cu", "total.cu",
    "gaussian_nll.cu", "chunks.cpp",
)  # fmt: skip
HETEROSCEDASTIC = (
    "heteroscedastic_masked.cu",
    "heteroscedastic_plain.cu",
    "heteroscedastic.cu",
    "chunks.cpp",
)
# The programs that check the kernels, and what each is made of.
CHECKS = {"check": KERNELS, "check_heteroscedastic": HETEROSCEDASTIC}
F32_ONLY = ("-DVIDFAST_CUDA_PAIRS(X)=X(float, float)", "-DVIDFAST_CUDA_TRIPLES(X)=X(float, float)")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-DVIDFAST_EMULATION", "-DVIDFAST_TUNE", '-DVIDFAST_CUDA_ARCHITECTURES="emulated"',
)  # fmt: skip


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def compile_all(
    sources: Sequence[Path], into: Path, csrc: Path = CSRC, flags: Sequence[str] = ()
) -> list[Path]:
    """The objects of these sources, two at a time. `csrc`: the native sources, perhaps a changed copy."""
    cxx = compiler()
    assert cxx is not None
    into.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        out = into / (source.name + ".o")
        command = [
            cxx,
            "-x",
            "c++",
            *FLAGS,
            *flags,
            f"-I{csrc}",
            f"-I{HERE}",
            "-c",
            str(source),
            "-o",
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return out

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", min(os.cpu_count() or 1, 4)))) as pool:
        return list(pool.map(one, sources))


def link(objects: Sequence[Path], out: Path, flags: Sequence[str] = ()) -> Path:
    cxx = compiler()
    assert cxx is not None
    done = subprocess.run([cxx, *flags, *map(str, objects), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def load_file(name: str, path: Path) -> Any:
    """The Python file or extension at `path`, as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_module(path: Path) -> Any:
    """What `build_module` made."""
    return load_file("vidfast_emulated", path)


def build_module(into: Path) -> Path:
    """The back end's functions as a Python module `vidfast_emulated`."""
    import pybind11

    sources = [CSRC / "cuda" / name for name in dict.fromkeys((*KERNELS, *HETEROSCEDASTIC, "probe.cu"))]
    sources += [CSRC / "bindings_cuda.cpp", CSRC / "bindings_cuda_heteroscedastic.cpp"]
    sources += [HERE / "module.cpp", HERE / "emulation.cpp"]
    flags = (
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
        f'-DVIDFAST_SOURCES="{load_file("vidfast_setup", ROOT / "setup.py").digest()}"',
    )
    return link(compile_all(sources, into, flags=flags), into / "vidfast_emulated.so", ["-shared"])


def sources_of(check: str, csrc: Path = CSRC) -> list[Path]:
    """Those of one of `CHECKS`."""
    return [csrc / "cuda" / name for name in CHECKS[check]] + [HERE / f"{check}.cpp", HERE / "emulation.cpp"]


def build_check(into: Path, csrc: Path = CSRC, flags: Sequence[str] = (), check: str = "check") -> Path:
    """One of the programs in `CHECKS`."""
    return link(compile_all(sources_of(check, csrc), into, csrc, flags), into / check, flags)
