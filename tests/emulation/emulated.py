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
F32_ONLY = ("-DVIDFAST_CUDA_PAIRS(X)=X(float, float)",)
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

    sources = [CSRC / "cuda" / name for name in (*KERNELS, "probe.cu")]
    sources += [CSRC / "bindings_cuda.cpp", HERE / "module.cpp", HERE / "emulation.cpp"]
    flags = (
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
        f'-DVIDFAST_SOURCES="{load_file("vidfast_setup", ROOT / "setup.py").digest()}"',
    )
    return link(compile_all(sources, into, flags=flags), into / "vidfast_emulated.so", ["-shared"])


def build_check(into: Path, csrc: Path = CSRC, flags: Sequence[str] = ()) -> Path:
    """The program of check.cpp."""
    sources = [csrc / "cuda" / name for name in KERNELS] + [HERE / "check.cpp", HERE / "emulation.cpp"]
    return link(compile_all(sources, into, csrc, flags), into / "check", flags)
