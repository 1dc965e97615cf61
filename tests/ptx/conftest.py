"""The interpreted back ends, in place of those that need a GPU. See CONTRIBUTING.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / name) for name in ("core", "triton", "emulation")]

from interpreted import Install, Interpreted, LaunchesOf
from keeping import kept
from nvcc_launches import NvccKernels, NvccLaunches, compile_ptx, missing_tool
from places import Place

from vidfast import backends


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts an interpreted back end in the place of the real one, for a test."""

    def put(name: str, launches_of: LaunchesOf) -> tuple[Interpreted, Place]:
        backend = Interpreted(name, launches_of, [])
        monkeypatch.setitem(backends._loaded, name, backend)
        return backend, Place(name, torch.device("cpu"), None, gpu_code=True)

    return put


@pytest.fixture(scope="session")
def nvcc_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """nvcc's PTX of every file in csrc/cuda that has kernels."""
    missing = missing_tool()
    if missing is not None:
        pytest.skip(f"there is no {missing}: neither in CUDA_HOME nor on PATH")
    return compile_ptx(kept("nvcc") or tmp_path_factory.mktemp("nvcc"))


@pytest.fixture(scope="session")
def native(nvcc_texts: dict[str, str], request: pytest.FixtureRequest) -> Any:
    """CUDA's native host code. It takes long to build: not where there is nothing for it to launch."""
    from emulated import load_module

    return load_module(request.getfixturevalue("emulated_module"))


@pytest.fixture(scope="session")
def nvcc_launches(nvcc_texts: dict[str, str], native: Any, emulated_module: Path) -> NvccLaunches:
    return NvccLaunches(native, emulated_module, NvccKernels(nvcc_texts))


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compilations of other runs prove nothing about this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="session")
def triton_launches(triton_cache: None) -> Any:
    """Triton's launches, compiled once in a session."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("interpreted kernels are not compiled")
    from triton_launches import TritonLaunches

    return TritonLaunches()
