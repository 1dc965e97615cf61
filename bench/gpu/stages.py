"""What is done with a GPU's minutes, in order of value."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import build as extension
from bench.gpu.runner import NOT_HERE, Job, Stage
from bench.gpu.workers import device_is_broken, share

ROOT = Path(__file__).parents[2]
DEVICE = "cuda"
# Every run begins with these, whatever is asked for: the others need them.
ALWAYS = ("build", "machine")
MOST_PROCESSES = 12
# Numbers of points in cases.DEVICE_POINTS.
STEP_POINTS = (0, 1, 5)
TUNING_POINTS = (0, 2, 4, 6, 8, 10, 11)
# Of seven samples the spread calls equal rows different in 1.6% of the cases, of five in 6%.
FEWEST_SAMPLES = 7
KERNELS_OF_OURS = "regex:planes|rows|sweep"


def prepare() -> None:
    """What the stages that run in this process's children import: once, here. The device is not touched."""
    for name in ("torch", "vidfast", "bench.measured", "bench.modules", "bench.suites", "bench.gpu.smoke"):
        importlib.import_module(name)
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("vidfast.backends.triton_kernels")


def processes() -> int:
    return max(1, min(MOST_PROCESSES, os.cpu_count() or 1))


def backends() -> list[str]:
    from bench.backends import runnable

    return [name for name in runnable(DEVICE) if name != "cpu"]


def command(*words: str, **environment: str) -> int:
    """Runs it in the root of the checkout and returns its exit code."""
    print(" ".join(words), flush=True)
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode


def not_here(why: str) -> int:
    print(why)
    return NOT_HERE


# ---- the machine and the extension


def build(job: Job) -> int | None:
    """Uses the extension that is in place, if it is of these sources and runs here; else builds it."""

    def ask(question: Callable[[Path], str | None], path: Path | None) -> str | None:
        """In a process of its own: one that has loaded an extension never sees the file that replaces it."""
        if path is None:
            return "there is none in place"
        answer = share([path], lambda path: {"answer": question(path)}, 1, job.work / "ask")[0]
        if answer is None:
            raise KeyboardInterrupt
        reason: str | None = answer.get("error") or answer.get("answer")
        return reason

    reason = ask(extension.stale, extension.in_place())
    if reason is not None:
        print(f"{reason}: it is built", flush=True)
        extension.build()
        reason = ask(extension.stale, extension.in_place())
    path = extension.in_place()
    reason = reason or ask(extension.unavailable, path)
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
    """Every mapping and primitive of both back ends, in ten pairs of dtypes, against fp64 on the device."""
    from bench.gpu import smoke as checks

    shapes = checks.SMALLEST_SHAPES if job.small else checks.SHAPES
    asked = share([None], lambda _: {"names": backends()}, 1, job.work / "smoke")[0]
    names = (asked or {}).get("names", [])
    if not names:
        print(f"no GPU back end runs here: {(asked or {}).get('error', 'see the stage machine')}")
        return 1
    bad = 0
    for name in names:
        begin = time.monotonic()
        wanted = checks.problems([name], shapes)
        if job.small:
            wanted = wanted[:: 7 if name == "cuda" else 47]
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


# ---- how fast is it


def measured(job: Job, cases: Sequence[tuple[Any, Any]], seconds: float) -> int:
    """Measures (suite, case) after (suite, case) and prints a line a row; 1 if a row failed.

    All in one process, forked from this one, for as long as the device lives in it: after a fault another goes on.
    """
    from bench.interleave import Budget
    from bench.measured import measure_all

    budget = Budget(0.02 if job.small else seconds, fewest=2 if job.small else FEWEST_SAMPLES, most=30)
    longest = [0.0]

    def one(item: tuple[Any, Any]) -> dict[str, Any]:
        suite, case = item
        failed = 0
        for _, rows in measure_all(suite, [case], job.lines, budget, job.deadline, longest):
            failed += sum(print_row(case, name, row) for name, row in rows.items())
        return {"failed": failed}

    results = share(cases, one, 1, job.work / "measured", device_is_broken)
    failed = 0
    for (_, case), result in zip(cases, results, strict=True):
        if result is None:
            raise KeyboardInterrupt
        if "error" in result:
            print(f"{case.title}: {result['error']}")
            job.lines.write("failure", suite=case.suite, case=case.title, row="all", error=result["error"])
        failed += result.get("failed", 1)
    print(f"{failed} rows failed" if failed else "every row was measured")
    return 1 if failed else 0


