"""The native extension with its CUDA part: one that is in place, or built here by CMake.

A prebuilt one saves a minute of a GPU's time. It is built on any machine with nvcc, by the Python version of the
machine with the GPU (with pybind11, CMake and Ninja) and for its architecture:

    TORCH_CUDA_ARCH_LIST=9.0 python3.12 -m bench.gpu.build

It is then vidfast/_C.cpython-312-*.so, which git ignores: it has to be taken along by name.

Every build here has VIDFAST_TUNE, so that a search can change the free numbers of the host's code; the kernels are
the same.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vidfast"


def in_place() -> Path | None:
    """The extension that this Python would import from the package, if it is there."""
    found = (PACKAGE / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.exists()), None)


def stale(path: Path) -> str | None:
    """Why the extension must be built anew for this device, or None."""
    try:
        native = load_extension(path)
    except ImportError as error:
        return f"it does not load: {error}"
    if not hasattr(native, "cuda_forward"):
        return "it was built without CUDA"
    if getattr(native, "sources", None) != _setup().digest():
        return "it was built from other sources"
    if not hasattr(native, "cuda_free_numbers"):
        return "it was built without VIDFAST_TUNE"
    if native.cuda_unavailable():
        return None  # no build would help
    return str(native.cuda_device_unsupported()) or None


def unavailable(path: Path) -> str | None:
    """Why no build of the extension could run here, or None."""
    return str(load_extension(path).cuda_unavailable()) or None


def load_extension(path: Path) -> Any:
    """The module, apart from the one that the package may have imported."""
    return _load("vidfast._C", path)


def build(into: Path = PACKAGE) -> None:
    """Builds it with CUDA into the folder `into`, by setup.py's own function. pip and setuptools play no part in it."""
    os.environ["VIDFAST_CUDA"] = "1"
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    into = into.resolve()
    with tempfile.TemporaryDirectory(dir=into, prefix=".build-") as scratch:
        library = Path(scratch) / "library"
        _setup().build(library, Path(scratch) / "scratch", options=["-DVIDFAST_TUNE=ON"])
        for path in library.iterdir():  # whole or not at all: a build that is killed leaves no torn file
            path.replace(into / path.name)


def _setup() -> Any:
    return _load("vidfast_setup", ROOT / "setup.py")


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} must be a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE, help="default: the package")
    into: Path = parser.parse_args(argv).folder
    try:
        into.mkdir(parents=True, exist_ok=True)
        build(into)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"bench.gpu.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
