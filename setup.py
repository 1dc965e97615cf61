"""Builds vidfast._C with CMake and Ninja. torch is not needed to build."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
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


# In the order in which CMake looks for them.
COMPILERS = ("c++", "CC", "g++", "clang++", "icpx")
INSTALL = (
    "install g++ or clang (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
    "conda: conda install gxx; macOS: xcode-select --install), or set CXX to one"
)
PROBE = """\
#include <algorithm>
#include <cstdint>
#if __cplusplus < 201703L
#error "this is not C++17"
#endif
inline constexpr std::int64_t kZero = 0;
int main() {
  if constexpr (sizeof(void*) > 0) return static_cast<int>(std::clamp<std::int64_t>(1, kZero, kZero));
}
"""


def check_compiler(scratch: Path) -> None:
    """Compiles a few lines with the compiler that CMake will take: CXX, else the first on PATH.

    Args:
        scratch: A folder for the lines and for what becomes of them.

    Raises:
        RuntimeError: There is no compiler, or it cannot compile C++17; one line that says what to install.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted and shutil.which(wanted[0]) is None:
        raise RuntimeError(
            f"CXX must be a C++17 compiler, got {os.environ['CXX']!r}, which is not there: "
            "name another, or unset it"
        )
    compiler = wanted or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        raise RuntimeError(
            f"vidfast needs a C++17 compiler to build its CPU kernels, and there is none on PATH: {INSTALL}"
        )
    source = scratch / "compiler_check.cpp"
    source.write_text(PROBE)
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    command = [*compiler, *flags, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next(
            (line for line in lines if "error" in line.lower()), lines[0] if lines else "it says nothing"
        )
        raise RuntimeError(
            "vidfast needs a C++17 compiler to build its CPU kernels, and "
            f"{shlex.join(compiler)} does not compile C++17 ({said}): {INSTALL}"
        )


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else the one on PATH, else of a CUDA toolkit installed by pip beside this Python."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.exists():
            raise RuntimeError(f"CUDA_HOME is {home}, but there is no {nvcc}")
        return str(nvcc)
    if found := shutil.which("nvcc"):
        return found
    # a build environment of pip's own does not see the packages around it on sys.path
    site = {*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    installed = [p for s in site if s for p in Path(s).glob("nvidia/*/bin/nvcc")]
    default = Path("/usr/local/cuda/bin/nvcc")
    return str(max(installed)) if installed else str(default) if default.exists() else None


# Names that TORCH_CUDA_ARCH_LIST may hold beside numbers, as in torch.
ARCHITECTURES = {
    "Turing": "7.5",
    "Ampere": "8.0;8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0;12.0",
}


def cuda_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else those of the visible GPUs, else sm_80 and sm_90 with PTX for what comes later."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    for name, numbers in ARCHITECTURES.items():
        wanted = re.sub(rf"\b{name}\b", numbers, wanted)
    found = []
    for item in re.split(r"[;,\s]+", wanted.strip()) if wanted.strip() else ():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise RuntimeError(
                "TORCH_CUDA_ARCH_LIST must hold compute capabilities such as '8.0;9.0+PTX' or names "
                f"({', '.join(ARCHITECTURES)}), got {item!r}"
            )
        major, minor, suffix, ptx = match.groups()
        found.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    if found:
        return found
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        found = sorted(
            {line.strip().replace(".", "") + "-real" for line in answer.splitlines() if line.strip()}
        )
    except (OSError, subprocess.SubprocessError):
        found = []
    return found or ["80-real", "90"]


def cuda_options() -> list[str]:
    """What VIDFAST_CUDA, CUDA_HOME and TORCH_CUDA_ARCH_LIST mean to CMake."""
    mode = os.environ.get("VIDFAST_CUDA", "auto").lower()
    if mode not in ("0", "1", "auto"):
        raise RuntimeError(f"VIDFAST_CUDA must be 0, 1 or auto, got {mode!r}")
    if mode == "0":
        return ["-DVIDFAST_CUDA=0"]
    nvcc = find_nvcc()
    if nvcc is None:
        if mode == "1":
            raise RuntimeError(
                "VIDFAST_CUDA=1, but there is no nvcc: set CUDA_HOME, put it on PATH, or pip install nvidia-cuda-nvcc"
            )
        print("vidfast: there is no nvcc, so it is built without CUDA; a GPU runs the Triton kernels")
        return ["-DVIDFAST_CUDA=0"]
    return [
        f"-DVIDFAST_CUDA={mode}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(cuda_architectures())}",
    ]


def digest() -> str:
    """12 digits of SHA-256 over the native sources: `_C.sources`, by which a stale build is known."""
    whole = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]):
        whole.update(f"{path.relative_to(ROOT).as_posix()}\n".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def build(library: Path, scratch: Path, debug: bool = False, options: Sequence[str] = ()) -> None:
    """Configures and builds `vidfast._C` into the folder `library`, with CMake's own files in `scratch`.

    It needs pybind11, CMake and Ninja and nothing of setuptools, whose older releases cannot read pyproject.toml:
    `bench/gpu` builds through it.

    Args:
        library: Where the extension is put.
        scratch: Made if it is not there; a second build in it does only what has changed.
        debug: CMake's Debug instead of Release.
        options: Further arguments of CMake, such as -DVIDFAST_TUNE=ON.

    Raises:
        RuntimeError: A compiler, a tool or nvcc is missing, or an environment variable is wrong.
        subprocess.CalledProcessError: CMake or the compiler failed.
    """
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("vidfast needs pybind11 to build: pip install pybind11") from None
    scratch.mkdir(parents=True, exist_ok=True)
    check_compiler(scratch)
    configure = [
        tool("cmake"),
        str(ROOT),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DVIDFAST_SOURCES={digest()}",
        *cuda_options(),
        *options,
    ]
    subprocess.run(configure, cwd=scratch, check=True)
    jobs = os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 4)))
    subprocess.run([tool("cmake"), "--build", ".", "--parallel", jobs], cwd=scratch, check=True)


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # SystemExit: what pip shows then ends in this line, and not in a traceback through setuptools.
        try:
            build(target.parent, Path(self.build_temp).resolve() / ext.name, self.debug)
        except RuntimeError as error:
            raise SystemExit(f"error: {error}") from None
        except subprocess.CalledProcessError as error:
            step = "build" if "--build" in error.cmd else "configuration"
            raise SystemExit(
                f"error: CMake's {step} of vidfast._C failed (exit code {error.returncode}): "
                "its reason is above"
            ) from None
        if not target.exists():
            raise SystemExit(f"error: the build ended without making {target.name}")


if __name__ == "__main__":
    setup(ext_modules=[CMakeExtension("vidfast._C")], cmdclass={"build_ext": CMakeBuild})