def print_row(case: Any, name: str, row: Any) -> bool:
    """Whether it failed."""
    if row.timings is None or row.info is None:
        print(f"{case.title} | {name}: {type(row.failure).__name__}: {row.failure}", flush=True)
        return True
    middle = sorted(sample.seconds for sample in row.timings.samples)[len(row.timings.samples) // 2]
    share_of_copy = row.info.get("share_of_copy")
    rate = "" if share_of_copy is None else f", {100 * share_of_copy:.0f}% of the copy"
    print(f"{case.title} | {name}: {middle * 1e6:.2f} us{rate}", flush=True)
    return False


def rates(job: Job) -> int | None:
    """Device time of every primitive of both back ends beside `copy_`, from graphs, cold."""
    from bench.cases import device_cases
    from bench.suites import KernelSuite

    suite = KernelSuite("kernel alone", lambda *_: [], True, DEVICE)
    cases = device_cases(suite.name, DEVICE, job.small)
    warm(job, cases)
    return measured(job, [(suite, case) for case in cases], seconds=0.5)


def warm(job: Job, cases: Sequence[Any]) -> None:
    """Compiles Triton's kernels for the cases in processes side by side, into its cache on disk."""
    from bench.buffers import Pool
    from bench.device_kernels import PRIMITIVES, DeviceKernel

    begin = time.monotonic()

    def one(item: tuple[Any, str]) -> dict[str, Any]:
        case, primitive = item
        if "triton" in backends():
            DeviceKernel("triton", primitive, case, Pool(case, slots=1)).prepare()()
        return {}

    items = [(case, primitive) for case in cases for primitive in PRIMITIVES]
    found = share(items, one, processes(), job.work / "warm", device_is_broken)
    for (case, primitive), result in zip(items, found, strict=True):
        if result is None:
            raise KeyboardInterrupt
        if "error" in result:
            print(f"{case.title} | triton {primitive}: {result['error']}")
    print(f"compiled in {time.monotonic() - begin:.1f} s", flush=True)


def host(job: Job) -> int | None:
    """Host time and launches of a step on 32 elements."""
    from dataclasses import replace

    from bench.cases import WEIGHTED, overhead_cases
    from bench.suites import StepSuite

    suite = StepSuite("overhead", overhead_cases, False, DEVICE, floor=True)
    cases = suite.list_cases()
    if job.small:
        cases = [replace(case, gradients=(WEIGHTED,)) for case in cases]
    return measured(job, [(suite, case) for case in cases], seconds=2.0)


def steps(job: Job) -> int | None:
    """Whole loss steps: eager, torch's own loss, torch.compile, every strategy, and each of ours in a graph."""
    from bench.cases import device_cases
    from bench.suites import StepSuite

    suite = StepSuite("loss step", lambda *_: [], False, DEVICE)
    cases = device_cases(suite.name, DEVICE, job.small, STEP_POINTS)
    return measured(job, [(suite, case) for case in (cases[-1:] if job.small else cases)], seconds=2.0)


def modules(job: Job) -> int | None:
    """Whole VIDLoss modules and a distillation step."""
    from bench.cases import small_module_cases, training_cases, vid_loss_cases
    from bench.modules import TRAINING_STEP, VID_LOSS, ModuleSuite

    loss, step = (
        ModuleSuite(name, small_module_cases if job.small else cases, True, DEVICE, builders)
        for name, builders, cases in (
            ("VIDLoss", VID_LOSS, vid_loss_cases),
            ("training step", TRAINING_STEP, training_cases),
        )
    )
    # One of each before the others, which may be left out.
    parts = (
        (loss, loss.list_cases()[:1]),
        (step, step.list_cases()[:1]),
        (loss, loss.list_cases()[1:]),
        (step, step.list_cases()[1:]),
    )
    return measured(job, [(suite, case) for suite, cases in parts for case in cases], seconds=3.0)


def tune(job: Job) -> int | None:
    """Every free number of the CUDA back end's host code, changed alone."""
    from bench.cases import device_cases
    from bench.gpu import tuning

    suite = tuning.TuningSuite(tuple(tuning.GRID)[:2] if job.small else tuple(tuning.GRID))
    asked = share([None], lambda _: {"reason": tuning.missing(backends())}, 1, job.work / "ask")[0] or {}
    if reason := asked.get("error") or asked.get("reason"):
        return not_here(reason)
    cases = device_cases(tuning.SUITE, DEVICE, job.small, TUNING_POINTS)
    return measured(job, [(suite, case) for case in (cases[:2] if job.small else cases)], seconds=0.4)


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
    apart = () if job.small else ("tests/cuda/test_cuda_backend.py",)
    return tests("tests/cuda/test_cuda_gpu.py", *apart)


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
    stage("rates", 110, rates, prepared=True),
    stage("host", 30, host, prepared=True),
    stage("steps", 60, steps, prepared=True),
    stage("modules", 75, modules, prepared=True),
    stage("tune", 45, tune, prepared=True),
    stage("core-cuda", 75, core_cuda, prepared=True),
    stage("gpu", 45, on_the_gpu, prepared=True),
    stage("core-triton", 80, core_triton, prepared=True),
    stage("ncu", 50, profile),
    stage("memcheck", 60, memcheck),
)
