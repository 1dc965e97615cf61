"""What is done with a GPU's minutes, in order of value."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.gpu import build as extension
from bench.gpu import measuring
from bench.gpu.runner import Job, Stage, not_here
from bench.gpu.workers import DEVICE, ask, backends, device_is_broken, processes, share

ROOT = Path(__file__).parents[2]
# Every run begins with these, whatever is asked for: the others need them.
ALWAYS = ("build", "machine")
KERNELS_OF_OURS = "regex:planes|rows|sweep|finish"


def prepare() -> None:
    """What the stages that run in this process's children import: once, here. The device is not touched."""
    ours = ("measured", "masked", "modules", "module_cases", "training", "suites", "gpu.smoke")
    for name in ("torch", "vidfast", *(f"bench.{name}" for name in ours)):
        importlib.import_module(name)
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("vidfast.backends.triton.kernels")


def command(*words: str, **environment: str) -> int:
    """Runs it in the root of the checkout and returns its exit code."""
    print(" ".join(words), flush=True)
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode


# ---- the machine and the extension


def build(job: Job) -> int | None:
    """Uses the extension that is in place, if it is of these sources and runs here; else builds it."""

    def fault(question: Callable[[Path], str | None]) -> str | None:
        """In a process of its own: one that has loaded an extension never sees the file that replaces it."""
        path = extension.in_place()
        if path is None:
            return "there is none in place"
        answer, error = ask(lambda: question(path), job.work / "ask")
        return error or answer

    reason = fault(extension.stale)
    if reason is not None:
        print(f"{reason}: it is built", flush=True)
        extension.build()
        reason = fault(extension.stale)
    reason = reason or fault(extension.unavailable)
    path = extension.in_place()
    print(reason or f"{path.name if path else ''} is of these sources and runs here")
    return 0 if reason is None else 1


def machine(job: Job) -> int | None:
    """The head of the results; device, driver, compilers, packages."""
    from importlib.metadata import PackageNotFoundError, version

    from bench.measured import write_machine

    write_machine(job.lines, DEVICE, selection=f"bench/gpu.sh{', --small: a rehearsal' if job.small else ''}")
    for tool in (
        ("nvidia-smi",),
        ("nvcc", "--version"),
        ("ncu", "--version"),
        ("compute-sanitizer", "--version"),
    ):
        print(f"$ {' '.join(tool)}", flush=True)
        try:
            subprocess.run(tool, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"  {error}")
    packages = (
        "torch",
        "triton",
        "numpy",
        "setuptools",
        "pybind11",
        "pytest",
        "pytest-xdist",
        "pytest-benchmark",
    )
    for package in packages:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
    names = backends()
    print(f"back ends that run here: {', '.join(names) or 'none'}")
    return 0 if names else 1


# ---- is it right


def smoke(job: Job) -> int | None:
    """Every mapping and primitive of both back ends, in ten pairs of dtypes and with masks, against fp64."""
    from bench.gpu import smoke as checks

    shapes = checks.SMALLEST_SHAPES if job.small else checks.SHAPES
    names, reason = ask(backends, job.work / "ask")
    if not names:
        print(f"no GPU back end runs here: {reason or 'see the stage machine'}")
        return 1
    bad = 0
    for name in names:
        begin = time.monotonic()
        wanted, masked = checks.problems([name], shapes), checks.masked_problems([name], job.small)
        if job.small:
            wanted, masked = wanted[:: 7 if name == "cuda" else 47], masked[:: 3 if name == "cuda" else 17]
        wanted += masked
        found = share(
            wanted,
            lambda problem: checks.check(problem, DEVICE),
            processes(),
            job.work / "smoke",
            device_is_broken,
        )
        done = sum(result is not None for result in found)
        errors = [
            {"problem": problem.title, "error": result["error"]}
            for problem, result in zip(wanted, found, strict=True)
            if result is not None and "error" in result
        ]
        for error in errors[:40]:
            print(f"{error['problem']}: {error['error']}")
        bad += len(errors)
        seconds = round(time.monotonic() - begin, 1)
        job.lines.write(
            "check",
            backend=name,
            calls=done,
            wanted=len(wanted),
            wrong=len(errors),
            seconds=seconds,
            errors=errors[:40],
        )
        print(f"{name}: {done} of {len(wanted)} calls, {len(errors)} wrong, {seconds} s", flush=True)
        if done < len(wanted):
            raise KeyboardInterrupt
    return 1 if bad else 0


