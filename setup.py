"""Builds vidfast._C with CMake and Ninja. torch is not needed to build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The build requirement of that name (cmake and ninja come as Python packages), else the one on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"vidfast needs {name} to build: pip install {name}")
    return found


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            tool("cmake"),
            str(ROOT),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, cwd=build, check=True)
        jobs = os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 4)))
        subprocess.run([tool("cmake"), "--build", ".", "--parallel", jobs], cwd=build, check=True)
        if not target.exists():
            raise RuntimeError(f"the build ended without making {target.name}")


setup(ext_modules=[CMakeExtension("vidfast._C")], cmdclass={"build_ext": CMakeBuild})
