"""Kernels as nvcc builds them: its report of registers and spills, and the machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHES = os.environ.get("VIDFAST_TEST_ARCHES", "90").split(",")
BYTES = {"float": 4, "double": 8, "__nv_bfloat16": 2, "__half": 2}


def tool(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [Path(home) / "bin"]
    triton = importlib.util.find_spec("triton")  # it carries a disassembler
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name) or next((str(p / name) for p in places if (p / name).exists()), None)


@dataclass(frozen=True)
class Kernel:
    name: str  # planes<float, float, true, false>
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def mapping(self) -> str:
        return self.name.split("<")[0]

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(re.split(r",\s*", self.name.split("<")[1].rstrip(">"))) if "<" in self.name else ()

    @property
    def pair(self) -> tuple[str, ...]:
        return self.arguments[:2]

    @property
    def sums(self) -> bool:
        return self.arguments[2:3] == ("true",)

    @property
    def masked(self) -> bool:
        return self.arguments[3:] == ("true",)

    @property
    def sweeps(self) -> bool:
        """Whether it is one of those for two known dtypes, whose machine code is looked at."""
        return self.mapping in ("planes", "rows") and "Any" not in self.pair


@dataclass(frozen=True)
class Built:
    arch: str
    objects: list[Path]
    kernels: list[Kernel]


REPORT = re.compile(
    r"entry function '(?P<name>.*?)' for 'sm_(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def plain(name: str) -> str:
    """planes<float, float, true, false> of a demangled kernel."""
    name = re.sub(r"vidfast::cuda::|\(anonymous namespace\)::|^void |\(.*Args\)$|\(bool\)", "", name)
    return re.sub(r"\(\w*Args\)$", "", name)


def build(sources: Sequence[str], arch: str, into: Path) -> Built:
    """These files of csrc/cuda, without their suffix."""
    nvcc, filt = tool("nvcc"), shutil.which("c++filt")
    if nvcc is None or filt is None:
        pytest.skip(f"there is no {'nvcc' if nvcc is None else 'c++filt'}")

    def one(name: str) -> tuple[Path, str]:
        out = into / f"{name}.o"
        command = [
            nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v",
            "-Xcompiler=-fPIC", "-c", str(CUDA / f"{name}.cu"), "-o", str(out),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        warnings = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
        assert not warnings, "\n".join(warnings)
        return out, done.stderr

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", min(os.cpu_count() or 1, 4)))) as pool:
        results = list(pool.map(one, sources))
    report = subprocess.run(
        [filt], input="".join(r[1] for r in results), capture_output=True, text=True
    ).stdout
    kernels = [
        Kernel(plain(m["name"]), m["arch"], *(int(m[k]) for k in ("registers", "stack", "stores", "loads")))
        for m in REPORT.finditer(report)
    ]
    return Built(arch, [r[0] for r in results], kernels)


def instructions(built: Built) -> Iterator[tuple[Kernel, list[str]]]:
    """The machine code of each kernel."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump")
    filt = shutil.which("c++filt")
    assert filt is not None
    by_name = {k.name: k for k in built.kernels}
    for path in built.objects:
        dump = subprocess.run(
            [cuobjdump, "--dump-sass", str(path)], capture_output=True, text=True, check=True
        )
        text = subprocess.run([filt], input=dump.stdout, capture_output=True, text=True, check=True).stdout
        for part in text.split("Function : ")[1:]:
            name = plain(part.split("\n")[0].strip())
            yield by_name[name], re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", part)