# ---- the tests, and what looks inside


def tests(*arguments: str, **environment: str) -> int:
    """Runs tests, in a process a core; without pytest-xdist in this process, which is prepared."""
    words = ("-q", "-p", "no:cacheprovider", *arguments)
    if importlib.util.find_spec("xdist") is not None:
        parallel = ("-n", str(processes()))
        return command(sys.executable, "-m", "pytest", *parallel, *words, OMP_NUM_THREADS="1", **environment)
    import pytest

    os.environ.update(environment)
    os.chdir(ROOT)
    return int(pytest.main(list(words)))


def core_cuda(job: Job) -> int | None:
    """The shared suite on the CUDA back end."""
    some = ("-k", "plane_49 and one_pass") if job.small else ()
    size = "10000" if job.small else "20000000"
    where = "tests/core/test_values.py" if job.small else "tests/core"
    return tests("-m", "backend", where, *some, VIDFAST_TEST_BACKEND="cuda", VIDFAST_TEST_SMALL=size)


def on_the_gpu(job: Job) -> int | None:
    """Streams, graphs, launches."""
    del job
    return tests("tests/cuda/test_cuda_gpu.py")


def core_triton(job: Job) -> int | None:
    """The shared suite's values on the Triton back end."""
    some = ("-k", "plane_49 and one_pass") if job.small else ()
    size = "10000" if job.small else "2000000"
    where = "tests/core/test_values.py"
    return tests("-m", "backend", where, *some, VIDFAST_TEST_BACKEND="triton", VIDFAST_TEST_SMALL=size)


def toolkit(name: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or in its usual place."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


def profile(job: Job) -> int | None:
    """Nsight Compute on a launch of each mapping and back end. The clocks are left as they are."""
    ncu = toolkit("ncu")
    if ncu is None:
        return not_here("Nsight Compute is not on this machine")
    out, count = str(job.work / "ncu"), "8"
    small = ("--small",) if job.small else ()
    code = command(
        *(ncu, "--clock-control", "none", "--kernel-name", KERNELS_OF_OURS, "--launch-count", count),
        *("--set", "full", "--import-source", "no", "--force-overwrite", "-o", out),
        *(sys.executable, "-m", "bench.gpu.launches", *small),
    )
    report = Path(f"{out}.ncu-rep")
    print(f"a report of {report.stat().st_size} bytes" if report.exists() else "no report was written")
    return code or (0 if report.exists() else 1)


def memcheck(job: Job) -> int | None:
    """compute-sanitizer's memcheck over few shapes, each tensor with an allocation and so bounds of its own."""
    sanitizer = toolkit("compute-sanitizer")
    if sanitizer is None:
        return not_here("compute-sanitizer is not on this machine")
    return command(
        *(sanitizer, "--tool", "memcheck", "--error-exitcode", "9"),
        *(sys.executable, "-m", "bench.gpu.smoke", "cuda", "--smallest" if job.small else "--few"),
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )


def stage(name: str, most_seconds: float, run: Callable[[Job], int | None], prepared: bool = False) -> Stage:
    assert run.__doc__ is not None
    return Stage(name, run.__doc__.splitlines()[0].rstrip("."), most_seconds, run, prepared)


# The limits add up to more than a run has: each stage gets what is left.
STAGES = (
    stage("build", 150, build),
    stage("machine", 30, machine, prepared=True),
    stage("smoke", 60, smoke, prepared=True),
    stage("rates", 110, measuring.rates, prepared=True),
    stage("host", 30, measuring.host, prepared=True),
    stage("steps", 60, measuring.steps, prepared=True),
    stage("modules", 40, measuring.modules, prepared=True),
    stage("head", 60, measuring.head, prepared=True),
    stage("masks", 50, measuring.masks, prepared=True),
    stage("tune", 45, measuring.tune, prepared=True),
    stage("tune-triton", 60, measuring.tune_triton, prepared=True),
    stage("core-cuda", 75, core_cuda, prepared=True),
    stage("gpu", 45, on_the_gpu, prepared=True),
    stage("core-triton", 80, core_triton, prepared=True),
    stage("ncu", 50, profile),
    stage("memcheck", 60, memcheck),
)
